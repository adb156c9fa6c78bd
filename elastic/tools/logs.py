"""Reads what the workers of a run printed, from its folder: see `elastic.run.logs` for the files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from elastic.errors import ConfigError
from elastic.run.folder import RunFolder
from elastic.run.logs import FOLDER
from elastic.storage import Storage

POLL_S = 1.0
_AT_ONCE = 32
_STAMP = len("2026-11-29 01:02:03")
T = TypeVar("T")


def read_logs(storage: Storage, worker: str | None = None, last: int | None = None) -> dict[str, list[str]]:
    """Return lines by worker.

    Args:
        worker: its id, or the beginning of it; None for all.
        last: the number of newest lines of each; None for all.

    Raises:
        ConfigError: there is no such worker, or none printed anything.
    """
    names = {name.removesuffix(".txt"): name for name in storage.names(FOLDER) if name.endswith(".txt")}
    if not names:
        raise ConfigError(f"run {storage.url} has no logs: no worker of it has printed anything yet")
    wanted = of_worker(names, worker)

    def read(name: str) -> list[str]:
        lines = storage.read(f"{FOLDER}/{name}").decode(errors="replace").splitlines()
        return lines if last is None else lines[max(0, len(lines) - last) :]

    with ThreadPoolExecutor(_AT_ONCE, "logs") as pool:
        return dict(zip(wanted, pool.map(read, wanted.values())))


def of_worker(known: dict[str, T], worker: str | None) -> dict[str, T]:
    """Return what is known of one worker.

    Args:
        worker: its id, or the beginning of it; None for all.

    Raises:
        ConfigError: no worker or several have such an id.
    """
    if worker is None:
        return known
    found = [name for name in known if name == worker] or [name for name in known if name.startswith(worker)]
    if len(found) != 1:
        names = ", ".join(sorted(found or known)) or "no worker"
        raise ConfigError(f"WORKER is {worker!r}, which is {'several' if found else 'none'} of {names}")
    return {found[0]: known[found[0]]}


def logs_text(found: dict[str, list[str]]) -> str:
    """Return the lines of all workers in the order in which they came; with several workers, each line has its worker's
    id."""
    if len(found) == 1:
        return "\n".join(next(iter(found.values())))
    lines = []
    for worker, printed in found.items():
        at = ""
        for number, line in enumerate(printed):
            at = line[:_STAMP] if line[:1].isdigit() else at
            lines.append((at, worker, number, f"{worker} {line}"))
    return "\n".join(line[-1] for line in sorted(lines))


def follow_logs(folder: RunFolder, worker: str | None, seen: dict[str, list[str]]) -> Iterator[str]:
    """Yield what is printed from now on, some lines at a time, until the run ends."""
    known, over = dict(seen), False
    while not over:
        over = folder.live_driver() is None
        if not over:
            time.sleep(POLL_S)
        now = read_logs(folder.storage, worker)
        new = {name: _after(known.get(name, []), lines) for name, lines in now.items()}
        known = now
        new = {name: lines for name, lines in new.items() if lines}
        if new:
            yield logs_text(new) if len(now) == 1 else "\n".join(f"{n} {line}" for n, ls in new.items() for line in ls)


def _after(before: list[str], now: list[str]) -> list[str]:
    """Return the new lines. The old lines are the beginning of the new ones, unless some were dropped meanwhile."""
    if now[: len(before)] == before:
        return now[len(before) :]
    last = before[-3:]
    for place in range(len(now) - len(last), -1, -1):
        if now[place : place + len(last)] == last:
            return now[place + len(last) :]
    return now
