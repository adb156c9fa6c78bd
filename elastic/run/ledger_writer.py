"""The writer of a run's ledger, in the keeper: each row is written once, events at once, and the newest rows are kept
for those who follow the run."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from elastic import fault
from elastic.checkpoint.patience import RETRY_S, is_from_storage, is_no_room, patiently
from elastic.membership.outbox import RowKey, row_key
from elastic.observe.ledger import EVENTS, METRICS, LedgerFile
from elastic.observe.tensorboard import TensorBoard
from elastic.redact import clean
from elastic.run.record import RESTORED, Record
from elastic.storage import Storage

T = TypeVar("T")
RECENT_ROWS = 100
LEDGER_S = RETRY_S  # how long writing is retried
_CAN_WAIT = ("worker_warm", "restored")  # kinds of events that are written with the next rows


def event_of(epoch: int, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return an event as the ledger stores it. An event without a world gets the generation of the claim, `epoch-0`."""
    given = {k: clean(v) for k, v in fields.items() if v is not None}
    return {"time": time.time(), "kind": kind, "generation": f"{epoch}-0", **given}


class LedgerWriter:
    """Writes the rows and events of one claim. All methods but `recent` are called on the keeper's thread. Storage that
    does not answer is retried for `patience_s` seconds.

    Args:
        tensorboard: write TensorBoard's event files too.
        on_full: called once when the storage is full, to free some of it.
    """

    def __init__(
        self,
        storage: Storage,
        epoch: int,
        record: Record,
        *,
        tensorboard: bool,
        on_full: Callable[[], None] = lambda: None,
    ):
        self._on_full, self._is_full = on_full, False
        self._storage, self._epoch, self._record = storage, epoch, record
        self._rows = LedgerFile(storage, METRICS, epoch)
        self._events = LedgerFile(storage, EVENTS, epoch)
        self.patience_s = LEDGER_S
        self._wants_tensorboard = tensorboard
        self._tensorboard: TensorBoard | None = None
        self._to_confirm: list[RowKey] = []
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT_ROWS)

    def recent(self) -> list[dict[str, Any]]:
        """Return the newest rows, which need not be in storage yet. May be called from any thread."""
        return list(self._recent)

    def add_rows(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Queue rows to be written; returns those that are new."""
        fault.point("ledger.rows", -1, rows[0]["step"])
        new = []
        for row in rows:
            self._to_confirm.append(row_key(row))
            if not self._record.take_row(row):
                continue  # a worker sends a row again if it does not know that the row arrived
            new.append(row)
            self._rows.add(row)
            self._recent.append(row)
            if self._wants_tensorboard:
                self._tensorboard = self._tensorboard or TensorBoard(self._storage, self._epoch)
                self._tensorboard.row(row)
        return new

    def add_event(self, event: dict[str, Any]) -> None:
        """Write an event. Most kinds are written at once, so that nobody learns of an event before it is in the
        ledger."""
        if event["kind"] == RESTORED:
            self._record.restored(event["step"])
        self._events.add(event)
        if event["kind"] not in _CAN_WAIT:
            self.patiently(self._events.flush)

    def flush_rows(self) -> None:
        """Write the rows that are queued."""
        self.patiently(self._rows.flush)

    def flush(self, confirm: Callable[[list[RowKey]], None]) -> None:
        """Write all that is queued, and call `confirm` with the keys of the rows that are now in storage."""
        self.flush_rows()
        self.patiently(self._events.flush)
        if self._tensorboard:
            self._tensorboard.flush()
        if self._to_confirm:
            fault.point("ledger.recorded", -1, self._to_confirm[-1][1])
            confirm(self._to_confirm)
            self._to_confirm = []

    def compact(self) -> None:
        """Merge all rows into one file and all events into another, at the end of the claim."""
        self.patiently(self._rows.compact)
        self.patiently(self._events.compact)
        if self._tensorboard:
            self._tensorboard.flush()

    def patiently(self, call: Callable[..., T], *args: Any) -> T:
        """Call, and retry after any error of storage: a full disk may be freed, and a permission may be restored."""

        def attempt() -> T:
            try:
                found = call(*args)
            except OSError as error:
                if is_no_room(error) and not self._is_full:
                    self._is_full = True
                    self._on_full()
                raise
            self._is_full = False
            return found

        return patiently(attempt, retry_s=self.patience_s, passes=is_from_storage)

    def close(self) -> None:
        """Close the TensorBoard files. Queued rows and events are not written."""
        if self._tensorboard:
            self._tensorboard.close()
