"""What a worker has to say, kept until it is known to have been heard.

The server may die with what it was told. So rows are kept until the ledger has them, by every member of the world,
because the one that reports them may die too; and what others wait for (shares of a checkpoint, the outcome) until it
has been acted on. After a reconnection everything kept is said again; the keeper drops what it knows.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable
from typing import Any

Message = dict[str, Any]
RowKey = tuple[str, int, bool]  # generation, step, whether it is an evaluation's
_KEPT = ("pack", "done", "failed", "saved alone")
_ROWS_AT_ONCE = 256
_EARLY = 4096  # rows of others remembered as recorded, before this worker has recorded its own


def row_key(row: Message) -> RowKey:
    """What makes a row the same row."""
    return str(row["generation"]), int(row["step"]), "sample_hash" not in row


class Outbox:
    """`put` and `record` from any thread, everything else from the thread that sends."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Message, bool]] = queue.SimpleQueue()
        self._again: list[Message] = []
        self._rows: dict[RowKey, Message] = {}
        self._early: dict[RowKey, None] = {}
        self._kept: list[Message] = []
        self._reports = False

    def put(self, message: Message) -> None:
        """Say this."""
        self._queue.put((message, True))

    def record(self, row: Message, generation: str, *, report: bool) -> None:
        """Keep a row, and say it, under `generation`, if it is this worker that reports."""
        self._queue.put(({"kind": "rows", "rows": [row], "generation": generation}, report))

    def report(self, generation: str) -> None:
        """From now on this worker reports rows kept earlier: it says all that the ledger may lack."""
        self._queue.put(({"kind": "report", "generation": generation}, True))

    def undone(self, step: int) -> None:
        """Rows of later steps that the ledger lacks are not said any more: those steps are done again."""
        self._queue.put(({"kind": "undone", "step": step}, False))

    # ---- the sending thread ------------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether there is anything to say, or said that others still wait for."""
        return bool(self._again or self._kept) or not self._queue.empty()

    def take(self) -> Message | None:
        """The next message to send, or None."""
        if self._again:
            return self._again.pop(0)
        while not self._queue.empty():
            message, say = self._queue.get()
            kind = message["kind"]
            if kind == "report":
                self._reports = True
                self._again = self._all_rows(message["generation"]) + self._again
                return self.take()
            if kind == "undone":
                self._rows = {key: row for key, row in self._rows.items() if key[1] <= message["step"]}
            elif kind == "rows":
                self._keep_rows(message["rows"])
            elif kind in _KEPT:
                self._kept.append(message)
            if say:
                return message
        return None

    def say_again(self, generation: str) -> None:
        """The server may have lost what it was told in the world of `generation`."""
        rows = self._all_rows(generation) if self._reports else []
        self._again = rows + self._kept  # a share of a checkpoint comes after the row of its step

    def left_world(self) -> None:
        """The world is over: what it was saving is not committed any more, and others may report."""
        self._reports = False
        self._kept = [m for m in self._kept if m["kind"] != "pack"]
        self._again = [m for m in self._again if m["kind"] not in ("pack", "rows")]

    def recorded(self, keys: Iterable[RowKey]) -> None:
        """The ledger has these rows."""
        for key in keys:
            if self._rows.pop(key, None) is None:
                self._early[key] = None
        while len(self._early) > _EARLY:
            del self._early[next(iter(self._early))]

    def decided(self, step: int, attempt: str) -> None:
        """The keeper has decided on this attempt to save `step`."""
        self._kept = [m for m in self._kept if m["kind"] != "pack" or (m["step"], m["attempt"]) != (step, attempt)]

    def over(self) -> None:
        """Nobody waits for anything any more."""
        self._kept.clear()
        self._again.clear()

    def _keep_rows(self, rows: list[Message]) -> None:
        for row in rows:
            key = row_key(row)
            if key in self._early:
                del self._early[key]
            else:
                self._rows[key] = row

    def _all_rows(self, generation: str) -> list[Message]:
        rows = list(self._rows.values())
        return [
            {"kind": "rows", "rows": rows[i : i + _ROWS_AT_ONCE], "generation": generation}
            for i in range(0, len(rows), _ROWS_AT_ONCE)
        ]
