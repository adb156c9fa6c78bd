"""What a worker has to say, kept until it is known to have been heard.

The server may die with what it was told. So rows are kept until the ledger has them, by every member of the world,
because the one that reports them may die too; and what others wait for (shares of a checkpoint, the outcome) until it
has been acted on. After a reconnection everything kept is said again; the keeper drops what it knows.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from elastic.membership.protocol import Done, Failed, MemberMessage, RowKey, Rows, SavedAlone, Share, Unfit
from elastic.membership.world import Generation

Said = tuple[MemberMessage | Unfit, Generation | None]  # a message, and the generation under which it is said
_KEPT = (Share, Done, Failed, SavedAlone)
_ROWS_AT_ONCE = 256
_EARLY = 4096  # rows of others remembered as recorded, before this worker has recorded its own


def row_key(row: dict[str, Any]) -> RowKey:
    """What makes a row the same row."""
    return str(row["generation"]), int(row["step"]), "sample_hash" not in row


@dataclass(frozen=True)
class _Row:
    """A row to keep, and to say if this worker reports."""

    row: dict[str, Any]
    generation: Generation
    report: bool


@dataclass(frozen=True)
class _Report:
    """From now on this worker reports."""

    generation: Generation


@dataclass(frozen=True)
class _Undone:
    """Steps after this one are done again."""

    step: int


class Outbox:
    """`put`, `record`, `report` and `undone` from any thread, everything else from the thread that sends."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Said | _Row | _Report | _Undone] = queue.SimpleQueue()
        self._again: list[Said] = []
        self._rows: dict[RowKey, dict[str, Any]] = {}
        self._early: dict[RowKey, None] = {}
        self._kept: list[Said] = []
        self._reports = False

    def put(self, message: MemberMessage | Unfit, generation: Generation | None = None) -> None:
        """Send the message; what others wait for is kept until it was acted on."""
        self._queue.put((message, generation))

    def record(self, row: dict[str, Any], generation: Generation, *, report: bool) -> None:
        """Keep a row, and send it, under `generation`, if it is this worker that reports."""
        self._queue.put(_Row(row, generation, report))

    def report(self, generation: Generation) -> None:
        """From now on this worker reports rows kept earlier: it sends all that the ledger may lack."""
        self._queue.put(_Report(generation))

    def undone(self, step: int) -> None:
        """Rows of later steps that the ledger lacks are not sent any more: those steps are done again."""
        self._queue.put(_Undone(step))

    # ---- the sending thread ------------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether there is anything to send, or sent that others still wait for."""
        return bool(self._again or self._kept) or not self._queue.empty()

    def take(self) -> Said | None:
        """The next message to send, or None."""
        while not self._again:
            if self._queue.empty():
                return None
            match self._queue.get():
                case _Report(generation):
                    self._reports = True
                    self._again = self._all_rows(generation)
                case _Undone(step):
                    self._rows = {key: row for key, row in self._rows.items() if key[1] <= step}
                case _Row(row, generation, report):
                    self._keep_row(row)
                    if report:
                        return Rows([row]), generation
                case said:
                    if isinstance(said[0], _KEPT):
                        self._kept.append(said)
                    return said
        return self._again.pop(0)

    def say_again(self, generation: Generation) -> None:
        """The server may have lost what it was told in the world of `generation`."""
        rows = self._all_rows(generation) if self._reports else []
        self._again = rows + self._kept  # a share of a checkpoint comes after the row of its step

    def left_world(self) -> None:
        """The world is over: what it was saving is not committed any more, and others may report."""
        self._reports = False
        self._kept = [said for said in self._kept if not isinstance(said[0], Share)]
        self._again = [said for said in self._again if not isinstance(said[0], (Share, Rows))]

    def recorded(self, keys: Iterable[RowKey]) -> None:
        """The ledger has these rows."""
        for key in keys:
            if self._rows.pop(key, None) is None:
                self._early[key] = None
        while len(self._early) > _EARLY:
            del self._early[next(iter(self._early))]

    def decided(self, step: int, attempt: str) -> None:
        """The keeper has decided on this attempt to save `step`."""

        def is_decided(message: MemberMessage | Unfit) -> bool:
            return isinstance(message, Share) and (message.step, message.attempt) == (step, attempt)

        self._kept = [said for said in self._kept if not is_decided(said[0])]

    def over(self) -> None:
        """Nobody waits for anything any more."""
        self._kept.clear()
        self._again.clear()

    def _keep_row(self, row: dict[str, Any]) -> None:
        key = row_key(row)
        if key in self._early:
            del self._early[key]
        else:
            self._rows[key] = row

    def _all_rows(self, generation: Generation) -> list[Said]:
        rows = list(self._rows.values())
        return [(Rows(rows[i : i + _ROWS_AT_ONCE]), generation) for i in range(0, len(rows), _ROWS_AT_ONCE)]
