"""`ElasticTrainer(job, config).fit()`: a run on a Ray cluster, driven from this process."""

from __future__ import annotations

import io
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from elastic.cluster.control import RunControl
from elastic.cluster.forking import Forking
from elastic.config import TrainConfig
from elastic.errors import ConfigError, ElasticError, error_text
from elastic.job import Job
from elastic.job_file import answer
from elastic.observe.console import Console, result_text
from elastic.run.forecast import refuse_what_does_not_fit_here
from elastic.run.prepare import UNSAVED, PreparedRun, first_line, open_run, prepare


@dataclass(frozen=True)
class Result:
    """How a run ended: the contents of its result.json."""

    status: str
    steps: int
    loss: float | None
    metrics: dict[str, float]
    weights_sha256: str | None
    folder: str
    values: dict[str, Any] = field(repr=False, default_factory=dict)


class ElasticTrainer:
    """Trains a job on a Ray cluster.

    Args:
        job: an instance of the user's `Job`.
        config: the options.

    Raises:
        ConfigError: the job and the options cannot make a run.
    """

    def __init__(self, job: Job, config: TrainConfig | None = None):
        answer(type(job), config or TrainConfig())
        self._prepared = prepare(job, config or TrainConfig())

    def fit(self) -> Result:
        """Train to the end, or to the pause that was asked for.

        Raises:
            ConfigError: bad input found before anything started.
            RunFailed: the run ended without finishing.
            Interrupted: a signal stopped it; the state is saved.
        """
        values = run_prepared(self._prepared)
        return _result(self._prepared, values)


def _result(run: PreparedRun, values: dict[str, Any]) -> Result:
    return Result(
        values["status"],
        values["steps"],
        values.get("loss"),
        values.get("metrics", {}),
        values.get("weights_sha256"),
        run.folder.storage.url,
        values,
    )


def drive(run: PreparedRun, forking: Forking | None = None) -> int:
    """Train as a job's command does after validation, and print where the results are; returns the exit code."""
    try:
        values = run_prepared(run, forking=forking)
    except ElasticError as error:
        print(error_text(error), file=sys.stderr)
        return error.exit_code
    print(result_text(values, run.folder.storage.url))
    return 0


def run_prepared(run: PreparedRun, control: RunControl | None = None, forking: Forking | None = None) -> dict[str, Any]:
    """Run to the end; returns the contents of result.json. It raises what `ElasticTrainer.fit` raises.

    Args:
        forking: of the workers of an embedded cluster, if it was started before.
        control: held by another thread of this process, which has many runs one after another. With it nothing is
            printed, and the run's host is in this process too, since the run could not outlive it anyway.
    """
    if run.finished is not None:
        return run.finished
    _check_picklable(run.job)
    plan, config = run.plan, run.config
    out = None if control is None else _Silence()
    console = Console(plan.total_steps, config.observe.log_every, out, quiet=config.observe.quiet)
    console.print(f"run {run.name} -> {run.folder.storage.url}")
    for note in run.notes:
        console.print(note)
    console.print(first_line(run))
    if config.checkpoint.every is None:
        console.print(UNSAVED)
    from elastic.cluster.driving import drive_on_ray
    from elastic.cluster.embedded import connected, is_embedded, preflight, where_text

    began = time.monotonic()
    try:
        address = preflight(config.cluster, config.scaling)
        console.print(where_text(address))
        if is_embedded(address):
            refuse_what_does_not_fit_here(run)
        epoch = open_run(run)
        try:
            with connected(config.cluster, config.scaling, address, forking):
                return drive_on_ray(run, epoch, console, control, time.monotonic() - began)
        finally:
            run.folder.release(epoch)
    finally:
        console.close()


def _check_picklable(job: Job) -> None:
    import cloudpickle

    try:
        cloudpickle.dumps(job)
    except Exception as error:  # any error of the object: it cannot be sent to the workers
        raise ConfigError(
            f"job {type(job).__name__} cannot be pickled to be sent to workers ({type(error).__name__}: {error}); "
            "make such objects inside its methods, not in its fields"
        ) from error


class _Silence(io.StringIO):
    """Drops what is written to it."""

    def write(self, text: str) -> int:
        return len(text)
