"""What a test must not leave behind, as one comparable snapshot of this process."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

#: Threads of this project: daemons, so that a crash cannot hang on them, but never to be left running.
OUR_THREADS = ("membership-server", "membership-link", "run-keeper", "run-follower", "lookout", "controller", "vault")
FOLDER_PREFIX = "elastic-"
KEPT = "elastic-prepared-"  # one folder a user, of which each command removes what is old
_CHANGED_BY_OTHERS = (
    "PYTEST_CURRENT_TEST",
    "PYTEST_VERSION",
    "TORCHINDUCTOR_CACHE_DIR",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",  # by imports of torch and scikit-learn
)


@dataclass(frozen=True)
class Snapshot:
    """Everything that is compared before and after a test."""

    processes: dict[int, str]
    threads: dict[int, str]
    environment: dict[str, str]
    temporary: frozenset[str]
    process_group: bool


def take() -> Snapshot:
    """What this process holds now."""
    distributed = sys.modules.get("torch.distributed")
    return Snapshot(
        processes=descendants(os.getpid()),
        threads={t.ident or 0: t.name for t in threading.enumerate() if not t.daemon or t.name in OUR_THREADS},
        environment={k: v for k, v in os.environ.items() if k not in _CHANGED_BY_OTHERS},
        temporary=frozenset(
            n for n in os.listdir(tempfile.gettempdir()) if n.startswith(FOLDER_PREFIX) and not n.startswith(KEPT)
        ),
        process_group=distributed is not None and distributed.is_available() and distributed.is_initialized(),
    )


def descendants(root: int) -> dict[int, str]:
    """Living processes below `root`, by process id, with their command lines. Ended ones (zombies) do not count."""
    found: dict[int, str] = {}
    below = _children(root)
    while below:  # twice for each test, so without a look at the processes of others
        pid = below.pop()
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
            below |= _children(pid)
            with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
                if file.read(512).rpartition(b")")[2].split(None, 1)[0] not in b"ZX":
                    found[pid] = _command_line(pid)
    return found


def _children(pid: int) -> set[int]:
    """Those that the threads of this process have started, or were given."""
    found: set[int] = set()
    for thread in os.listdir(f"/proc/{pid}/task") * 2:  # one that ends while the list is made may hide another
        with suppress(FileNotFoundError, ProcessLookupError):
            with open(f"/proc/{pid}/task/{thread}/children", "rb", buffering=0) as file:
                found.update(map(int, file.readall().split()))
    return found


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:120]
    except (FileNotFoundError, ProcessLookupError):
        return "(just ended)"


def compare(before: Snapshot, after: Snapshot, *, ray: bool = False) -> list[str]:
    """One sentence for each thing that came, or changed, and is still there.

    Args:
        ray: tolerate what Ray keeps for a whole session: its processes, threads and RAY_* variables.
    """
    found = []
    if not ray:
        new = {pid: line for pid, line in after.processes.items() if pid not in before.processes}
        found += [f"process {pid} is still running: {line}" for pid, line in sorted(new.items())]
    for ident, name in after.threads.items():
        if ident not in before.threads and (not ray or name in OUR_THREADS):
            found.append(f"thread {name} is still running")
    for name in sorted(before.environment.keys() | after.environment.keys()):
        was, now = before.environment.get(name), after.environment.get(name)
        if was != now and not (ray and name.startswith("RAY_")):
            found.append(f"environment variable {name} was {was!r} and is {now!r}")
    found += [f"{name} is left in the temporary folder" for name in sorted(after.temporary - before.temporary)]
    if after.process_group and not before.process_group:
        found.append("the torch.distributed process group is still initialised")
    return found


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Processes whose parent dies become our children here, so that they are seen, instead of those of init."""
    known = _children(os.getpid())
    _set_subreaper(True)
    try:
        yield
    finally:
        _set_subreaper(False)
        for pid in _children(os.getpid()) - known:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _set_subreaper(on: bool) -> None:
    pr_set_child_subreaper = 36
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_child_subreaper, int(on), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def wait_until_clean(before: Snapshot, *, ray: bool = False, timeout_s: float = 15.0) -> list[str]:
    """Like `compare` with what is there now, after giving what is just ending the time to end.

    Processes that do not are killed: the next tests are innocent.
    """
    deadline = time.monotonic() + timeout_s
    while (found := compare(before, take(), ray=ray)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if found and not ray:
        for pid in descendants(os.getpid()).keys() - before.processes.keys():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return found
