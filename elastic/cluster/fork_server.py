"""A process that has imported what a run's workers need, and forks Ray's worker processes: a new Python would import
torch, for seconds of CPU time.

It does not import Ray, whose C++ reads its settings when it is loaded and keeps the state of its random numbers: a fork
loads that itself. It has started no threads and not touched a GPU when it forks. Where that does not hold, it refuses,
and the worker starts as Ray starts it.

    python fork_server.py LISTENING FOLDER                   (of an embedded cluster; ends with standard input)
    python fork_server.py LISTENING FOLDER LOCK RAYLET IDLE  (of a node of a standing one; ends with its raylet, or
                                                              after IDLE seconds without a request or a busy fork)

LISTENING and LOCK are descriptors, FOLDER is where its socket is.
"""

from __future__ import annotations

import contextlib
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
import time
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
#: What Ray and Ray Train import of others, some of which an installation may lack.
_OF_RAY = ("requests", "yaml", "jsonschema", "psutil", "google.protobuf.json_format", "pydantic", "pandas")
#: Set by Ray for the package with which a worker names its process, and by shells.
_NO_MATTER = ("SPT_NOENV", "PWD", "OLDPWD", "SHLVL", "_")
_UNSET = {"LD_PRELOAD": ""}  # an empty one, which a raylet makes for its workers, means the same as none
_PATH = "PYTHONPATH"
_NO_JOB = "f" * 8  # Ray's id of the job of a worker that it starts ahead
_IDLE = b"ray::IDLE"  # the name of a worker without work
_NICENESS, _USUAL_NICENESS = "RAY_worker_niceness", 15  # what Ray adds to that of its workers
_REQUEST_S = 10.0
_LOOK_S = 30.0


