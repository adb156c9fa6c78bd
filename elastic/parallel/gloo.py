"""Gloo with waits that can be ended.

Gloo tells most waiting operations that a connection ended, but not all: a receive of which a part has arrived, and a
send that has just begun, wait until their time-out (pair.cc: `signalException` skips operations that were taken out of
the queues; measured: broadcasts of 80 MB whose source is killed all hang). So no thread waits inside gloo here: a wait
ends when gloo ends the operation, or when the operation cannot end any more.

An operation that gloo does not end keeps its thread, its tensors and its connections' memory until its time-out, or the
end of the process. Importing this module registers the backend.
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
    """A pending operation, for the threads that wait for it."""

    def __init__(self, group: FreeableGloo):
        super().__init__()
        self._group, self._running = group, group._running
        self._unended = threading.Lock()
        self._end: Future[Any] = Future()
        self._outcome = self._end.then(_value_or_error)  # C++ sees an error of a callback, but no error as a value
        self._failure: str | None = None
        self._source = -1

    def follow(self, work: dist.Work) -> None:
        """Have gloo end this wait; until then it counts as running."""
        self._running.add(self)
        try:
            future: Future[Any] = work.get_future()
        except (RuntimeError, NotImplementedError):  # sends, receives and scattered sums have no future
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
            with suppress(RuntimeError):  # only a receive has a source
                self._source = source_rank(work)
        except RuntimeError as error:
            self._group.failure = failure = str(error)
        self._running.discard(self)
        self.end(failure=failure)

    def end(self, value: Any = None, *, failure: str | None = None) -> None:
        """End the wait with a value or a failure, unless it has ended already."""
        if self._unended.acquire(blocking=False):
            self._failure = failure
            self._end.set_result(value if failure is None else dist.DistBackendError(failure))

    def wait(self, timeout: Any = None) -> bool:
        """Wait for the operation; returns True. The group's time-out applies, not this one.

        Raises:
            DistBackendError: the operation failed.
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
            raise dist.DistBackendError(self._failure) from None  # without the callback's text around it

    def source_rank(self) -> int:
        return self._source


def _value_or_error(end: Future[Any]) -> Any:
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
        self.failure: str | None = None  # why an operation failed, if one did
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
        """End all waits, present and future, with the error that the group was aborted."""
        self._freed = f"gloo was aborted: {why}"
        for wait in list(self._running):
            wait.end(failure=self._freed)

    @property
    def is_running(self) -> bool:
        """Whether gloo has operations that have not ended."""
        return bool(self._running)

    def shutdown(self) -> None:
        """Drop the gloo group, which closes its connections. It is kept if an operation runs: dropping would wait."""
        with _lock:
            if self not in _groups:
                return
            _groups.remove(self)
        if self._running:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.inner))
        del self.inner


#: Operations whose start fails if a connection has ended; other operations report that only when waited for.
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
    """All groups that were not shut down."""
    with _lock:
        return list(_groups)


def settle(of: Sequence[FreeableGloo], is_connected: Callable[[], bool]) -> None:
    """Wait until no tensor is written to any more: all operations have ended, or cannot go on.

    Args:
        is_connected: whether any connection of these groups is open; they were shut down before.
    """
    deadline, idle = time.monotonic() + END_S, 0
    while any(group.is_running for group in of) and time.monotonic() < deadline and idle < 2:
        idle = idle + 1 if not is_connected() and not _is_working() else 0
        time.sleep(_POLL_S)


def _is_working() -> bool:
    """Whether a gloo thread is computing, copying or about to: it is not asleep."""
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            with open(f"/proc/self/task/{task}/stat") as file:
                name, _, rest = file.read().partition("(")[2].rpartition(")")
            if name == GLOO_THREAD and rest.split()[0] != "S":
                return True
    return False
