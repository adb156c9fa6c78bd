"""What the workers of a run on Ray print: Ray brings it to the driver, also what a worker said while it died."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from elastic.cluster.noise import worth_showing
from elastic.compat.ray import worker_lines_heard
from elastic.errors import RunFailed
from elastic.membership.driver import DriverLink
from elastic.membership.protocol import Note
from elastic.run.logs import RunLogs

WORDS_S = 2.0  # Ray looks for new lines a few times a second
QUIET_S = 0.7
_MOST_UNKNOWN, _MOST_LINES = 1000, 200  # processes that are no worker so far, and lines of each
_DIED = ("process_ended", "member_lost", "member_evicted")


class WorkersOutput:
    """Sorts lines by worker, and tells the run's host the last words of one that died. From any thread.

    Args:
        link: to the host, once it is known.
    """

    def __init__(self, logs: RunLogs):
        self._logs = logs
        self.link: DriverLink | None = None
        self._lock = threading.Lock()
        self._workers: dict[tuple[str, str], str] = {}
        self._unknown: OrderedDict[tuple[str, str], deque[str]] = OrderedDict()
        self._mourned: set[str] = set()
        self._came, self._newest = threading.Event(), time.monotonic()

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Inside, lines are taken in as they come."""
        with worker_lines_heard(self._hear):
            try:
                yield
            except RunFailed:
                self._settle()
                raise

    def _settle(self) -> None:
        """Of a run that failed, wait for what its workers printed at last."""
        deadline = time.monotonic() + WORDS_S
        while (newest := self._newest) + QUIET_S > time.monotonic() < deadline:
            self._came.wait(min(newest + QUIET_S, deadline) - time.monotonic())
            self._came.clear()

    def _hear(self, ip: str, pid: str, lines: list[str]) -> None:
        lines, key = worth_showing(pid, lines), (ip, pid)
        self._newest = time.monotonic()
        self._came.set()
        with self._lock:
            worker = self._workers.get(key)
            if worker is None:
                self._unknown.setdefault(key, deque(maxlen=_MOST_LINES)).extend(lines)
                while len(self._unknown) > _MOST_UNKNOWN:
                    self._unknown.popitem(last=False)
        if worker is not None:
            self._logs.add(worker, lines)

    def on_record(self, record: dict[str, Any]) -> None:
        """Hear which process is which worker, and of those that died."""
        self._logs.on_record(record)
        kind, member = record.get("kind"), record.get("member")
        if not isinstance(member, str):
            return
        if kind == "worker_warm" and "host" in record:
            key = (str(record["host"]), str(record["pid"]))
            with self._lock:
                self._workers[key] = member
                early = list(self._unknown.pop(key, ()))
            self._logs.add(member, early)
        elif kind in _DIED and member not in self._mourned:
            self._mourned.add(member)
            timer = threading.Timer(WORDS_S, self._tell, (member,))
            timer.daemon = True
            timer.start()

    def _tell(self, member: str) -> None:
        words = self._logs.last_words(member)
        if words and self.link is not None:
            with suppress(OSError):  # the host is away, or the run is over: the log has them
                self.link.request(Note("last_words", f"worker {member}: {words}"))
