"""The checks of a sweep before anything starts. Imports neither Ray nor torch."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, replace

from elastic.config import TrainConfig, check_kind
from elastic.data.preparing import prepare_here
from elastic.errors import ConfigError
from elastic.job import Job, check_job, job_name
from elastic.job_data import held_out_sizes, training_data
from elastic.run.plan import resolve
from elastic.run.resuming import changes
from elastic.storage import Storage
from elastic.sweep.config import SweepConfig
from elastic.sweep.folder import SweepFolder
from elastic.sweep.judge import options_text, rule_of
from elastic.sweep.space import Options, apply, check_names, draw
from elastic.sweep.suggest import suggester
from elastic.values import show


@dataclass(frozen=True)
class PreparedSweep:
    """A validated sweep. `total` is the number of evaluations of a trial; `examples` are the first trials' options."""

    job: Job
    config: TrainConfig
    sweep: SweepConfig
    folder: SweepFolder
    total: int
    examples: list[Options]
    finished: bool

    @property
    def name(self) -> str:
        assert self.sweep.name is not None
        return self.sweep.name


def prepare_sweep(job: Job, config: TrainConfig, sweep: SweepConfig) -> PreparedSweep:
    """Validate a sweep. Writes nothing.

    Raises:
        ConfigError: with one sentence.
    """
    check_job(job)
    check_kind(config)
    if config.run.name is not None:
        raise ConfigError(f"--run.name is {config.run.name!r}, but the runs of a sweep are named by --sweep.name")
    if config.run.stop_after is not None:
        raise ConfigError(
            f"--run.stop-after is {config.run.stop_after!r}; give a sweep --time-budget or --stop instead"
        )
    prepare_here(job, config)
    if not held_out_sizes(job):
        raise ConfigError(f"--metric is {sweep.metric!r}, but eval_data() of this job is None; give it held-out data")
    if config.eval.every is None and (sweep.scheduler != "none" or sweep.stop):
        what = f"--scheduler {sweep.scheduler}" if sweep.scheduler != "none" else "--stop"
        raise ConfigError(f"--eval.every is left out, but {what} needs evaluations; give it, for example 1ep")
    if sweep.cost_budget is not None and not config.observe.price:
        raise ConfigError(f"--cost-budget is {sweep.cost_budget:g}, but nothing has a price; give --observe.price")
    check_names(sweep.space, job, config)
    if sweep.name is None:
        name = f"{job_name(job)}-sweep-{time.strftime('%Y%m%d')}-{secrets.token_hex(2)}"
        sweep = replace(sweep, name=name)
    if len(str(sweep.name)) > 90:
        raise ConfigError(f"--sweep.name is {sweep.name!r}; give at most 90 letters, to which trials add their number")
    suggester(sweep)  # raises if its package is not installed
    number = sweep.total if sweep.searcher == "random" else 0
    examples = [draw(sweep.space, sweep.seed, n) for n in range(number)]
    total = _evaluations(job, config, sweep, examples)
    gates = rule_of(sweep, total).first(0) if sweep.scheduler != "none" else 0
    if gates >= total > 0 and sweep.scheduler in ("asha", "pbt"):
        option = "--grace-period" if sweep.scheduler == "asha" else "--perturbation-interval"
        raise ConfigError(
            f"{option} is {gates}, but a trial has {total} evaluations, so that none would be compared; give "
            "less, or evaluate more often with --eval.every"
        )
    folder = SweepFolder(Storage(config.run.storage).child(str(sweep.name)))
    finished = _compare(folder, job, config, sweep)
    return PreparedSweep(job, config, sweep, folder, total, examples, finished)


def _evaluations(job: Job, config: TrainConfig, sweep: SweepConfig, examples: list[Options]) -> int:
    """Try every trial that is known, or both ends of each domain; returns the number of evaluations of a trial.

    Raises:
        ConfigError: a trial is impossible, or trials have different numbers of evaluations.
    """
    _, size = training_data(job)
    begin = draw(sweep.space, sweep.seed, 0)
    ends = [{**begin, name: value} for name, domain in sweep.space.items() for value in domain.examples]
    found: dict[int, Options] = {}
    for options in [*examples, *([] if examples else ends)]:
        try:
            tried, its_config = apply(options, job, config)
            plan = resolve(its_config, dataset_size=size, tokens_per_sample=tried.tokens_per_sample)
        except ConfigError as error:
            raise ConfigError(f"a trial would have {options_text(options)}: {error}") from None
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"a trial would have {options_text(options)}: {type(error).__name__}: {error}") from None
        every = plan.eval_every or plan.total_steps
        found.setdefault((plan.total_steps - 1) // every + 1, options)
    if len(found) > 1 and sweep.scheduler != "none":
        (one, first), (other, second) = list(found.items())[:2]
        raise ConfigError(
            f"--scheduler {sweep.scheduler} compares trials by their evaluations, but {options_text(first)} has {one} "
            f"and {options_text(second)} has {other}; give --run.duration and --eval.every in units that make them "
            "equal"
        )
    return max(found)


def _compare(folder: SweepFolder, job: Job, config: TrainConfig, sweep: SweepConfig) -> bool:
    """Whether this sweep was finished before.

    Raises:
        ConfigError: it was started with other options.
    """
    stored = folder.stored()
    if stored is None:
        return False
    for name, value in sweep.fixed().items():
        if stored["fixed"].get(name) != value:
            option = {"seed": "--sweep.seed"}.get(name, f"--{name}")
            raise ConfigError(
                f"{option} is {value!r}, but sweep {sweep.name} was started with {stored['fixed'].get(name)!r}; give "
                "that, or another --sweep.name"
            )
    for name, (was, now) in changes(stored, config, job).items():
        if name not in sweep.space:
            raise ConfigError(
                f"--{name} is {show(now)}, but sweep {sweep.name} was started with {show(was)}; give that, or another "
                "--sweep.name"
            )
    return str(stored["status"]) == "finished"


def trial_table(prepared: PreparedSweep) -> str:
    """The text that `--dry-run` prints: all trials that are known before the start."""
    from elastic.tools.text import table

    sweep = prepared.sweep
    names = list(sweep.space)
    rows = [(f"{n:04d}", *(options[name] for name in names)) for n, options in enumerate(prepared.examples)]
    lines = [
        f"sweep {prepared.name}: {sweep.total} trials of {prepared.total} evaluations; {sweep.searcher}, "
        f"{sweep.scheduler}",
        "",
    ]
    lines += [f"  --search {name}={domain}" for name, domain in sweep.space.items()]
    lines += ["", table(("trial", *names), rows, ",".join(names))] if rows else ["", "trials are suggested one by one"]
    return "\n".join(lines)
