"""The command line of a sweep: its own options, and all options of the job."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from elastic.config import TrainConfig
from elastic.errors import ConfigError, ElasticError, error_text
from elastic.job import Job
from elastic.job_file import load_job
from elastic.observe.streams import sturdy_output
from elastic.option_file import expand
from elastic.sweep.config import SCHEDULERS, SEARCHERS, SweepConfig
from elastic.sweep.space import KINDS, parse_search


def parser(program: str | None = None) -> argparse.ArgumentParser:
    """The options of the sweep itself."""
    own = argparse.ArgumentParser(
        prog=program,
        allow_abbrev=False,
        usage="%(prog)s JOB --search NAME=KIND(values) ... [options of the job]",
        description="Search for the options of a job. All options of the job may be given too, for every trial.",
    )
    add = own.add_argument
    add("--job", metavar="JOB", help="its file or module: job.py, jobs.codegpt, or job.py:MyJob; also without --job")
    kinds = f"{', '.join(KINDS)}; NAME without dashes in front"
    add("--search", action="append", default=[], metavar="NAME=KIND(values)", help=f"an option to search: {kinds}")
    add("--metric", default="eval/loss", help="what is compared (default eval/loss)")
    add("--mode", choices=("min", "max"), default="min", help="whether less or more is better (default min)")
    add("--trials", type=int, help="how many (default 10); with grids of each combination (default 1)")
    add("--scheduler", choices=SCHEDULERS, default="none", help="how trials are cut short (default none)")
    add("--searcher", choices=SEARCHERS, default="random", help="how options are chosen (default random)")
    add("--grace-period", type=int, default=1, metavar="N", help="evaluations that every trial is given (default 1)")
    add("--reduction-factor", type=int, default=3, metavar="N", help="one of so many goes on at a rung (default 3)")
    add("--perturbation-interval", type=int, default=1, metavar="N", help="pbt: evaluations between two looks")
    add("--quantile", type=float, default=0.25, metavar="SHARE", help="pbt: the part that is replaced")
    add("--resample", type=float, default=0.25, metavar="SHARE", help="pbt: the part of options that is drawn anew")
    add("--tpe-batch", type=int, default=4, metavar="N", help="tpe: trials suggested from the same results")
    add("--stop", action="append", default=[], metavar="METRIC>=VALUE", help="end a trial that is good enough")
    add("--max-concurrent", type=int, metavar="N", help="trials at a time (default: what the cluster has room for)")
    add("--time-budget", metavar="TIME", help="end the sweep after this long (s, min, h)")
    add("--cost-budget", type=float, metavar="COST", help="end the sweep when it has cost this, by --observe.price")
    add("--sweep.name", dest="name", metavar="NAME", help="name of the sweep; an explicit name goes on with it")
    add("--sweep.seed", dest="seed", type=int, default=0, metavar="N", help="seed of all that is drawn (default 0)")
    add("--no-plots", dest="plots", action="store_false", help="write no PNGs")
    add("--take-over", action="store_true", help="go on with a sweep although another driver seems alive")
    return own


def parse(argv: Sequence[str], program: str | None = None) -> tuple[Job, TrainConfig, SweepConfig]:
    """Read a command line.

    Raises:
        ConfigError: a value is wrong.
        SystemExit: help was asked for (0), or the line cannot be read (2).
    """
    own = parser(program)
    if "--help-all" not in argv and {"--help", "-h"} & set(argv):
        own.print_help()
        print("\noptions of the job: with JOB --help-all")
        raise SystemExit(0)
    line = ["--job", *argv] if argv and not argv[0].startswith("-") else list(argv)
    found, rest = own.parse_known_args(expand(line)[0])
    if found.job is None:
        raise ConfigError("no job is given; give its file or module, such as job.py or jobs.codegpt")
    job_class, defaults = load_job(found.job)
    from elastic.options import parse as parse_job

    job, config = parse_job(job_class, defaults, rest)
    given: dict[str, Any] = {k: v for k, v in vars(found).items() if k not in ("job", "search", "tpe_batch", "stop")}
    sweep = SweepConfig(search=parse_search(found.search), batch=found.tpe_batch, stop=tuple(found.stop), **given)
    return job, config, sweep


def run(argv: Sequence[str], program: str | None = None) -> int:
    """Like `main`, but returns the exit code: 0 done, 1 no trial finished, 2 bad input, 130 interrupted."""
    try:
        job, config, sweep = parse(argv, program)
        from elastic.sweep.prepare import prepare_sweep, trial_table

        prepared = prepare_sweep(job, config, sweep)
        if config.dry_run:
            print(trial_table(prepared))
            return 0
        from elastic.sweep.driver import drive

        return drive(prepared)
    except ElasticError as error:
        print(error_text(error), file=sys.stderr)
        return error.exit_code


def main(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Read the command line, run the sweep, and end the process with its exit code."""
    with sturdy_output():
        code = run(sys.argv[1:] if argv is None else argv, program)
    raise SystemExit(code)
