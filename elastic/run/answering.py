"""Storage whose calls end within a time limit. A file system that hangs (NFS without its server, a failing disk) blocks
its caller for ever, and no call can be cancelled. So each call is made by a thread that can be left behind."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

from elastic.errors import StorageHung
from elastic.storage import Storage

T = TypeVar("T")
HUNG_S = 60.0
REMOVAL_S = 600.0  # a checkpoint in an object store is thousands of objects
AGAIN_S = 5.0  # time limit after a call hung, until one answers again
_LOOKS = 10  # the limit is counted in so many turns, so that a turn in which this process was stopped counts once


class AnsweringStorage(Storage):
    """The same storage, with methods that raise `StorageHung` if it does not answer in time. From any thread.

    A call that was left behind may still take effect at any later time.

    Args:
        on_hung: called with a text for each call that hung, before the exception is raised.
    """

    def __init__(self, storage: Storage, on_hung: Callable[[str], None]):
        vars(self).update(vars(storage))
        self._on_hung = on_hung
        self._lock = threading.Lock()
        self._idle: list[_Helper] = []
        self._hangs = False
        self._left: dict[str, bytes] = {}  # contents of files whose create hung

    def create(self, name: str, data: bytes) -> None:
        try:
            self._ask(f"create {name}", HUNG_S, super().create, name, data)
        except StorageHung:
            self._left[name] = data
            raise
        except FileExistsError:
            if self._left.get(name) != data:
                raise

    def replace(self, name: str, data: bytes) -> None:
        self._ask(f"write {name}", HUNG_S, super().replace, name, data)

    def append(self, name: str, data: bytes) -> None:
        self._ask(f"append to {name}", HUNG_S, super().append, name, data)

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        return self._ask(f"read {name}", HUNG_S, super().read, name, start, end)

    def exists(self, name: str) -> bool:
        return self._ask(f"look for {name}", HUNG_S, super().exists, name)

    def size(self, name: str) -> int:
        return self._ask(f"look at {name}", HUNG_S, super().size, name)

    def modified(self, name: str) -> float:
        return self._ask(f"look at {name}", HUNG_S, super().modified, name)

    def names(self, folder: str = "") -> list[str]:
        return self._ask(f"list {folder or 'the folder'}", HUNG_S, super().names, folder)

    def sizes(self, folder: str) -> dict[str, int]:
        return self._ask(f"list {folder}", HUNG_S, super().sizes, folder)

    def remove(self, name: str) -> None:
        self._ask(f"remove {name}", REMOVAL_S, super().remove, name)

    def close(self) -> None:
        """End the idle threads."""
        with self._lock:
            for helper in self._idle:
                helper.end()
            self._idle.clear()

    def _ask(self, what: str, most_s: float, call: Callable[..., T], *args: Any) -> T:
        with self._lock:
            helper = self._idle.pop() if self._idle else _Helper()
        answer: Future[T] = helper.ask(call, args)
        most_s = AGAIN_S if self._hangs else most_s
        for _ in range(_LOOKS):
            if wait([answer], most_s / _LOOKS).done:
                self._hangs = False
                with self._lock:
                    self._idle.append(helper)
                return answer.result()
        self._hangs = True
        helper.end()  # takes effect if its call ever returns
        text = f"{self.url} did not answer for {most_s:g} s, asked to {what}"
        self._on_hung(text)
        raise StorageHung(text)


class _Helper:
    """A thread that makes one call after another."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._work, name="keeper-storage", daemon=True).start()

    def ask(self, call: Callable[..., T], args: tuple[Any, ...]) -> Future[T]:
        answer: Future[T] = Future()
        self._calls.put((answer, call, args))
        return answer

    def end(self) -> None:
        self._calls.put(None)

    def _work(self) -> None:
        while (one := self._calls.get()) is not None:
            answer, call, args = one
            try:
                answer.set_result(call(*args))
            except BaseException as error:  # any exception is raised again where the answer is waited for
                answer.set_exception(error)
