"""What an embedded cluster starts for each of its workers, instead of Ray's `setup_worker.py`: asks the run's fork
server for the process, and ends. Where that cannot be, Ray's script takes its place. It runs for each worker, so it
imports little, and nothing of ours.
"""

from __future__ import annotations

import array
import json
import os
import resource
import socket
import sys
from typing import Any

SOCKET = "ELASTIC_FORK_SERVER"  # environment variable: the path of the server's socket
_CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language="
_FOLDER, _SCRIPT, _ORDINARY = os.path.join("ray", "_private", "workers"), "default_worker.py", "setup_worker.py"
_ANSWER_S = 60.0  # the server may still import


def main() -> None:
    arguments, path = sys.argv[1:], os.environ.pop(SOCKET, None)
    request = requested(arguments)
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
        "raylet": os.getppid(),
    }


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
