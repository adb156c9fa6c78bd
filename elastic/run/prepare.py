"""Turns a job and options into a run that can start. Everything that can be refused is refused here."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from dataclasses import dataclass, replace
from typing import Any

from elastic import config as cfg
from elastic.checkpoint.initial import initial_source
from elastic.config import TrainConfig
from elastic.data.deal import batch_line, batch_table
from elastic.data.preparing import prepare_here
from elastic.errors import ConfigError
from elastic.job import Job, check_job, job_name, set_plan, source_hash
from elastic.job_code import job_code
from elastic.job_data import held_out_sizes, training_data
from elastic.job_options import job_options
from elastic.observe.callbacks import Callback
from elastic.parallel.nccl import settings_lines
from elastic.phases import check_evaluated, check_same_phases, check_strategy
from elastic.redact import clean, redact
from elastic.run import forecast
from elastic.run.folder import RunFolder
from elastic.run.notifying import check_target
from elastic.run.plan import RunPlan, resolve
from elastic.run.resuming import CODED, changes, described_defaults, is_over, refuse_changes
from elastic.run.sameness import Sameness
from elastic.storage import Storage
from elastic.units import ENDLESS
from elastic.values import TAG, describe, show

RAY_PACKAGE = "/_ray_pkg_"  # part of the path of each working directory that Ray has unpacked
UNSAVED = "nothing is saved before the run ends or is stopped; --checkpoint.every auto saves while it trains"


@dataclass(frozen=True)
class PreparedRun:
    """A validated run. `config` has its name and V filled in; `finished` is the result of a run that is over.

    `changed`: it goes on with other result options than its stored configuration. `defaults`: those of the job's file,
    if a command line started the run. `notes`: lines about its options to print at the start. `callbacks`: the job's.
    `prepared`: the key under which this node was prepared.
    """

    job: Job
    config: TrainConfig
    plan: RunPlan
    folder: RunFolder
    digest: str
    source: str | None
    finished: dict[str, Any] | None = None
    changed_code: bool = False
    changed: bool = False
    defaults: TrainConfig | None = None
    notes: tuple[str, ...] = ()
    callbacks: tuple[Callback, ...] = ()
    prepared: str = ""

    @property
    def name(self) -> str:
        assert self.config.run.name is not None
        return self.config.run.name

    @property
    def again(self) -> str:
        """Options that make the same command resume this run."""
        usual = (self.defaults or TrainConfig()).run.storage
        where = "" if self.config.run.storage == usual else f"--run.storage {self.config.run.storage} "
        return f"{where}--run.name {self.name}"


def refuse_packages(url: str) -> None:
    """Refuse a relative folder if the working directory is a package that Ray unpacked: its name changes with every
    file in it, so that the run would start from the beginning, and it is removed with the cluster.

    Raises:
        ConfigError: the URL is such a folder.
    """
    if "://" not in url and not os.path.isabs(os.path.expanduser(url)) and RAY_PACKAGE in os.getcwd():
        raise ConfigError(
            f"--run.storage is {url!r}, a folder inside the package that Ray made of this job's working directory, "
            "which is another one at the next submission; give a URL such as s3://bucket/runs, or a folder from / on "
            "that all nodes mount"
        )


def prepare(job: Job, config: TrainConfig) -> PreparedRun:
    """Validate and resolve. Writes nothing but a probe.

    Raises:
        ConfigError: with one sentence that names the option, its value and the fix.
    """
    check_job(job)
    cfg.check_kind(config)
    resumes = config.run.name is not None
    if not resumes:
        name = f"{job_name(job)}-{time.strftime('%Y%m%d')}-{secrets.token_hex(2)}"
        config = replace(config, run=replace(config.run, name=name))
    refuse_packages(config.run.storage)
    check_target(config.observe.notify)
    storage = Storage(config.run.storage)
    if storage.in_process:
        raise ConfigError(
            f"--run.storage is {config.run.storage!r}, which only one process can see, and a run has several; give a "
            "folder or a URL that all of them reach"
        )
    folder = RunFolder(storage.child(str(config.run.name)))
    stored = stored_config(folder) if resumes else None
    sameness = Sameness(folder if stored is not None else None, config)
    prepared = prepare_here(job, config)
    data, dataset_size = training_data(job, sameness.load)
    held_out = held_out_sizes(job)
    check_evaluated(job, Job, held_out)
    check_strategy(job, tensor=config.parallel.tensor, pipeline=config.parallel.stages)
    for name, samples in held_out.items():
        if samples == 0:
            raise ConfigError(f"eval_data() {name!r} has no samples; return None to leave evaluation out")
        if samples >= ENDLESS:
            raise ConfigError(f"eval_data() {name!r} is a stream, which has no end; return some of it in a list")
    tokens = job.tokens_per_sample
    if stored is not None:
        sameness.check_length(dataset_size, stored.get("data"))
        check_same_phases(job, stored.get("phases", []), config.run.name)
    if stored is None:
        initial_source(job, config.checkpoint.init_from)
    stored_v = stored["config"]["batch"]["microbatches"] if stored else None
    allow_v = "batch.microbatches" in config.run.allow_change or "batch.global-size" in config.run.allow_change
    plan = resolve(
        config,
        dataset_size=dataset_size,
        tokens_per_sample=tokens,
        stored_microbatches=None if allow_v else stored_v,
        phases=job.phases,
    )
    config = replace(config, batch=replace(config.batch, microbatches=plan.microbatches))
    set_plan(job, plan.for_job)
    notes: list[str] = []
    if config.parallel.pipeline == "auto":
        from elastic.run.auto_stages import choose_stages  # imports torch

        check_strategy(job, pipeline=config.most_cells)
        stages, notes = choose_stages(job, config, plan, data)
        config = replace(config, parallel=replace(config.parallel, pipeline=stages))
    elif config.scaling.memory_per_worker is not None:
        notes.append("--scaling.memory-per-worker is not used: only --parallel.pipeline auto goes by it")
    if type(job).sampler is not Job.sampler or hasattr(data, "upcoming"):
        from elastic.data.samplers import check_sampler  # imports torch

        check_sampler(job, data, plan.for_job)
    wanted = cfg.result_options(config, job_options(job))
    finished, changed_code, changed, source = None, False, False, source_hash(job)
    if stored is not None:
        found = changes(stored, config, job)
        refuse_changes(found, config.run.allow_change, config.run.name)
        changed_code = stored["source"] is not None and stored["source"] != source
        changed = bool(found) or sameness.longer
        result = folder.result()
        finished = result if is_over(folder.status_if_whole(), result, plan.total_steps) else None
        if finished is None:
            sameness.check(data)
    notes += [] if plan.warmup_steps <= plan.total_steps else [_long_warmup(config, plan)]
    digest = cfg.digest(wanted)
    callbacks = _callbacks(job) if finished is None else ()
    return PreparedRun(
        job,
        config,
        plan,
        folder,
        digest,
        source,
        finished,
        changed_code,
        changed,
        notes=tuple(notes),
        callbacks=callbacks,
        prepared=prepared,
    )


def _callbacks(job: Job) -> tuple[Callback, ...]:
    """
    Raises:
        ConfigError: one is none, or the package of a tracker is not installed.
    """
    with job_code("callbacks()"):
        found = tuple(job.callbacks())
    for one in found:
        if not isinstance(one, Callback):
            kind = f"the class {one.__name__}" if isinstance(one, type) else f"a {type(one).__name__}"
            raise ConfigError(f"callbacks() returned {kind}; give instances of classes derived from elastic.Callback")
    return found


def started_with(run: PreparedRun) -> dict[str, Any]:
    """Return what callbacks receive when a run begins: JSON values, without secrets in URLs."""
    options = {**cfg.result_options(run.config, job_options(run.job)), **_operational(run.config)}
    return {
        "run": run.name,
        "folder": redact(run.folder.storage.url),
        "total_steps": run.plan.total_steps,
        "options": options,
    }


def _long_warmup(config: TrainConfig, plan: RunPlan) -> str:
    return (
        f"--optim.warmup is {config.optim.warmup!r}, {plan.warmup_steps} steps, more than the {plan.total_steps} of "
        f"--run.duration {config.run.duration}: the full learning rate is never reached"
    )


def stored_config(folder: RunFolder) -> dict[str, Any] | None:
    """The stored configuration of a run that was started before, None if it was not.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return folder.config()
    except ConfigError:
        raise
    except Exception as error:  # file systems raise all kinds of exceptions; the user gets one sentence
        raise folder.storage.refusal("read", error) from error