def differing(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Environment variables that a process of the second environment would have read otherwise when it started. Those
    of Ray are read by what a fork imports itself; folders that its path has in addition are added to it."""
    names = {n for n in mine.keys() | theirs.keys() if not n.startswith("RAY_") and n not in (*_NO_MATTER, _PATH)}
    differ = sorted(n for n in names if mine.get(n, _UNSET.get(n)) != theirs.get(n, _UNSET.get(n)))
    return differ if more_folders(mine, theirs) is not None else [*differ, _PATH]


def more_folders(mine: Mapping[str, str], theirs: Mapping[str, str]) -> list[str] | None:
    """The folders that a process of the second environment searches before those of the first; None if it searches
    others in another way, or they have what Python runs when it starts."""
    have, wanted = (e.get(_PATH, "").split(os.pathsep) if e.get(_PATH) else [] for e in (mine, theirs))
    more = wanted[: len(wanted) - len(have)] if len(wanted) >= len(have) else []
    if [*more, *have] != wanted:
        return None
    hooks = ("sitecustomize", "usercustomize")
    return None if any(f.partition(".")[0] in hooks for d in more if os.path.isdir(d) for f in os.listdir(d)) else more


class ForkServer:
    """Forks workers on request.

    Args:
        environment: that of this process when it started.
        life: a descriptor that becomes readable when the server is to end.
        raylet: the only one that is served, and what it asks for must be where this process is; None for any.
        idle_s: it ends after so long without a request, and without forks that have work.
    """

    def __init__(
        self,
        listening: socket.socket,
        environment: Mapping[str, str],
        life: int,
        raylet: int | None = None,
        idle_s: float | None = None,
    ):
        self._environment, self._raylet, self._idle_s = environment, raylet, idle_s
        self._threads = _threads()  # those of the numeric libraries, which end their pools before each fork
        self._selector = selectors.DefaultSelector()
        self._listening = listening
        self._selector.register(listening, selectors.EVENT_READ, "request")
        self._selector.register(life, selectors.EVENT_READ, "life")
        self._raylets: dict[int, int] = {}  # process id -> descriptor of the process
        self._workers: dict[int, tuple[int, int]] = {}  # such a descriptor -> its process id, and that of its raylet
        self._asked, self._installed = time.monotonic(), _installed()

    def serve(self) -> dict[str, Any] | None:
        """Return in each worker with its request, and here at the end."""
        while True:
            for key, _ in self._selector.select(None if self._idle_s is None else min(self._idle_s, _LOOK_S)):
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
            if self._is_idle():
                return None

    def _is_idle(self) -> bool:
        """Whether nobody needs this server any more. Ends its forks when all have waited for work for too long: one
        that a run has left idle may hold objects of the run."""
        if self._idle_s is None:
            return False
        if _installed() == self._installed and time.monotonic() - self._asked < self._idle_s:
            return False
        if all(_waits(pid) for pid, _ in self._workers.values()):
            for worker in self._workers:
                with contextlib.suppress(OSError):
                    signal.pidfd_send_signal(worker, signal.SIGKILL)
        return not self._workers

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
                told, tell = os.pipe()
                pid = os.fork()
                if pid == 0:
                    try:
                        os.close(tell)
                        if not os.read(told, 1):  # who asked has given up: Ray starts the worker itself
                            os._exit(0)
                        os.close(told)
                        self._leave(outputs)
                    except OSError:
                        os._exit(1)
                    return request
                os.close(told)
                try:
                    worker = os.pidfd_open(pid)
                    self._workers[worker] = pid, raylet
                    self._selector.register(worker, selectors.EVENT_READ, "worker")
                    self._asked = time.monotonic()
                    link.sendall(b"+")
                    os.write(tell, b"+")
                finally:
                    os.close(tell)
            except (OSError, ValueError, KeyError) as error:
                print(f"a worker was not forked: {error}", file=sys.stderr)
            finally:
                for descriptor in outputs:
                    os.close(descriptor)
        return None

    def _refuses(self, request: Mapping[str, Any]) -> bool:
        from elastic.cluster.fork_request import place  # not found yet when this script starts

        others = _threads() - self._threads
        torch = sys.modules.get("torch")
        cuda = torch is not None and torch.cuda.is_initialized()
        differ = differing(self._environment, request["environment"])
        if _installed() != self._installed:
            differ.append("packages")
        here = self._raylet, place("self")
        elsewhere = self._raylet is not None and here != (request["raylet"], request["place"])
        if others > 0 or cuda or differ or elsewhere:
            print(
                f"no worker is forked: {others} more threads, CUDA {cuda}, other variables {differ}, another raylet, "
                f"control group, CPUs or namespaces {elsewhere}",
                file=sys.stderr,
                flush=True,
            )
        return bool(others > 0 or cuda or differ or elsewhere)

    def _leave(self, outputs: list[int]) -> None:
        """In a worker: give up what only the server has."""
        os.setpgid(0, 0)  # Ray signals the whole process group of a worker that has ended
        for key in list(self._selector.get_map().values()):
            if key.fd > 2:
                os.close(key.fd)
        self._selector.close()
        self._listening.detach()
        for number, descriptor in enumerate(outputs, 1):
            os.dup2(descriptor, number)
        empty = os.open(os.devnull, os.O_RDONLY)
        os.dup2(empty, 0)
        os.close(empty)

    def _watch(self, raylet: int) -> None:
        if raylet not in self._raylets and self._raylet is None:
            self._raylets[raylet] = descriptor = os.pidfd_open(raylet)
            self._selector.register(descriptor, selectors.EVENT_READ, "raylet")

    def _end(self, raylet: int | None) -> None:
        """End the workers of a raylet that has ended, at once: their peers wait for them. Without one, all of them."""
        pid = next((p for p, descriptor in self._raylets.items() if descriptor == raylet), None)
        for worker, (_, of) in list(self._workers.items()):
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


def _installed() -> dict[str, int]:
    """When each folder of installed packages was changed: what the server has imported may be older."""
    return {f: os.stat(f).st_mtime_ns for f in sys.path if f.endswith("-packages") and os.path.isdir(f)}


def _waits(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0 ") == _IDLE
    except OSError:
        return True  # it has ended


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _be(request: Mapping[str, Any], environment: Mapping[str, str], *, standing: bool) -> None:
    """Be this worker: Ray's script with its arguments.

    Args:
        environment: that of the server.
        standing: of a standing cluster, where Ray starts a worker before there is a job only if we ask for it.
    """
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.umask(request["umask"])
    excess = os.getpriority(os.PRIO_PROCESS, 0) - request["niceness"]
    os.nice(max(0, -excess))
    if excess > 0:  # a worker started the server, which Ray had made so much nicer already as it will this one
        wanted = int(os.environ.get(_NICENESS) or _USUAL_NICENESS)
        os.environ[_NICENESS] = str(max(0, wanted - excess))
    resource.setrlimit(resource.RLIMIT_NOFILE, tuple(request["files"]))
    resource.setrlimit(resource.RLIMIT_CORE, tuple(request["core"]))
    with contextlib.suppress(OSError):  # only more than now, if this user may not lower it
        Path("/proc/self/oom_score_adj").write_text(str(request["oom_score"]))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # `random` does that by itself
    sys.argv = request["command"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    sys.path[1:1] = more_folders(environment, request["environment"]) or []
    if standing and request["environment"].get("RAY_JOB_ID") == _NO_JOB:
        importlib.import_module("elastic.compat.ray_train")  # there is time, and a worker needs it
    runpy.run_path(sys.argv[0], run_name="__main__")


def _import_all(life: int) -> bool:
    """Import what forks need; False if the driver or the raylet ended meanwhile."""
    with importlib.import_module("elastic.garbage").importing():  # so collections in workers leave these pages shared
        for name in _MODULES:
            if select.select([life], [], [], 0)[0]:
                return False
            importlib.import_module(name)
        importlib.import_module("elastic.compat.torch").load_compiler()
        for name in _OF_RAY:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    return True


def main() -> None:
    environment, listening, folder = dict(os.environ), int(sys.argv[1]), sys.argv[2]
    standing = len(sys.argv) > 3
    if standing and os.fork():
        os._exit(0)  # what started it may end, and Ray ends the children of its workers
    sys.path[0] = str(Path(__file__).parents[2])  # as the driver has it; a worker gets the driver's folders by Ray
    life, raylet, idle_s = 0, None, None
    if standing:
        raylet, idle_s = int(sys.argv[4]), float(sys.argv[5])
        life = os.pidfd_open(raylet)
    if not _import_all(life):
        shutil.rmtree(folder, ignore_errors=True)
        return
    sys.path[0] = ""
    request = ForkServer(socket.socket(fileno=listening), environment, life, raylet, idle_s).serve()
    if request is None:
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)  # to take down what torch has made would take as long as all the rest
    if standing:
        os.close(int(sys.argv[3]))  # the lock is the server's
    _be(request, environment, standing=standing)


if __name__ == "__main__":
    main()
