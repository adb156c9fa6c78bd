"""Lists runs and tells how each is doing: from its folder and, if it is live, from its server."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from elastic.checkpoint.reader import newest_first
from elastic.errors import ConfigError
from elastic.membership.outbox import row_key
from elastic.observe.ledger import EVENTS, METRICS, read_tail
from elastic.redact import redact
from elastic.run.accounts import account_of_events
from elastic.run.folder import ALIVE_S, CLAIMS, CONFIG, LIVE_STATES, STATUS, RunFolder
from elastic.run.process import has_ended
from elastic.storage import Storage
from elastic.tools.live import NotLive, connect
from elastic.tools.target import list_names

STATES = ("running", "parked", "lost", "finished", "stopped", "failed", "new", "unreadable")
ASK_S = 2.0  # seconds; a server that is gone or behind a firewall may not hold up the list for longer
_IN_FLIGHT = 32


@dataclass(frozen=True)
class Listed:
    """A run in a list.

    Args:
        workers: the size of its newest world.
        age_s: the age of its heartbeat, in seconds.
        bytes: of everything in its folder.
        cost: what it has cost so far, if prices are known.
    """

    name: str
    status: str
    job: str = ""
    step: int = 0
    total_steps: int | None = None
    workers: int | None = None
    age_s: float | None = None
    owner: str = ""
    problem: str = ""
    bytes: int | None = None
    cost: float | None = None


#: The keys by which a list may be sorted; unknown values come last.
ORDERS: dict[str, Callable[[Listed], Any]] = {
    "name": lambda r: r.name,
    "status": lambda r: (STATES.index(r.status), r.name),
    "step": lambda r: -(r.step or 0),
    "heartbeat": lambda r: float("inf") if r.age_s is None else r.age_s,
    "size": lambda r: -(r.bytes or 0),
    "cost": lambda r: -(r.cost or 0.0),
}


def state_of(status: dict[str, Any], now: float) -> str:
    """Return a run's state: the one it wrote last, but `lost` if a live run has not been heard of."""
    state = str(status["status"])
    silent = now - status["heartbeat"] >= ALIVE_S or has_ended(status.get("owner_process"))
    return "lost" if state in LIVE_STATES and silent else state


def list_runs(
    url: str, *, states: Sequence[str] = (), job: str = "*", name: str = "*", sizes: bool | None = False
) -> list[Listed]:
    """Return the runs in a folder, sorted by name.

    Args:
        states: only runs in one of these states; empty means all.
        job, name: patterns such as `code*` for the name of the job and of the run.
        sizes: find the bytes and the cost of each run too. None does so on a disk only, since an object store answers
            hundreds of requests for it.

    Raises:
        ConfigError: an unknown state, or a folder that cannot be listed or is a run itself.
    """
    unknown = sorted(set(states) - set(STATES))
    if unknown:
        raise ConfigError(f"--status is {unknown[0]!r}; give some of {', '.join(STATES)}")
    storage = Storage(url, option="URL", read_only=True)
    if storage.local and not os.path.isdir(storage.root):
        raise ConfigError(f"URL is {url!r}, which is no folder; give that of --run.storage")
    sizes = storage.local if sizes is None else sizes
    names = list_names(storage)
    if {CONFIG, STATUS, CLAIMS} & set(names):
        raise ConfigError(f"URL is {url!r}, which is a run; give the folder of runs, or use elastic status")
    now = time.time()
    with ThreadPoolExecutor(_IN_FLIGHT, "runs") as pool:
        found = pool.map(lambda n: _look(storage, n, now, states, job, sizes), [n for n in names if fnmatch(n, name)])
        return [run for run in found if run is not None]


def _look(storage: Storage, name: str, now: float, states: Sequence[str], job: str, sizes: bool) -> Listed | None:
    folder = RunFolder(Storage(f"{storage.url}/{name}", read_only=True))
    found = _listed(folder, name, now)
    if found is None or not fnmatch(found.job, job) or (states and found.status not in states):
        return None
    if not sizes or found.status == "unreadable":
        return found
    try:
        return replace(found, bytes=folder.storage.usage(), cost=_cost(folder))
    except Exception as error:  # a damaged file or storage may raise anything; the other runs must be listed
        return replace(found, problem=redact(f"{type(error).__name__}: {error}"))


def _cost(folder: RunFolder) -> float | None:
    """Return what a run cost: from its result if it has ended, otherwise from its events."""
    result = folder.result()
    cost = account_of_events(folder.storage).cost if result is None else result.get("cost")
    return float(cost) if isinstance(cost, (int, float)) else None


