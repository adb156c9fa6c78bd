"""`python -m elastic.worker`: a run in plain processes, or (`--child`) one of its workers."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from typing import Any

from elastic.child import end_with_input, ignore_terminal, raise_descriptor_limit, show_stack_at_death
from elastic.config import ClusterOptions, TrainConfig, from_dict
from elastic.errors import ConfigError, ElasticError, error_text
from elastic.garbage import importing
from elastic.job_code import job_code
from elastic.job_file import load_job
from elastic.job_options import with_options
from elastic.observe.streams import keep_output_sturdy, sturdy_output
from elastic.run.plan import RunPlan
from elastic.worker.spool import take_output


def _child() -> int:
    ignore_terminal()
    show_stack_at_death()
    specification: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    take_output(specification["output"])
    end_with_input()
    raise_descriptor_limit()
    keep_output_sturdy()
    with importing():
        from elastic.seeds import seed_job
        from elastic.worker.alone import be_alone
        from elastic.worker.run import Identity, WorkerRun
        from elastic.worker.session import Session

    worker, module = specification["identity"]["id"], specification["module"]
    be_alone()
    seed_job()
    try:
        with job_code(f"worker {worker}: importing {module} and making its job"):
            job = with_options(_attribute(module, specification["class"]), specification["job_options"])
    except ElasticError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    run = WorkerRun(
        job,
        from_dict(specification["config"]),
        RunPlan(**specification["plan"]),
        specification["digest"],
        specification["folder_url"],
        specification["server_url"],
        specification["token"],
        specification["prepared"],
    )
    try:
        Session(run, Identity(**specification["identity"])).run()
    except ElasticError as error:  # the ledger has the whole text
        print(f"worker {worker}: {str(error).splitlines()[0]}", file=sys.stderr)
        return error.exit_code
    return 0


def _attribute(module: str, path: str) -> Any:
    found: Any = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def main() -> int:
    if "--child" in sys.argv:
        return _child()
    with sturdy_output():
        return _run()


def _run() -> int:
    parser = argparse.ArgumentParser(prog="python -m elastic.worker", description=__doc__, add_help=False)
    parser.add_argument("--module", required=True, help="module of the job, for example jobs.digits")
    parser.add_argument("--class", dest="class_name", help="name of the job's class, where there are several")
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    if {"-h", "--help"} & set(sys.argv[1:]) and "--module" not in sys.argv:
        parser.print_help()
        print("\nwith --module MODULE --help: the options of the job")
        return 0
    known, rest = parser.parse_known_args()
    from elastic.observe.console import Console, result_text
    from elastic.run.forecast import refuse_what_does_not_fit_here
    from elastic.run.line import prepare_line
    from elastic.run.prepare import dry_run
    from elastic.worker.local import run_local

    try:
        _check_workers(known.workers)
        name = known.module if known.class_name is None else f"{known.module}:{known.class_name}"
        run = prepare_line(*load_job(name, "--module"), rest)
        _refuse_what_has_no_meaning(run.config)
        if run.config.dry_run:
            print(dry_run(run))
            refuse_what_does_not_fit_here(run)
            return 0
        if run.config.debug:
            from elastic.worker.debugging import drive_here

            return drive_here(run)
        result = run.finished
        if result is None:
            console = Console(run.plan.total_steps, run.config.observe.log_every, quiet=run.config.observe.quiet)
            for note in run.notes:
                console.print(note)
            if known.workers > run.config.scaling.max_workers:
                most = run.config.scaling.max_workers
                console.print(
                    f"{most} of {known.workers} workers train, as --scaling.max-workers says; the others wait"
                )
            accelerator = "gpu" if run.config.scaling.accelerator == "gpu" else "cpu"
            try:
                result = run_local(
                    run,
                    known.workers,
                    on_record=console.record,
                    print_line=console.print,
                    timeout_s=1e9,
                    accelerator=accelerator,
                )
            finally:
                console.close()
    except ElasticError as error:
        print(error_text(error), file=sys.stderr)
        return error.exit_code
    print(result_text(result, run.folder.storage.url))
    return 0


def _check_workers(workers: int) -> None:
    if not 1 <= workers <= 1024:
        raise ConfigError(f"--workers is {workers}; give a number of processes from 1 to 1024")


def _refuse_what_has_no_meaning(config: TrainConfig) -> None:
    """Refuse options that mean nothing in plain processes: cluster options, and GPUs on a machine without one."""
    if config.cluster != ClusterOptions():
        raise ConfigError("--cluster.address and --cluster.local-nodes are for runs on Ray; leave them out here")
    if config.scaling.accelerator == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--scaling.accelerator is 'gpu', but torch finds no GPU on this machine; give cpu")


if __name__ == "__main__":
    raise SystemExit(main())
