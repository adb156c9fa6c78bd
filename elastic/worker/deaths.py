"""How a process ended, in words, and whether memory had run out. Linux says the latter in counters alone."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

_MEANINGS = {
    "SIGSEGV": "a segmentation fault",
    "SIGBUS": "a bus error: often a full /dev/shm",
    "SIGABRT": "it aborted itself, as CUDA, NCCL and failed assertions in C++ do",
    "SIGILL": "an instruction that this processor does not have",
    "SIGFPE": "an arithmetic error",
    "SIGTERM": "somebody asked it to end",
    "SIGHUP": "its terminal was closed",
}
NEAR = 0.05  # share of memory that was left


def ended_how(returncode: int, memory: str | None = None) -> str:
    """How a process ended, for people.

    Args:
        memory: that it ran out of memory, as `Memory` says; empty where it did not, None where nobody looked.
    """
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        return f"killed by signal {-returncode}"
    if name != "SIGKILL":
        return f"killed by {name}" + (f" ({_MEANINGS[name]})" if name in _MEANINGS else "")
    if memory is None:
        return "killed by SIGKILL, perhaps since memory ran out (see dmesg)"
    return f"killed by SIGKILL: {memory or 'somebody killed it; nothing says that memory ran out'}"


class Memory:
    """Looks at what the kernel says of memory while processes run."""

    def __init__(self, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")):
        self._proc, self._cgroup = proc, cgroup
        self._kills, self._least = self._count(), 1.0

    def look(self) -> None:
        """Note how much is left; now and then."""
        self._least = self._left() if self._least > NEAR else min(self._least, self._left())

    def ran_out(self) -> str:
        """What speaks for it that a process was killed since memory ran out; empty if nothing does."""
        before, self._kills = self._kills, self._count()
        if self._kills > before:
            return "the kernel's out-of-memory killer has ended processes here since the run began"
        self.look()
        if self._least <= NEAR:
            return f"memory probably ran out: {self._least:.0%} of it were left"
        return ""

    def _count(self) -> int:
        """Processes that were killed for lack of memory, on this machine or in this container."""
        files = (self._proc / "vmstat", self._cgroup / "memory.events", self._cgroup / "memory/memory.oom_control")
        return sum(_values(file).get("oom_kill", 0) for file in files)

    def _left(self) -> float:
        """Share of memory that is left, of the machine or of this container, whichever is less."""
        known = _values(self._proc / "meminfo")
        shares = (
            [known["MemAvailable"] / known["MemTotal"]] if known.get("MemTotal") and "MemAvailable" in known else []
        )
        with contextlib.suppress(OSError, ValueError):
            most = int((self._cgroup / "memory.max").read_text())
            shares.append(1 - int((self._cgroup / "memory.current").read_text()) / most)
        return min(shares, default=1.0)


def _values(file: Path) -> dict[str, int]:
    """Names and numbers of a file of the kernel's, one each line; nothing where there is none."""
    found = {}
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            words = line.replace(":", " ").split()
            if len(words) >= 2 and words[1].isdecimal():
                found[words[0]] = int(words[1])
    return found
