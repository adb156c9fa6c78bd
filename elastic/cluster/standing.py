"""The fork server of a node of a cluster that runs already, as others started it. It serves all runs of this user that
have this code, and is started by the first of them: by its driver, which then gains from it at once, or by a worker.

Imports neither Ray nor torch, since a driver calls it before it has imported anything.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from elastic.cluster import fork_request, fork_server
from elastic.run.versions import versions
from elastic.units import parse_amount

ROOT = Path(__file__).parents[2]
_UNPACKED = "runtime_resources"  # Ray's folder for packages that it unpacks, and removes when no job needs them
_ADDRESS_FILE = ("ray", "ray_current_cluster")
_ORDINARY = "ray/_private/workers/setup_worker.py"
#: A command of sh: the Python of an environment that Ray made for a task of a job (what a job starts inherits this
#: command), else the words before the worker's script if their files are here, else the Python of its raylet.
_EITHER = (
    'of() { tr "\\0" "\\n" < /proc/$PPID/environ | sed -n "s/^$1=//p"; }; '
    'for own in "$VIRTUAL_ENV" "$CONDA_PREFIX"; do if [ -x "$own/bin/python" ] && [ "$own" != "$(of VIRTUAL_ENV)" ] '
    '&& [ "$own" != "$(of CONDA_PREFIX)" ]; then shift 6; exec "$own/bin/python" "$@"; fi; done; '
    'if [ -x "$1" ] && [ -f "$4" ]; then exec "$@"; fi; shift 6; '
    "exec \"$(tr '\\0' '\\n' < /proc/$PPID/cmdline | sed -n 's/^--python_worker_command=//p' | cut -d' ' -f1)\" \"$@\""
)


def fingerprint() -> str:
    """Of the code that a fork server imports, and of the environment that has it: the same on nodes with the same."""
    found = hashlib.sha256(repr((versions(), sys.executable, sys.prefix)).encode())
    package = ROOT / "elastic"
    for file in sorted(package.rglob("*.py")):
        found.update(str(file.relative_to(package)).encode())
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def command(code: str) -> str:
    """The `py_executable` of workers that ask a node's fork server for the code with this fingerprint. On a node where
    it has no meaning, the worker starts as Ray starts it."""
    words = [sys.executable, "-S", "-E", fork_request.__file__, fork_request.SERVER, code]
    return shlex.join(["sh", "-c", _EITHER, "sh", *words])


def raylets_here(address: str) -> dict[int, str]:
    """Raylets of this user on this machine, of the cluster whose head listens at `address` (host:port): process id ->
    id of the node in hex."""
    found = {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError, StopIteration):
            if not folder.name.isdigit() or folder.stat().st_uid != os.getuid():
                continue
            words = _words(int(folder.name))
            if words[0].endswith("raylet/raylet") and f"--gcs-address={address}" in words:
                found[int(folder.name)] = next(w for w in words if w.startswith("--node_id=")).partition("=")[2]
    return found


def serve_early(named: str | None, keep_warm: str | None) -> bool:
    """Have a fork server before this process connects to a cluster, if there is no doubt for which raylet.

    Args:
        named: the address of the cluster, None for the one that `ray start` left running here.

    Returns:
        whether the cluster has nodes on this machine.
    """
    raylets = raylets_here(named or _left_running())
    if len(raylets) == 1 and keep_warm is not None:
        idle_s = parse_amount("--cluster.keep-warm", keep_warm, clock=True).seconds
        serve(next(iter(raylets)), fingerprint(), idle_s)
    return bool(raylets)


def _left_running() -> str:
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    with suppress(OSError):
        return Path(folder, *_ADDRESS_FILE).read_text().strip()
    return ""


def serve(raylet: int, code: str, idle_s: float) -> bool:
    """Have a fork server for this raylet and the code with this fingerprint. It ends with the raylet, or when it is
    not needed for `idle_s`.

    Returns:
        whether there is one: not where its forks would be elsewhere than the raylet's workers, or others than Ray's.
    """
    if not hasattr(os, "pidfd_open") or _UNPACKED in ROOT.parts:
        return False
    try:
        starts = next((w for w in _words(raylet) if w.startswith("--python_worker_command=")), "=").partition("=")[2]
        ordinary = _ORDINARY in starts and _environment(starts.split()[0]) == _environment(sys.executable)
        here = fork_request.place(str(raylet)) == fork_request.place("self")
        folder = Path(fork_request.server_folder(raylet, code))
        if not (ordinary and here and Path(f"/proc/{raylet}").stat().st_uid == os.getuid()):
            return False
        for each in (folder.parent, folder):
            with suppress(FileExistsError):
                each.mkdir(mode=0o700)
            if not fork_request.is_private(str(each)):
                return False
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _clear(folder)
        _start(folder, lock, raylet, idle_s)
    except BlockingIOError:
        pass  # there is one
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def _environment(python: str) -> str:
    """The folder of an interpreter, whose packages it finds; what lies there may be a link to one of all folders."""
    return os.path.realpath(os.path.dirname(python))


def _start(folder: Path, lock: int, raylet: int, idle_s: float) -> None:
    environment = _of_workers(raylet)
    with socket.socket(socket.AF_UNIX) as listening, (folder / "log").open("wb") as log:
        path = folder / "socket"
        path.unlink(missing_ok=True)
        listening.bind(str(path))
        path.chmod(0o600)
        listening.listen(128)
        words = [fork_server.__file__, str(listening.fileno()), str(folder), str(lock), str(raylet), str(idle_s)]
        subprocess.run(  # it leaves its child behind
            [sys.executable, *words],
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listening.fileno(), lock],
            start_new_session=True,
            check=False,
        )


def _of_workers(raylet: int) -> dict[bytes, bytes]:
    """The environment in which a raylet starts its workers: its own, without what Ray preloads into it."""
    parts = Path(f"/proc/{raylet}/environ").read_bytes().split(b"\0")
    environment = dict(part.split(b"=", 1) for part in parts if b"=" in part)
    if environment.get(b"RAY_LD_PRELOAD_ON_WORKERS", b"0") == b"0":
        environment.pop(b"LD_PRELOAD", None)
    return environment


def _clear(mine: Path) -> None:
    """Remove what servers left behind that were killed, and whose raylet has ended."""
    for folder in mine.parent.glob("fork-*-*-*"):
        with suppress(ValueError, OSError):  # others may be there; a server of another container holds its lock
            _, raylet, since, _ = folder.name.split("-")
            if folder == mine or fork_request.started(int(raylet)) == int(since):
                continue
            with (folder / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _words(process: int) -> list[str]:
    return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
