"""The verbs of `elastic` for live runs: runs, status, logs, stacks, stop, scale, drain, checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from elastic.errors import ConfigError
from elastic.redact import printable
from elastic.tools.places import USUAL, find_run
from elastic.tools.text import show


def add_control(verbs: Any) -> None:
    """Add the verbs; each sets `run`, which takes the arguments and returns the exit code."""

    def add(
        name: str, run: Callable[[argparse.Namespace], int], text: str, *, waits: bool = True
    ) -> argparse.ArgumentParser:
        parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        what = "folder or URL of runs" if run is _runs else "folder or URL of a run, such as runs/mine or s3://bucket/m"
        if run is _runs:
            parser.add_argument("url", metavar="URL", nargs="?", default=USUAL, help=f"{what} (default {USUAL})")
        else:
            parser.add_argument("url", metavar="RUN", type=find_run, help=f"{what}, or its name in {USUAL}")
        parser.add_argument("--json", action="store_true", help="print JSON")
        if waits:
            parser.add_argument("--timeout", default="10min", metavar="TIME", help="wait this long (default 10min)")
        parser.set_defaults(run=run)
        return parser

    parser = add("runs", _runs, "list runs with their status; lost is one whose heartbeat stopped", waits=False)
    parser.add_argument("--status", default="", metavar="A,B", help="only runs with one of these, such as running,lost")
    parser.add_argument("--job", default="*", metavar="PATTERN", help="only runs of such jobs")
    parser.add_argument("--exit-code", action="store_true", help="exit with 1 if there is any, for scripts and cron")
    parser.add_argument("--name", default="*", metavar="PATTERN", help="only runs of such names")
    orders = ("name", "status", "step", "heartbeat", "size", "cost")
    parser.add_argument("--sort", choices=orders, default="name", help="in this order (default name)")
    parser.add_argument("--watch", action="store_true", help="show them again and again, until Ctrl-C")
    parser = add("status", _status, "show a run: its world, workers, newest rows and events", waits=False)
    parser.add_argument("--last", type=int, default=5, metavar="N", help="rows and events to show (default 5)")
    parser = add("logs", _logs, "show what the workers of a run printed, also those that died", waits=False)
    parser.add_argument("worker", metavar="WORKER", nargs="?", help="its id, or the beginning of it (default all)")
    parser.add_argument("--last", type=int, metavar="N", help="only the newest lines of each (default all)")
    parser.add_argument("--follow", action="store_true", help="go on as more is printed, until the run ends")
    parser = add("stacks", _stacks, "show where each worker of a live run is: the stacks of its threads", waits=False)
    parser.add_argument("worker", metavar="WORKER", nargs="?", help="its id, or the beginning of it (default all)")
    add("stop", _stop, "save a live run and end it, at its next step boundary")
    parser = add("scale", _scale, "give a live run another number of workers; no step is lost")
    parser.add_argument("--max-workers", type=int, required=True, metavar="N", help="most workers from now on")
    parser = add("drain", _drain, "have one worker of a live run hand over and end; another is asked for in its place")
    parser.add_argument("worker", metavar="WORKER", help="its id, or the beginning of it, as elastic status shows it")
    parser.add_argument(
        "--deadline", default="0s", metavar="TIME", help="wait so long for another to take its place (default 0s)"
    )
    add("checkpoint", _checkpoint, "save a live run at its next step boundary, and wait until that is committed")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _runs(arguments: argparse.Namespace) -> int:
    from elastic.tools.registry import ORDERS, list_runs

    states = [s.strip() for s in arguments.status.split(",") if s.strip()]

    def look() -> list[Any]:
        sizes = True if arguments.sort in ("size", "cost") else None
        found = list_runs(arguments.url, states=states, job=arguments.job, name=arguments.name, sizes=sizes)
        return sorted(found, key=ORDERS[arguments.sort])

    if arguments.watch:
        if arguments.json or not sys.stdout.isatty():
            raise ConfigError("--watch is for a terminal; leave it out, or ask again and again with --json")
        from elastic.tools.progress import redrawn

        redrawn(lambda: _runs_text(look(), arguments.url))
        return 0
    found = look()
    show(arguments, {"runs": [asdict(r) for r in found]}, lambda: _runs_text(found, arguments.url))
    return 1 if arguments.exit_code and found else 0


def _runs_text(found: Sequence[Any], url: str) -> str:
    from elastic.tools.text import age_text, size_text, table

    if not found:
        return f"no such run in {url}"
    priced = any(r.cost is not None for r in found)
    rows = [
        (
            r.name,
            r.status,
            r.job,
            f"{r.step}/{r.total_steps}" if r.total_steps else "",
            r.workers if r.workers and r.status in ("running", "parked") else "",
            "" if r.age_s is None else age_text(r.age_s),
            "" if r.bytes is None else size_text(r.bytes),
            *(("" if r.cost is None else f"{r.cost:.4g}",) if priced else ()),
            r.owner or r.problem,
        )
        for r in found
    ]
    head = ("run", "status", "job", "step", "workers", "heartbeat", "disk", *(("cost",) if priced else ()), "owner")
    return table(head, rows, "step,workers,heartbeat,disk,cost")


def _status(arguments: argparse.Namespace) -> int:
    from elastic.tools.looking import foreign_is_named
    from elastic.tools.registry import look_at_run, text_of
    from elastic.tools.target import open_run

    if arguments.last < 0:
        raise ConfigError(f"--last is {arguments.last}; give 0 or more")
    folder = open_run(arguments.url, read_only=True)
    with foreign_is_named(arguments.url):
        found = look_at_run(folder, last=arguments.last)
        show(arguments, found, lambda: text_of(found))
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from elastic.tools.logs import follow_logs, logs_text, read_logs
    from elastic.tools.target import open_run

    if arguments.last is not None and arguments.last < 0:
        raise ConfigError(f"--last is {arguments.last}; give 0 or more")
    if arguments.follow and arguments.json:
        raise ConfigError("--follow is given with --json, which is printed once; leave one of them out")
    folder = open_run(arguments.url, read_only=True)
    found = read_logs(folder.storage, arguments.worker, arguments.last)
    show(arguments, {"logs": found}, lambda: logs_text(found))
    if arguments.follow:
        for text in follow_logs(folder, arguments.worker, found):
            print(printable(text), flush=True)
    return 0


def _stacks(arguments: argparse.Namespace) -> int:
    from elastic.tools.live import connect
    from elastic.tools.logs import of_worker
    from elastic.tools.target import open_run

    found = connect(open_run(arguments.url), "ask for its stacks").stacks()
    found = of_worker(found, arguments.worker)
    show(arguments, {"stacks": found}, lambda: "\n".join(f"== worker {w}\n{text}" for w, text in found.items()))
    return 0


def _connect(arguments: argparse.Namespace, doing: str) -> tuple[Any, float]:
    from elastic.tools.live import connect
    from elastic.tools.target import open_run
    from elastic.tools.text import parse_age

    timeout_s = parse_age("--timeout", arguments.timeout)
    return connect(open_run(arguments.url), doing), timeout_s


def _stop(arguments: argparse.Namespace) -> int:
    from elastic.tools.live import stop

    live, timeout_s = _connect(arguments, "stop")
    found = stop(live, _say, timeout_s)

    def text() -> str:
        saved = "" if found["checkpoint"] is None else f"; newest checkpoint: step {found['checkpoint']}"
        return f"{found['status']} after step {found['step']} of {found['total_steps']}{saved}"

    show(arguments, found, text)
    return 0 if found["status"] in ("stopped", "finished") else 1


def _scale(arguments: argparse.Namespace) -> int:
    from elastic.tools.live import scale

    if arguments.max_workers < 1:
        raise ConfigError(f"--max-workers is {arguments.max_workers}; give 1 or more")
    live, timeout_s = _connect(arguments, "scale")
    found = scale(live, arguments.max_workers, _say, timeout_s)

    def text() -> str:
        if "status" in found:
            return f"{found['status']} after step {found['step']}, before its world could change"
        return f"a world of {found['world_size']} at step {found['step']}"

    show(arguments, found, text)
    return 0


def _drain(arguments: argparse.Namespace) -> int:
    from elastic.tools.live import drain
    from elastic.tools.text import parse_age

    seconds = parse_age("--deadline", arguments.deadline)
    live, timeout_s = _connect(arguments, "drain")
    found = drain(live, arguments.worker, seconds, _say, timeout_s)
    show(arguments, found, lambda: f"worker {found['worker']} has handed over after step {found['step']}")
    return 0


def _checkpoint(arguments: argparse.Namespace) -> int:
    from elastic.tools.live import checkpoint

    live, timeout_s = _connect(arguments, "save")
    found = checkpoint(live, _say, timeout_s)
    show(arguments, found, lambda: f"checkpoint of step {found['step']} committed")
    return 0
