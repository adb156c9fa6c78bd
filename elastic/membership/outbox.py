"""The messages of a worker to the server, kept until they are known to have taken effect.

The server may die after it received a message. So every member of the world keeps rows until the ledger has them: the
member that sends them may die too. Messages that others wait for (shares of a checkpoint, the outcome) are kept until
the keeper has acted on them. After a reconnection everything kept is sent again; the keeper drops what it has already.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from elastic.membership.protocol import Done, Failed, MemberMessage, RowKey, Rows, SavedAlone, Share, Unfit
from elastic.membership.world import Generation

Outgoing = tuple[MemberMessage | Unfit, Generation | None]  # a message, and the generation under which it is sent
_KEPT = (Share, Done, Failed, SavedAlone)
_ROWS_AT_ONCE = 256
_EARLY = 4096  # rows that another member recorded before this worker did, and whose keys are remembered


def row_key(row: dict[str, Any]) -> RowKey:
    """What identifies a row: generation, step, and whether it is an evaluation's."""
    return str(row["generation"]), int(row["step"]), "sample_hash" not in row


@dataclass(frozen=True)
class _Row:
    """A row to keep, and to send if this worker reports."""

    row: dict[str, Any]
    generation: Generation
    report: bool


@dataclass(frozen=True)
class _Report:
    """This worker reports from now on."""

    generation: Generation


@dataclass(frozen=True)
class _Undone:
    """The steps after `step` will be done again."""

    step: int


class Outbox:
    """`put`, `record`, `report` and `undone` are for any thread, all other methods for the thread that sends."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Outgoing | _Row | _Report | _Undone] = queue.SimpleQueue()
        self._again: list[Outgoing] = []
        self._rows: dict[RowKey, dict[str, Any]] = {}
        self._early: dict[RowKey, None] = {}
        self._kept: list[Outgoing] = []
        self._reports = False

    def put(self, message: MemberMessage | Unfit, generation: Generation | None = None) -> None:
        """Send the message. A kind that others wait for is kept until the keeper has acted on it."""
        self._queue.put((message, generation))

    def record(self, row: dict[str, Any], generation: Generation, *, report: bool) -> None:
        """Keep a row, and send it under `generation` if this worker is the one that reports."""
        self._queue.put(_Row(row, generation, report))

    def report(self, generation: Generation) -> None:
        """This worker reports from now on: send all kept rows, since the ledger may lack them."""
        self._queue.put(_Report(generation))

    def undone(self, step: int) -> None:
        """Forget the kept rows of steps after `step`: those steps will be done again."""
        self._queue.put(_Undone(step))

    # ---- the sending thread ------------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether there is a message to send, or one that was sent and that others still wait for."""
        return bool(self._again or self._kept) or not self._queue.empty()

    def take(self) -> Outgoing | None:
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
                case outgoing:
                    if isinstance(outgoing[0], _KEPT):
                        self._kept.append(outgoing)
                    return outgoing
        return self._again.pop(0)

    def resend(self, generation: Generation) -> None:
        """Send everything kept again: the server may have lost what it received in the world of `generation`."""
        rows = self._all_rows(generation) if self._reports else []
        self._again = rows + self._kept  # a share of a checkpoint comes after the row of its step

    def left_world(self) -> None:
        """The world is over: the checkpoint that it was saving will not be committed, and another member may report."""
        self._reports = False
        self._kept = [outgoing for outgoing in self._kept if not isinstance(outgoing[0], Share)]
        self._again = [outgoing for outgoing in self._again if not isinstance(outgoing[0], (Share, Rows))]

    def recorded(self, keys: Iterable[RowKey]) -> None:
        """The ledger has these rows."""
        for key in keys:
            if self._rows.pop(key, None) is None:
                self._early[key] = None
        while len(self._early) > _EARLY:
            del self._early[next(iter(self._early))]

    def decided(self, step: int, attempt: str) -> None:
        """The keeper has decided on this attempt to save `step`: its shares need not be sent again."""

        def is_decided(message: MemberMessage | Unfit) -> bool:
            return isinstance(message, Share) and (message.step, message.attempt) == (step, attempt)

        self._kept = [outgoing for outgoing in self._kept if not is_decided(outgoing[0])]

    def over(self) -> None:
        """Forget everything: the run is over for this worker."""
        self._kept.clear()
        self._again.clear()

    def _keep_row(self, row: dict[str, Any]) -> None:
        key = row_key(row)
        if key in self._early:
            del self._early[key]
        else:
            self._rows[key] = row

    def _all_rows(self, generation: Generation) -> list[Outgoing]:
        rows = list(self._rows.values())
        return [(Rows(rows[i : i + _ROWS_AT_ONCE]), generation) for i in range(0, len(rows), _ROWS_AT_ONCE)]
