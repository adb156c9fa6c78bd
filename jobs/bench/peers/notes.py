"""What a trainer's workers write down while they train, and what a recovery is read from.

Every trainer runs the same model with steps of the same length. Rank 0 appends a line of JSON for each applied step
(step, time, size and name of its world), and marks for what happened on the way.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.bench.report import median

PAUSE_S = 0.05  # of a forward pass: with all else, a step takes a little more
SAVE_EVERY = 10  # steps, of those trainers that restart from a checkpoint
WARM_STEPS = 20  # before a kill
BATCH = 8  # samples of one worker

#: What a recovery is made of, in this order; the last also has what no mark tells apart.
PHASES = ("detect", "form", "start", "connect", "restore", "first step")


class Notes:
    """A file that processes append lines of JSON to."""

    def __init__(self, file: str | Path):
        self._file = open(file, "a", buffering=1)  # noqa: SIM115 - open as long as the process lives

    def mark(self, what: str, at: float | None = None) -> None:
        """That `what` is over, or was at a time (unix seconds)."""
        self._write({"mark": what, "time": time.time() if at is None else at})

    def step(self, step: int, size: int, world: object) -> None:
        """That an update was applied."""
        self._write({"step": step, "size": size, "world": str(world), "time": time.time()})

    def _write(self, note: dict[str, Any]) -> None:
        self._file.write(json.dumps(note) + "\n")


def read(file: str | Path) -> list[dict[str, Any]]:
    """All notes so far, without one that is being written."""
    path = Path(file)
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_of(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [n for n in notes if "step" in n]


def split(reached: dict[str, float], begin: float, end: float, normal_s: float) -> dict[str, float]:
    """Seconds of each phase of a stall, given when each was over.

    Args:
        reached: unix seconds; a phase that is missing took no time of its own.
        begin, end: when the stall began, and when its first step was applied.
    """
    parts, at = {}, begin
    for phase in PHASES[:-1]:
        until = min(max(reached.get(phase, at), at), end)
        parts[phase], at = until - at, until
    parts[PHASES[-1]] = max(0.0, end - at - normal_s)
    return parts


def recovery(
    notes: list[dict[str, Any]], killed: float, expected: int, reached: dict[str, float] | None = None
) -> dict[str, float]:
    """The recovery from a kill at `killed` (unix seconds), after which `expected` workers should train on.

    Returns:
        stall_s, lost (steps done again), left_out (workers that lived and were not in the next world), and the phases.
    """
    rows = steps_of(notes)
    world = [r for r in rows if r["time"] <= killed][-1]["world"]
    after = next(r for r in rows if r["time"] > killed and r["world"] != world)
    before = [r for r in rows if r["time"] < after["time"] and r["world"] == world]
    last = before[-1]
    normal_s = median(b["time"] - a["time"] for a, b in zip(before[-WARM_STEPS:], before[-WARM_STEPS + 1 :]))
    marks = {n["mark"]: n["time"] for n in notes if "mark" in n and killed <= n["time"] <= after["time"]}
    return {
        "stall_s": after["time"] - last["time"] - normal_s,
        "lost": float(last["step"] - after["step"] + 1),
        "left_out": float(max(0, expected - after["size"])),
        **split({**marks, **(reached or {})}, max(killed, last["time"]), after["time"], normal_s),
    }


def wait(condition: Callable[[], Any], timeout_s: float, what: str) -> None:
    """Raises TimeoutError, saying `what` was waited for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.05)


def wait_for_world(file: str | Path, size: int | None, after: float = 0.0, timeout_s: float = 240.0) -> None:
    """Wait until a world of this size (None: any) that came `after` (unix seconds) has applied WARM_STEPS steps."""

    def there() -> bool:
        rows = steps_of(read(file))
        newest = [r for r in rows if r["world"] == rows[-1]["world"]]
        fits = len(newest) >= WARM_STEPS and newest[0]["time"] > after
        return fits and size in (None, newest[-1]["size"])

    wait(there, timeout_s, f"a world of {size or 'any size'} that applied {WARM_STEPS} steps")


def children(pid: int) -> list[int]:
    """The processes that a process started, and theirs; none of one that is gone."""
    try:
        direct = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return [*direct, *(grandchild for c in direct for grandchild in children(c))]


def any_moment(i: int, span_s: float = SAVE_EVERY * PAUSE_S) -> None:
    """Wait so long that kills fall anywhere in `span_s`: between two checkpoints, so anywhere in a step too."""
    time.sleep((i + 0.5) * 0.618 % 1 * span_s)


def kill(*pids: int) -> float:
    """SIGKILL, of those that still live; returns when."""
    at = time.time()
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return at


def train(model: Any, optimizer: Any, done: Callable[[], None]) -> None:
    """Steps of PAUSE_S for ever; `done` is called after each."""
    import torch

    while True:
        optimizer.zero_grad()
        time.sleep(PAUSE_S)
        model(torch.randn(BATCH, 64)).pow(2).mean().backward()
        optimizer.step()
        done()
