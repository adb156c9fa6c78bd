"""`elastic evaluate RUN --job FILE`: evaluates a run's checkpoint on held-out data, in this process."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from elastic.config import TrainConfig, from_dict
from elastic.data.preparing import prepare_here
from elastic.errors import ConfigError, ElasticError
from elastic.job import Job
from elastic.job_code import job_code
from elastic.job_data import eval_sets
from elastic.loading import load_state, stored_run, tell_plan
from elastic.options import parse
from elastic.parallel.device import pick_device, prepare_process
from elastic.run.plan import evaluation_size
from elastic.run.resuming import take
from elastic.seeds import derive, seed_all
from elastic.tools.target import open_run
from elastic.worker.evaluate import evaluate
from elastic.worker.user_code import UserCode, UserCodeError


def evaluate_run(
    job_class: type[Job],
    defaults: TrainConfig,
    url: str,
    argv: Sequence[str] = (),
    *,
    step: int | None = None,
    accelerator: str = "cpu",
) -> dict[str, Any]:
    """Evaluate a checkpoint of a run as the run itself would: the same passes, seeds and number formats.

    Args:
        defaults: the configuration in the job's file.
        argv: options of the job (`--job.x`) that are to differ from the run's, such as the data it takes.
        step: step of the checkpoint; the newest by default.
        accelerator: cpu or gpu.

    Returns:
        `step`, and `eval/...` by name.

    Raises:
        ConfigError: there is no such run, checkpoint or option, or the job holds no data out.
        CheckpointError: the checkpoint is damaged, or the job has another state.
        ElasticError: the job's code raised an exception.
    """
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError("--accelerator is 'gpu', but torch finds no GPU here; give cpu")
    folder = open_run(url, read_only=True)
    stored = stored_run(folder)
    config, seed = from_dict(stored["config"]), stored["config"]["run"]["seed"]
    prepare_process(bitwise=config.run.exactness == "bitwise", threads=config.scaling.cpus_per_worker)
    device = pick_device(accelerator, 0)
    other = [word for word in argv if word.startswith("--") and not word.startswith("--job.")]
    if other:
        raise ConfigError(f"{other[0]} is no option of the job; --job.... alone can be others than the run's here")
    job, _ = parse(job_class, defaults, argv, take(stored, defaults, job_class).job_values)
    tell_plan(job, stored)
    prepare_here(job, config)
    seed_all(derive("data", seed))
    with job_code("train_data()"):
        job.train_data()  # some jobs split one set here into training data and held-out data
    seed_all(derive("data", seed))
    with job_code("eval_data()"):
        held_out = eval_sets(job)
    if not held_out:
        raise ConfigError("eval_data() returns None, so nothing is held out; give a job that has some")
    state, at = load_state(job, config, folder, step, device)
    code = UserCode(job, device, "evaluate", autocast=config.precision.autocast)
    code.doing(f"the evaluation after step {at}", at - 1)
    size = evaluation_size(config.batch.global_size, config.batch.microbatches or 1, config.eval.batch_size)
    found: dict[str, Any] = {"step": at}
    try:
        for name, data in held_out.items():
            found |= evaluate(
                job, state.model, name, data, None, code, size=size, seed=seed, device=device, each=nullcontext
            )
    except UserCodeError as error:
        raise ElasticError(str(error)) from error
    return found


def run(arguments: argparse.Namespace) -> int:
    """Carry out the verb; returns the exit code."""
    from elastic.job_file import load_job
    from elastic.observe.console import eval_text
    from elastic.tools.text import show

    found = evaluate_run(
        *load_job(arguments.job), arguments.url, arguments.rest, step=arguments.step, accelerator=arguments.accelerator
    )
    show(arguments, found, lambda: eval_text(found))
    return 0
