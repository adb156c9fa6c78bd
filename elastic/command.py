"""The last line of a job file: `elastic.main(MyJob, config)`."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from elastic.config import TrainConfig, check_kind
from elastic.errors import ElasticError, error_text
from elastic.job import Job, check_job_class
from elastic.job_file import answer
from elastic.observe.streams import sturdy_output

if TYPE_CHECKING:
    from elastic.cluster.forking import Forking


def main(job_class: type[Job], config: TrainConfig | None = None, argv: Sequence[str] | None = None) -> None:
    """Read the command line, train, and end the process with the run's exit code.

    Args:
        config: defaults of this job, which the command line overrides.
        argv: the command line without the program's name; the default is that of the process.
    """
    answer(job_class, config or TrainConfig())
    with sturdy_output():
        code = run(job_class, config or TrainConfig(), sys.argv[1:] if argv is None else argv)
    gc.freeze()  # else Python looks through all objects of torch and Ray when it ends, which takes half a second
    raise SystemExit(code)


def run(job_class: type[Job], config: TrainConfig, argv: Sequence[str]) -> int:
    """Like `main`, but returns the exit code: 0 finished or paused, 1 failed, 2 bad input, 130 interrupted."""
    from elastic.run.line import prepare_line

    with ExitStack() as ending:
        forking: list[Forking] = []

        def begin(given: TrainConfig) -> None:
            if given.dry_run or given.debug:
                return
            from elastic.cluster.standing import serve_early

            named = given.cluster.address or os.environ.get("RAY_ADDRESS")
            running = given.cluster.local_nodes is None and serve_early(named, given.cluster.keep_warm)
            if not named and not running:
                from elastic.cluster.forking import Forking

                forking.append(ending.enter_context(Forking()))

        try:
            check_job_class(job_class)
            check_kind(config)
            prepared = prepare_line(job_class, config, argv, begin)
            if prepared.config.dry_run:
                from elastic.run.prepare import dry_run

                print(dry_run(prepared))
                return 0
            if prepared.config.debug:
                from elastic.worker.debugging import drive_here

                return drive_here(prepared)
            from elastic.cluster.trainer import drive

            return drive(prepared, *forking)
        except ElasticError as error:
            print(error_text(error), file=sys.stderr)
            return error.exit_code
