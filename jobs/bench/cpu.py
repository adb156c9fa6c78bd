"""CPU time of processes and all that they have started, by what they are."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_LOOK_S = 0.05
#: A part of a command line -> the process.
_NAMES = {
    "fork_server.py": "fork server",
    "ray::HostActor": "host",
    "ray::Controller": "controller",
    "ray::TrainController": "controller",
    "ray::WorkerActor": "workers",
    "ray::RayTrainWorker": "workers",
    "ray::": "other workers",
    "default_worker.py": "other workers",
    "setup_worker.py": "other workers",
    "fork_request.py": "other workers",
    "gcs_server": "gcs, raylet",
    "raylet/raylet": "gcs, raylet",
    "dashboard": "Ray's agents and monitors",
    "runtime_env": "Ray's agents and monitors",
    "monitor": "Ray's agents and monitors",
}


class CpuTimes:
    """Looks at these processes and their descendants 20 times a second, until it is closed; of a process that ends, the
    time since the last look is lost.

    Args:
        standing: processes that were there before; only what they take from now on counts.
    """

    def __init__(self, standing: Iterable[int] = ()):
        self._standing = tuple(standing)
        self.roots = list(self._standing)
        self._seconds: dict[int, float] = {}
        self._names: dict[int, str] = {}
        self._lock = threading.Lock()
        self._look()
        self._before = dict(self._seconds)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CpuTimes:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def by_process(self) -> dict[str, float]:
        """CPU seconds until now: what a process is -> of all such processes; and of `all`."""
        self._look()
        found: dict[str, float] = {}
        with self._lock:
            for pid, seconds in self._seconds.items():
                name = self._names[pid]
                found[name] = found.get(name, 0.0) + seconds - self._before.get(pid, 0.0)
        return {"all": sum(found.values()), **found}

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_S):
            self._look()

    def _look(self) -> None:
        parents, seconds, servers = {}, {}, set()
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with suppress(OSError):
                    fields = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()
                    parents[int(entry)] = int(fields[1])
                    seconds[int(entry)] = (int(fields[11]) + int(fields[12])) * _TICK_S
                    if fields[1] == b"1" and self._serves(entry):
                        servers.add(int(entry))
        wave = {*self.roots, *servers}
        with self._lock:
            while wave:
                for pid in wave & seconds.keys():
                    self._seconds[pid] = max(seconds[pid], self._seconds.get(pid, 0.0))
                    self._names[pid] = _name(pid) or self._names.get(pid, "driver")
                wave = {pid for pid, parent in parents.items() if parent in wave}

    def _serves(self, pid: str) -> bool:
        """Whether this is the fork server of one of the standing raylets, which has left its parent behind."""
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return any(w.endswith(b"/fork_server.py") for w in words) and any(b"%d" % p in words for p in self._standing)


def _name(pid: int) -> str | None:
    with suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return next((name for part, name in _NAMES.items() if part in line), None)
    return None
