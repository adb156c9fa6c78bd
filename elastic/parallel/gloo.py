"""Gloo with waits that can be ended.

Gloo tells those who wait in it that a connection ended, but not all of them: a receive of which a part has come, and a
send that it has just begun, wait on to the end of their time-out (pair.cc: `signalException` passes over what was taken
out of the queues; measured: of broadcasts of 80 MB whose source is killed, each hangs). So nobody waits inside
gloo here: who waits for an operation is told when gloo ends it, or when it cannot come to an end any more.

An operation that gloo does not end keeps its thread, its tensors and its connections' memory until its time-out, or the
end of the process. Importing this registers the backend.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from torch.futures import Future

from elastic.compat.torch_groups import GLOO_OPERATIONS, GLOO_THREAD, AroundGloo, PythonWork, source_rank

BACKEND = "elastic_gloo"
END_S = 2.0  # operations whose connections are shut down end within milliseconds, or not at all
_POLL_S = 0.002
_lock = threading.Lock()
_groups: list[FreeableGloo] = []


class _Wait(PythonWork):
    """An operation under way, for those who wait for it."""

    def __init__(self, group: FreeableGloo):
        super().__init__()
        self._group, self._running = group, group._running
        self._unended = threading.Lock()
        self._end: Future[Any] = Future()
        self._outcome = self._end.then(_taken)  # C++ sees the error of a callback, but not one that a future was given
        self._failure: str | None = None
        self._source = -1

    def follow(self, work: dist.Work) -> None:
        """Be told by gloo how it ends; it is one of the running until then."""
        self._running.add(self)
        try:
            future: Future[Any] = work.get_future()
        except (RuntimeError, NotImplementedError):  # sends, receives and scattered sums have none
            threading.Thread(target=self._follow_blocked, args=(work,), name="gloo-wait", daemon=True).start()
        else:
            future.add_done_callback(self._take)

    def _take(self, future: Future[Any]) -> None:
        self._running.discard(self)
        try:
            value = future.value()
        except RuntimeError as error:
            self._group.failure = str(error)
            self.end(failure=str(error))
        else:
            self.end(value)

    def _follow_blocked(self, work: dist.Work) -> None:
        failure = None
        try:
            work.wait()
            with suppress(RuntimeError):  # only a receive has one
                self._source = source_rank(work)
        except RuntimeError as error:
            self._group.failure = failure = str(error)
        self._running.discard(self)
        self.end(failure=failure)

    def end(self, value: Any = None, *, failure: str | None = None) -> None:
        """Tell those who wait how it ended, unless they were told."""
        if self._unended.acquire(blocking=False):
            self._failure = failure
            self._end.set_result(value if failure is None else dist.DistBackendError(failure))

    def wait(self, timeout: Any = None) -> bool:
        """Returns True. The time-out is the group's.

        Raises:
            DistBackendError: it failed.
        """
        self.result()
        return True

    def synchronize(self) -> None:
        self.result()

    def get_future(self) -> Future[Any]:
        return self._outcome

    def is_completed(self) -> bool:
        return self._outcome.done()

    def result(self) -> Any:
        try:
            return self._outcome.wait()
        except RuntimeError:
            raise dist.DistBackendError(self._failure) from None  # without the words of the callback around it

    def source_rank(self) -> int:
        return self._source


def _taken(end: Future[Any]) -> Any:
    value = end.value()
    if isinstance(value, dist.DistBackendError):
        raise value
    return value


class FreeableGloo(AroundGloo):
    """A gloo process group for CPU tensors, whose waits can be ended."""

    def __init__(self, options: Any, _: Any):
        super().__init__(options.store, options.group_rank, options.group_size, options.timeout)
        self._running: set[_Wait] = set()
        self._freed: str | None = None
        self.failure: str | None = None  # why one of its operations failed, if any did
        with _lock:
            _groups.append(self)

    def _start(self, operation: str, *arguments: Any, **options: Any) -> _Wait:
        wait = _Wait(self)
        try:
            work = getattr(self.inner, operation)(*arguments, **options)
        except RuntimeError as error:
            if operation in _AT_ONCE:
                self.failure = str(error)
            raise
        wait.follow(work)
        if self._freed is not None:
            wait.end(failure=self._freed)
        return wait

    def free(self, why: str) -> None:
        """Whoever waits, now or later, is told that the group was aborted."""
        self._freed = f"gloo was aborted: {why}"
        for wait in list(self._running):
            wait.end(failure=self._freed)

    @property
    def is_running(self) -> bool:
        """Whether gloo has not ended all operations."""
        return bool(self._running)

    def shutdown(self) -> None:
        """Drop gloo, which closes its connections. One that still runs is kept: dropping it would wait for it."""
        with _lock:
            if self not in _groups:
                return
            _groups.remove(self)
        if self._running:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.inner))
        del self.inner


#: Those for which gloo says at once that a connection has ended; of others it does so only to who waits.
_AT_ONCE = ("recv", "recv_anysource", "send")


def _forward(operation: str) -> Callable[..., _Wait]:
    def start(self: FreeableGloo, *arguments: Any, **options: Any) -> _Wait:
        return self._start(operation, *arguments, **options)

    start.__name__ = start.__qualname__ = operation
    return start


for _operation in GLOO_OPERATIONS:
    setattr(FreeableGloo, _operation, _forward(_operation))

dist.Backend.register_backend(BACKEND, FreeableGloo, extended_api=True, devices=["cpu"])


def groups() -> list[FreeableGloo]:
    """All that were not shut down."""
    with _lock:
        return list(_groups)


def settle(of: Sequence[FreeableGloo], is_connected: Callable[[], bool]) -> None:
    """Wait until nothing is written to any tensor any more: the operations have ended, or cannot.

    Args:
        is_connected: whether any connection of these groups is still open; they were shut down.
    """
    deadline, idle = time.monotonic() + END_S, 0
    while any(group.is_running for group in of) and time.monotonic() < deadline and idle < 2:
        idle = idle + 1 if not is_connected() and not _is_working() else 0
        time.sleep(_POLL_S)


def _is_working() -> bool:
    """Whether any of gloo's threads computes, copies or is about to: it does not sleep."""
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            with open(f"/proc/self/task/{task}/stat") as file:
                name, _, rest = file.read().partition("(")[2].rpartition(")")
            if name == GLOO_THREAD and rest.split()[0] != "S":
                return True
    return False
