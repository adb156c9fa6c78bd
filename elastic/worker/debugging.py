"""`--debug`: one worker, in this process and on its main thread, so that breakpoints, prints and a profiler work."""

from __future__ import annotations

import platform
from dataclasses import replace
from typing import Any

from elastic.config import ParallelOptions, RecoveryOptions, TrainConfig
from elastic.errors import Interrupted
from elastic.membership.protocol import Close
from elastic.observe.console import Console, result_text
from elastic.run.prepare import PreparedRun
from elastic.worker.local import LOOPBACK, LocalRun
from elastic.worker.run import Identity, WorkerRun

LONG = "100h"  # a worker at a breakpoint must not count as hung
END_S = 600.0  # for the last save to be committed


def drive_here(run: PreparedRun) -> int:
    """Train as `--debug` does after validation, and print where the results are; returns the exit code.

    Raises:
        ElasticError: as `run_here`.
    """
    console = Console(run.plan.total_steps, run.config.observe.log_every, live=False, quiet=run.config.observe.quiet)
    if run.finished is None:
        console.print(f"run {run.name} -> {run.folder.storage.url}")
        for note in run.notes:
            console.print(note)
        console.print(
            "one worker, in this process; an error ends the run, and nobody waits for who sits at a breakpoint"
        )
    print(result_text(run.finished or run_here(run, console), run.folder.storage.url))
    return 0


def run_here(run: PreparedRun, console: Console) -> dict[str, Any]:
    """Train in this process, to the end or to the requested pause; returns the contents of result.json.

    Raises:
        RunFailed: the run ended without finishing. An error of the job's code is not replayed.
        Interrupted: by Ctrl-C; progress since the last checkpoint is lost.
    """
    run = replace(run, config=_patient(run.config), plan=replace(run.plan, snapshot_every=None))
    with LocalRun(run, 0, expects=1, on_record=console.record) as local:
        from elastic.worker.alone import be_alone
        from elastic.worker.session import Session

        back = be_alone(run.job)
        identity = Identity(local.worker_id(0), platform.node(), 0, LOOPBACK, _accelerator(run.config))
        where = (run.folder.storage.url, local.url, local.token)
        here = WorkerRun(run.job, run.config, run.plan, run.digest, *where, prepared=run.prepared)
        try:
            Session(here, identity).run()
        except KeyboardInterrupt:
            local.link.request(Close("stopped", "interrupted, nothing saved since the newest checkpoint"))
            raise Interrupted(f"run {run.name} was interrupted, and nothing was saved for it") from None
        finally:
            back()
        return local.drive.result(END_S)


def _patient(config: TrainConfig) -> TrainConfig:
    """The same run with one worker, which may pause for as long as it likes."""
    return replace(
        config,
        run=replace(config.run, max_failures=0),
        data=replace(config.data, workers=0),
        scaling=replace(config.scaling, min_workers=1, spares=0),
        parallel=ParallelOptions(
            blocks=config.parallel.blocks,
            activation_checkpointing=config.parallel.activation_checkpointing,
            compile=config.parallel.compile,
            find_unused=config.parallel.find_unused,
        ),
        recovery=RecoveryOptions(hang_timeout=LONG, lease=LONG),
    )


def _accelerator(config: TrainConfig) -> str:
    if config.scaling.accelerator != "auto":
        return config.scaling.accelerator
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"
