"""Identifies the process that drives a run, so that other processes on its machine can tell whether it has ended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """A description of this process that differs from that of any other; empty if /proc is not readable."""
    try:
        return {**_here(), "pid": os.getpid(), "started": _started(os.getpid())}
    except OSError:
        return {}


def has_ended(process: dict[str, Any] | None) -> bool:
    """Whether the process that `identity` described has ended. False if this machine cannot know."""
    if not process:
        return False
    try:
        here = _here()
    except OSError:
        return False
    if any(process.get(key) != value for key, value in here.items()):
        return False  # it is on another machine, or in a container whose processes are not visible here
    try:
        return _started(process["pid"]) != process["started"]
    except OSError:
        return True


def _here() -> dict[str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"boot": boot, "pid_namespace": os.readlink("/proc/self/ns/pid")}


def _started(pid: int) -> int:
    """Clock ticks from boot to the start of a living process; they differ when a pid is reused.

    Raises:
        OSError: the process has ended, or is a zombie.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(pid)
    return int(fields[19])
