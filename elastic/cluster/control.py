"""Control of a run from another thread of its driver, as the trials of a sweep use it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from elastic.membership.driver import DriverLink
from elastic.membership.protocol import Allow, Wish


class RunControl:
    """Controls a run that another thread drives: receives its records, lets it go on after a pause, and ends it.

    Args:
        on_record: called with every row and event, on a thread of the run.
    """

    def __init__(self, on_record: Callable[[dict[str, Any]], None]):
        self.on_record = on_record
        self._lock = threading.Lock()
        self._link: DriverLink | None = None
        self._allowed = 0
        self._why: str | None = None

    def allow(self, step: int) -> None:
        """A run that pauses after evaluations (`--eval.hold`) may go up to this step."""
        with self._lock:
            self._allowed = max(self._allowed, step)
            self._send()

    def stop(self, why: str) -> None:
        """Save and end at the next step boundary; a paused run does no further step."""
        with self._lock:
            self._why = why
            self._send()

    def attach(self, link: DriverLink | None) -> None:
        """The run's host is there: send it what was requested before. None: it is gone."""
        with self._lock:
            self._link = link
            self._send()

    def _send(self) -> None:
        if self._link is None:
            return
        try:
            self._link.request(Allow(self._allowed))
            if self._why is not None:
                self._link.request(Wish("stop", self._why))
        except OSError:
            self._link = None  # the run has just ended
