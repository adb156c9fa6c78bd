"""Planned faults for tests: `fault.point("step.after_fence", rank, step)` does nothing, unless a test planned a fault.

The plan is in the environment variable ELASTIC_FAULTS: a JSON list of {"point", "rank", "step", "do", "seconds"}, where
`do` is kill (SIGKILL), stop (SIGSTOP), sleep, lock (sleep while holding the interpreter lock), hold (while `file`
exists) or raise. Each fault happens once in a process, at that point, rank and step. With `only` (a path) it happens in
one process only: the first that creates that file. With `when` (a path) it happens only once that file is there. Points
in the run's host have rank -1.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from typing import Any

_VARIABLE = "ELASTIC_FAULTS"
HOLD_S = 60.0


class PlannedError(Exception):
    """Raised by a fault whose `do` is raise."""


_planned: list[dict[str, Any]] = []


def read_plan() -> None:
    """Read the plan from the environment: at import, and again in a process that was forked after it."""
    _planned[:] = json.loads(os.environ.get(_VARIABLE, "[]"))


read_plan()


def point(name: str, rank: int, step: int) -> None:
    """Mark a place where a test can plan a fault. Costs one comparison if there is no plan."""
    if _planned:
        _act(name, rank, step)


def _act(name: str, rank: int, step: int) -> None:
    for fault in list(_planned):
        if fault["point"] != name or fault.get("rank", rank) != rank or fault.get("step", step) != step:
            continue
        if "when" in fault and not os.path.exists(fault["when"]):
            continue
        _planned.remove(fault)
        if "only" in fault and not _first(fault["only"]):
            continue
        action = fault["do"]
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "sleep":
            time.sleep(fault["seconds"])
        elif action == "lock":
            ctypes.PyDLL(None).usleep(int(fault["seconds"] * 1e6))  # as a long call into C does
        elif action == "hold":
            _hold(fault["file"])
        elif action == "raise":
            raise PlannedError(f"planned at {name}, rank {rank}, step {step}")


def _hold(path: str) -> None:
    deadline = time.monotonic() + HOLD_S
    while os.path.exists(path):
        if time.monotonic() > deadline:
            raise PlannedError(f"held for {HOLD_S:.0f} s by {path}")
        time.sleep(0.005)


def _first(path: str) -> bool:
    try:
        with open(path, "x"):
            return True
    except FileExistsError:
        return False