def open_run(run: PreparedRun) -> int:
    """Probe the storage, claim the run and write its configuration.

    If result options changed, the stored configuration stays until the run has trained with the new ones
    (`new_config`): with those it may fail to load its state, and must then be able to go on as before.

    Returns:
        the claim's epoch.
    """
    run.folder.storage.probe()
    epoch = run.folder.claim(take_over=run.config.run.take_over)
    try:
        if not run.changed:
            run.folder.write_config(_config_values(run))
    except BaseException:
        run.folder.release(epoch)
        raise
    return epoch


def new_config(run: PreparedRun) -> dict[str, Any] | None:
    """The configuration to store after the first step of this claim, None if it is stored already."""
    return _config_values(run) if run.changed else None


def _config_values(run: PreparedRun) -> dict[str, Any]:
    options = {k: describe(v, f"--job.{k}") for k, v in job_options(run.job).items()}
    return {
        CODED: 1,
        "job": {"name": job_name(run.job), "class": type(run.job).__qualname__, "options": options},
        "config": cfg.to_dict(run.config),
        "result": cfg.result_options(run.config, job_options(run.job)),
        "digest": run.digest,
        "data": {"samples": run.plan.dataset_size},
        **({"phases": list(run.plan.phases)} if run.plan.phases else {}),
        "source": run.source,
        **({} if run.defaults is None else {"defaults": described_defaults(type(run.job), run.defaults)}),
    }


