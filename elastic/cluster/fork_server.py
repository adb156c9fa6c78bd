"""The process of an embedded cluster that has imported what a run's workers need, and forks each of Ray's worker
processes: a new Python would import torch, for seconds of CPU time. It ends with the driver that started it.

It does not import Ray, whose C++ reads its settings when it is loaded and keeps the state of its random numbers: a fork
loads that itself. It has started no threads and not touched a GPU when it forks. Where that does not hold, it refuses,
and the worker starts as Ray starts it.

    python fork_server.py LISTENING FOLDER   (a descriptor, and where its socket is; ends with standard input)
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import select
import selectors
import shutil
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: In the order in which a run's processes need them; none imports Ray.
_MODULES = (
    "elastic.membership.server",
    "elastic.run.host",
    "torch.distributed",
    "elastic.worker.session",
)
#: Set by Ray for the package with which a worker names its process, and by shells.
_NO_MATTER = ("SPT_NOENV", "PWD", "OLDPWD", "SHLVL", "_")
_REQUEST_S = 10.0


def differing(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Environment variables that a process of the second environment would have read otherwise when it started. Those
    of Ray are read by what a fork imports itself."""
    names = {n for n in mine.keys() | theirs.keys() if not n.startswith("RAY_") and n not in _NO_MATTER}
    return sorted(n for n in names if mine.get(n) != theirs.get(n))


class ForkServer:
    """Forks workers on request.

    Args:
        environment: that of this process when it started.
    """

    def __init__(self, listening: socket.socket, environment: Mapping[str, str]):
        self._environment = environment
        self._threads = _threads()  # those of the numeric libraries, which end their pools before each fork
        self._selector = selectors.DefaultSelector()
        self._listening = listening
        self._selector.register(listening, selectors.EVENT_READ, "request")
        self._selector.register(0, selectors.EVENT_READ, "life")
        self._raylets: dict[int, int] = {}  # process id -> descriptor of the process
        self._workers: dict[int, int] = {}  # such a descriptor -> process id of its raylet

    def serve(self) -> dict[str, Any] | None:
        """Return in each worker with its request, and here when standard input was closed."""
        while True:
            for key, _ in self._selector.select():
                if key.data == "request":
                    request = self._answer()
                    if request is not None:
                        return request
                elif key.data == "life":
                    self._end(None)
                    return None
                elif key.data == "raylet":
                    self._end(key.fd)
                else:
                    self._forget(key.fd)

    def _answer(self) -> dict[str, Any] | None:
        link, _ = self._listening.accept()
        outputs: list[int] = []
        with link:
            try:
                link.settimeout(_REQUEST_S)
                head, outputs, _, _ = socket.recv_fds(link, 4, 2)
                with link.makefile("rb") as stream:
                    request = json.loads(stream.read(int.from_bytes(head, "big")))
                if self._refuses(request):
                    return None
                raylet = request["raylet"]
                self._watch(raylet)
                pid = os.fork()
                if pid == 0:
                    try:
                        self._leave(outputs)
                    except OSError:
                        os._exit(1)
                    return request
                worker = os.pidfd_open(pid)
                self._workers[worker] = raylet
                self._selector.register(worker, selectors.EVENT_READ, "worker")
                link.sendall(b"+")
            except (OSError, ValueError, KeyError) as error:
                print(f"a worker was not forked: {error}", file=sys.stderr)
            finally:
                for descriptor in outputs:
                    os.close(descriptor)
        return None

    def _refuses(self, request: Mapping[str, Any]) -> bool:
        others = _threads() - self._threads
        torch = sys.modules.get("torch")
        cuda = torch is not None and torch.cuda.is_initialized()
        differ = differing(self._environment, request["environment"])
        if others > 0 or cuda or differ:
            print(f"no worker is forked: {others} more threads, CUDA {cuda}, other variables {differ}", file=sys.stderr)
        return bool(others > 0 or cuda or differ)

    def _leave(self, outputs: list[int]) -> None:
        """In a worker: give up what only the server has."""
        os.setpgid(0, 0)  # Ray signals the whole process group of a worker that has ended
        for descriptor in (*self._raylets.values(), *self._workers):
            os.close(descriptor)
        self._selector.close()
        self._listening.close()
        for number, descriptor in enumerate(outputs, 1):
            os.dup2(descriptor, number)
        empty = os.open(os.devnull, os.O_RDONLY)
        os.dup2(empty, 0)
        os.close(empty)

    def _watch(self, raylet: int) -> None:
        if raylet not in self._raylets:
            self._raylets[raylet] = descriptor = os.pidfd_open(raylet)
            self._selector.register(descriptor, selectors.EVENT_READ, "raylet")

    def _end(self, raylet: int | None) -> None:
        """End the workers of a raylet that has ended, at once: their peers wait for them. Without one, all of them."""
        pid = next((p for p, descriptor in self._raylets.items() if descriptor == raylet), None)
        for worker, of in list(self._workers.items()):
            if raylet is None or of == pid:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(worker, signal.SIGKILL)
                if raylet is None:
                    os.waitid(os.P_PIDFD, worker, os.WEXITED)
        if pid is not None:
            self._selector.unregister(self._raylets[pid])
            os.close(self._raylets.pop(pid))

    def _forget(self, worker: int) -> None:
        os.waitid(os.P_PIDFD, worker, os.WEXITED)
        self._selector.unregister(worker)
        del self._workers[worker]
        os.close(worker)


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _be(request: Mapping[str, Any]) -> None:
    """Be this worker: Ray's script with its arguments."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.nice(max(0, request["niceness"] - os.getpriority(os.PRIO_PROCESS, 0)))
    resource.setrlimit(resource.RLIMIT_NOFILE, tuple(request["files"]))
    resource.setrlimit(resource.RLIMIT_CORE, tuple(request["core"]))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # `random` does that by itself
    gc.unfreeze()
    sys.argv = request["command"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")


def main() -> None:
    environment, listening, folder = dict(os.environ), int(sys.argv[1]), sys.argv[2]
    sys.path[0] = str(Path(__file__).parents[2])  # as the driver has it; a worker gets the driver's folders by Ray
    for name in _MODULES:
        if select.select([0], [], [], 0)[0]:
            shutil.rmtree(folder, ignore_errors=True)
            return  # the driver has ended
        importlib.import_module(name)
    importlib.import_module("elastic.compat.torch").load_compiler()
    sys.path[0] = ""
    gc.collect()
    gc.freeze()  # so that collections in workers leave these pages shared
    request = ForkServer(socket.socket(fileno=listening), environment).serve()
    if request is None:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)  # to take down what torch has made would take as long as all the rest
    else:
        _be(request)


if __name__ == "__main__":
    main()
