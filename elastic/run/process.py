"""Which process of which machine drives a run, so that another one there can tell that it has ended."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """This process, told apart from any other on any machine; empty where /proc does not say."""
    try:
        return {**_here(), "pid": os.getpid(), "started": _started(os.getpid())}
    except OSError:
        return {}


def has_ended(process: dict[str, Any] | None) -> bool:
    """Whether a process that `identity` described is known to have ended. False where this machine cannot know."""
    if not process:
        return False
    try:
        here = _here()
    except OSError:
        return False
    if any(process.get(key) != value for key, value in here.items()):
        return False  # another machine, or a container whose processes are not seen here
    try:
        return _started(process["pid"]) != process["started"]
    except OSError:
        return True


def _here() -> dict[str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"boot": boot, "pid_namespace": os.readlink("/proc/self/ns/pid")}


def _started(pid: int) -> int:
    """Clock ticks from boot to the start of a living process: a reused pid differs in it.

    Raises:
        OSError: it has ended; a zombie has, too.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(pid)
    return int(fields[19])