def _listed(folder: RunFolder, name: str, now: float) -> Listed | None:
    try:
        status, config = folder.status(), folder.config()
        job = str(config["job"]["name"]) if config else ""
        if status is None:
            return Listed(name, "new", job) if config else None
        return Listed(
            name,
            state_of(status, now),
            job,
            status.get("step", 0),
            status.get("total_steps"),
            status["world"]["size"] if status.get("world") else None,
            round(now - status["heartbeat"], 1),
            status.get("owner", ""),
        )
    except NotADirectoryError:
        return None  # a file beside the runs
    except Exception as error:  # a damaged file or storage may raise anything; the other runs must be listed
        return Listed(name, "unreadable", problem=redact(f"{type(error).__name__}: {error}"))


def look_at_run(folder: RunFolder, *, last: int) -> dict[str, Any]:
    """Return how one run is doing: status, workers, and the `last` rows and events, read from the end of the ledger.

    The server of a live run is asked. If it cannot be, `not_asked` has the reason, and the run's folder must suffice.

    Raises:
        ConfigError: the run never wrote a status.
    """
    with ThreadPoolExecutor(4, "status") as pool:  # each takes a round trip or two to object storage
        tail = pool.submit(read_tail, folder.storage, METRICS, last)
        history = pool.submit(read_tail, folder.storage, EVENTS, last)
        saved = pool.submit(lambda: next(newest_first(folder.storage), None))
        status = folder.status()
        if status is None:
            raise ConfigError(f"URL is {folder.storage.url!r}, whose run never wrote a status; start it first")
        seen, why = _ask(folder, status)
        rows, events, newest = tail.result(), history.result(), saved.result()
    known = set(map(row_key, rows))
    rows += [r for r in (seen["rows"] if seen else ()) if row_key(r) not in known]
    status = seen["status"] if seen else status
    return {
        "run": redact(folder.storage.url),
        "status": state_of(status, time.time()),
        "asked": seen is not None,
        "not_asked": why,
        "step": status.get("step", 0),
        "total_steps": status.get("total_steps"),
        "age_s": round(time.time() - status["heartbeat"], 1),
        "owner": status.get("owner"),
        "message": status.get("message"),
        "world": status.get("world"),
        "phase": seen["group"]["phase"] if seen else None,
        "max_workers": seen["group"]["max_workers"] if seen else None,
        "workers": seen["workers"] if seen else recorded(status),
        "checkpoint": newest.step if newest else None,
        "rows": rows[-last:] if last else [],
        "events": events,
    }


def _ask(folder: RunFolder, status: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    if state_of(status, time.time()) not in LIVE_STATES:
        return None, None
    try:
        return connect(folder, "ask", ASK_S).look(), None
    except (NotLive, OSError) as error:
        return None, str(error)


def recorded(status: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the members of a live run's newest world, by rank; their phases are not known."""
    members = status.get("members", ()) if status["status"] in LIVE_STATES else ()
    return [{**member, "rank": rank, "state": "recorded", "phase": ""} for rank, member in enumerate(members)]


def text_of(run: dict[str, Any]) -> str:
    """Format the result of `look_at_run` for people."""
    from elastic.observe.console import DEATHS, eval_text, event_text, row_text
    from elastic.tools.text import age_text, workers_table

    total = run["total_steps"] or 0
    world = run["world"]
    lines = [
        f"{run['run']}: {run['status']}, step {run['step']} of {total}, heartbeat {age_text(run['age_s'])} ago",
        f"driven by {run['owner']}" + (f"; {run['message']}" if run["message"] else ""),
        f"newest checkpoint: {'none' if run['checkpoint'] is None else 'step ' + str(run['checkpoint'])}",
    ]
    if world and run["status"] in LIVE_STATES:
        most = f" of at most {run['max_workers']}" if run["max_workers"] else ""
        lines.append(f"world {world['generation']}: {world['size']} workers{most}")
    if run["not_asked"]:
        lines.append(f"(from its folder alone: {run['not_asked']})")
    if run["workers"]:
        lines += ["", workers_table(run["workers"])]
    records = [(r["time"], row_text(r, total, None, None) if "loss" in r else eval_text(r)) for r in run["rows"]]
    records += [(e["time"], event_text(e, whole=e["kind"] in DEATHS)) for e in run["events"]]
    if records:
        lines += ["", *(f"[{_clock(at)}] {text}" for at, text in sorted(records, key=lambda t: t[0]))]
    return "\n".join(lines)


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
