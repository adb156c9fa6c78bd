"""What a node starts for a worker, instead of Ray's own script: asks a fork server for the process, and ends. Where
that cannot be, Ray's script takes its place. It runs for each worker, so it imports little, and nothing of ours.

    python fork_request.py SCRIPT ARGUMENTS                    (on an embedded cluster, instead of `setup_worker.py`)
    python fork_request.py --server CODE SCRIPT ARGUMENTS      (on a standing one, where `setup_worker.py` starts it)
"""

from __future__ import annotations

import array
import json
import os
import resource
import socket
import stat
import sys
from typing import Any

SOCKET = "ELASTIC_FORK_SERVER"  # environment variable: the path of the socket of an embedded cluster's server
SERVER = "--server"
_RIGHTS = ("Uid:", "Gid:", "Groups:", "NoNewPrivs:", "Seccomp:")
_CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language="
_FOLDER, _SCRIPT, _ORDINARY = os.path.join("ray", "_private", "workers"), "default_worker.py", "setup_worker.py"
_ANSWER_S = 20.0  # the server may still import; Ray waits for a worker for 60 s
#: Which soft limits may differ between a worker and its server: those that a fork sets.
_SET = ("Max open files", "Max core file size")


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] == [SERVER]:
        folder, arguments = server_folder(os.getppid(), arguments[1]), arguments[2:]
        request = requested(arguments)
        if request is not None and is_private(folder) and _ask(os.path.join(folder, "socket"), request):
            os._exit(0)
        os.execv(sys.executable, [sys.executable, *arguments])
    path, request = os.environ.pop(SOCKET, None), requested(arguments)
    if path is not None and request is not None and _ask(path, request):
        os._exit(0)
    script = next(a for a in arguments if a.endswith(os.path.join(_FOLDER, _SCRIPT)))
    ordinary = os.path.join(os.path.dirname(script), _ORDINARY)
    os.execv(sys.executable, [sys.executable, ordinary, *arguments])


def requested(arguments: list[str]) -> dict[str, Any] | None:
    """The worker that Ray asks for with these arguments; None if it needs what only Ray's script can do: another
    interpreter, variables or a container of its own, another language, flags of Python."""
    known: dict[str, Any] = {
        "env_vars": {},
        "command_prefix": [],
        "override_worker_entrypoint": None,
        "py_executable": sys.executable,
    }
    command = []
    for argument in arguments:
        if argument.startswith(_CONTEXT):
            context = json.loads(argument[len(_CONTEXT) :] or "{}")
            if any(context.get(name, value) != value for name, value in known.items()):
                return None
        elif not argument.startswith(_LANGUAGE):
            command.append(argument)
        elif argument != _LANGUAGE + "PYTHON":
            return None
    if not command or not command[0].endswith(os.path.join(_FOLDER, _SCRIPT)):
        return None
    return {
        "command": command,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "umask": _umask(),
        "oom_score": int(_read("/proc/self/oom_score_adj") or 0),
        "place": place("self"),
        "raylet": os.getppid(),
    }


def server_folder(raylet: int, code: str) -> str:
    """The folder of the fork server for a raylet and the code with this fingerprint."""
    return f"/tmp/elastic-{os.getuid()}/fork-{raylet}-{started(raylet)}-{code}"


def started(process: int) -> int:
    """When it started, in ticks since the machine did: with its id that names a process for ever. 0 without it."""
    try:
        return int(_read(f"/proc/{process}/stat").rpartition(")")[2].split()[19])
    except OSError:
        return 0


def place(process: str) -> dict[str, Any]:
    """Where a process is that its children are too: its control group, its CPUs, its namespaces, its limits, and its
    rights."""
    spaces = ("mnt", "net", "ipc", "pid", "user")
    return {
        "group": _read(f"/proc/{process}/cgroup"),
        "cpus": sorted(os.sched_getaffinity(0 if process == "self" else int(process))),
        "spaces": [os.readlink(f"/proc/{process}/ns/{name}") for name in spaces],
        "limits": _limits(_read(f"/proc/{process}/limits")),
        "rights": [line for line in _read(f"/proc/{process}/status").splitlines() if line.startswith(_RIGHTS)],
    }


def _limits(table: str) -> list[list[str]]:
    """The name, the soft and the hard limit of each resource; of some no soft one."""
    found = []
    for line in table.splitlines()[1:]:
        name, rest = line[:26].strip(), line[26:].split()
        found.append([name, "" if name in _SET else rest[0], rest[1]])
    return found


def is_private(folder: str) -> bool:
    """Whether a folder is this user's, and nobody else can enter it. One that is not there is not."""
    try:
        found = os.lstat(folder)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def _ask(path: str, request: dict[str, Any]) -> bool:
    """Whether the server forked it."""
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(_ANSWER_S)
            link.connect(path)
            outputs = array.array("i", [1, 2])
            data = json.dumps(request).encode()
            link.sendmsg([len(data).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, outputs)])
            link.sendall(data)
            return link.recv(1) == b"+"
    except (OSError, TypeError):
        return False


if __name__ == "__main__":
    main()
