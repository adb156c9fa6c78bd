"""The ledger of a run as its keeper writes it: rows once each, events at once, and what is shown to who follows."""

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
from elastic.run.record import Record
from elastic.storage import Storage

T = TypeVar("T")
RECENT_ROWS = 100
LEDGER_S = RETRY_S  # for which a ledger is waited for that cannot be written
_CAN_WAIT = ("worker_warm", "restored")  # kinds of events that are written with the next rows


def event_of(epoch: int, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """An event as the ledger has it; one of no world belongs to the claim: its generation is `epoch-0`."""
    given = {k: clean(v) for k, v in fields.items() if v is not None}
    return {"time": time.time(), "kind": kind, "generation": f"{epoch}-0", **given}


class LedgerWriter:
    """All methods on the keeper's thread, but for `recent`. A storage that is away for a while is waited for.

    Args:
        tensorboard: write its event files too.
        on_full: called once when the storage is full, to make room.
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
        self._wants_board = tensorboard
        self._board: TensorBoard | None = None
        self._to_confirm: list[RowKey] = []
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT_ROWS)

    def recent(self) -> list[dict[str, Any]]:
        """The newest rows, which need not be in storage yet. From any thread."""
        return list(self._recent)

    def add_rows(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Take in rows; returns those that are new."""
        fault.point("ledger.rows", -1, rows[0]["step"])
        new = []
        for row in rows:
            self._to_confirm.append(row_key(row))
            if not self._record.take_row(row):
                continue  # sent again by who could not know that it had arrived
            new.append(row)
            self._rows.add(row)
            self._recent.append(row)
            if self._wants_board:
                self._board = self._board or TensorBoard(self._storage, self._epoch)
                self._board.row(row)
        return new

    def add_event(self, event: dict[str, Any]) -> None:
        """Write an event, so that nobody hears of what the ledger does not know."""
        self._events.add(event)
        if event["kind"] not in _CAN_WAIT:
            self.patiently(self._events.flush)

    def flush_rows(self) -> None:
        """Write the rows that are queued."""
        self.patiently(self._rows.flush)

    def flush(self, confirm: Callable[[list[RowKey]], None]) -> None:
        """Write what is queued; `confirm` is told of rows that are in storage now."""
        self.flush_rows()
        self.patiently(self._events.flush)
        if self._board:
            self._board.flush()
        if self._to_confirm:
            fault.point("ledger.recorded", -1, self._to_confirm[-1][1])
            confirm(self._to_confirm)
            self._to_confirm = []

    def compact(self) -> None:
        """The end: all in one file each."""
        self.patiently(self._rows.compact)
        self.patiently(self._events.compact)
        if self._board:
            self._board.flush()

    def patiently(self, call: Callable[..., T], *args: Any) -> T:
        """Whatever storage raises is waited for: a full disk gets room, and a permission comes back."""

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
        """Write out what others can read meanwhile, and no more."""
        if self._board:
            self._board.close()