def git_commit() -> str | None:
    """The commit of the working directory, with `+` if files were changed; None outside of git."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def dry_run(run: PreparedRun) -> str:
    """Test the storage without leaving anything there; returns what `--dry-run` prints.

    Raises:
        ConfigError: the storage cannot be used.
    """
    run.folder.storage.try_out()
    return report(run)


def report(run: PreparedRun) -> str:
    """The resolved options, rounds and efficiency of each world size, and the memory that snapshots take."""
    values = {**cfg.result_options(run.config, job_options(run.job)), **_operational(run.config)}
    lines = [f"run {run.name} in {redact(run.folder.storage.url)}", *run.notes, ""]
    lines += [f"  {typed(name, value)}" for name, value in sorted(values.items()) if value is not None and value != []]
    plan, most, cell_size = run.plan, run.config.scaling.max_workers, run.config.parallel.tensor
    lines += [
        "",
        f"{'a stream' if plan.dataset_size >= ENDLESS else f'{plan.dataset_size} samples'}, {plan.total_steps} steps"
        + (f" of the phases {', '.join(plan.phases)} in turn" if plan.phases else ""),
        first_line(run),
    ]
    lines += ["", "workers  rounds  efficiency"]
    table = batch_table(plan.microbatches, most, cell_size, run.config.parallel.stages)
    lines += [f"{w:>7}  {rounds:>6}  {share:>9.0%}" for w, rounds, share in table]
    lines += forecast.lines(run)
    lines += settings_lines(run.config.scaling.accelerator)
    return "\n".join(lines)


def first_line(run: PreparedRun) -> str:
    """How a global batch is divided over the most workers, as consoles show it first."""
    plan, scaling, cell_size = run.plan, run.config.scaling, run.config.parallel.tensor
    stages = run.config.parallel.stages
    return batch_line(plan.global_size, plan.microbatches, scaling.max_workers, cell_size, scaling.spares, stages)


def typed(name: str, value: Any) -> str:
    """A coded option as one would type it."""
    if isinstance(value, bool):
        section, _, leaf = name.rpartition(".")
        return f"--{section}.{leaf if value else 'no-' + leaf}"
    return f"--{name} {show(value) if isinstance(value, dict) and TAG in value else value}"


def _operational(config: TrainConfig) -> dict[str, Any]:
    found = {}
    for part, section in cfg.to_dict(config).items():
        if isinstance(section, dict):
            found.update({f"{part}.{name}".replace("_", "-"): value for name, value in section.items()})
    return clean(found)
