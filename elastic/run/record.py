"""The state of the present claim according to the ledger. It is updated with each row and event, and a restarted keeper
rebuilds it from them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

from elastic.checkpoint.cadence import save_cost
from elastic.membership.outbox import row_key
from elastic.membership.world import Generation

STARTED, RESTORED, ENDED = "run_started", "restored", ("run_finished", "run_failed")
_GONE = ("member_lost", "member_evicted", "handed_over")


class Spans:
    """A set of whole numbers, compact if they are mostly consecutive."""

    def __init__(self) -> None:
        self._spans: list[list[int]] = []  # the first and the last number of each run of consecutive numbers

    def add(self, number: int) -> bool:
        """Add a number; returns whether it is new."""
        spans = self._spans
        after = bisect_right(spans, number, key=lambda span: span[0])
        if after and number <= spans[after - 1][1]:
            return False
        joins_left = after > 0 and spans[after - 1][1] == number - 1
        joins_right = after < len(spans) and spans[after][0] == number + 1
        if joins_left and joins_right:
            spans[after - 1][1] = spans.pop(after)[1]
        elif joins_left:
            spans[after - 1][1] = number
        elif joins_right:
            spans[after][0] = number
        else:
            spans.insert(after, [number, number])
        return True


class Record:
    """The claim of `epoch`: its rows and checkpoints, its newest row, its stalls and faults."""

    def __init__(self, epoch: int):
        self._epoch = epoch
        self._rows: dict[tuple[str, bool], Spans] = {}
        self.last_row: dict[str, Any] | None = None
        self.last_eval: dict[str, Any] = {}
        self.evaluated_step = -1
        self.stalls: list[dict[str, Any]] = []
        self.started: float | None = None
        self.claim_step: int | None = None
        self.worlds = 0  # the highest number of a world so far
        self.gone: frozenset[str] = frozenset()
        self.committed: set[tuple[int, str]] = set()
        self.save_costs: list[float] = []  # the seconds that each committed checkpoint cost the training
        self.faults = 0  # the number of lost members that broke a world
        self.ended = False
        self.max_workers: int | None = None  # set once the claim was scaled
        self._broken = False

    def take_row(self, row: dict[str, Any]) -> bool:
        """Take in a row; returns whether it is new. A row that is sent twice counts once.

        An evaluation also counts once if it is repeated, which happens when its world broke after some members had
        finished it.
        """
        generation, step, evaluation = row_key(row)
        if not self._rows.setdefault((generation, evaluation), Spans()).add(step):
            return False
        if evaluation:
            if step == self.evaluated_step:
                return False
            self.last_eval = {k: v for k, v in row.items() if k.startswith("eval/")}
            self.evaluated_step = step
            return True
        if self._broken and self.last_row is not None:
            stall = max(0.0, row["time"] - self.last_row["time"] - self.last_row["step_s"])
            self.stalls.append({"step": row["step"], "seconds": round(stall, 4)})
        if self.last_row is not None and step <= min(self.last_row["step"], self.evaluated_step):
            self.evaluated_step = -1  # the steps are done again from a checkpoint before that evaluation
        self._broken = False
        self.last_row = row
        return True

    def restored(self, step: int) -> None:
        """Note that a world goes on from the state of `step`. An evaluation of a later one is made again: the row of
        its step comes after it, too late to tell it from a repetition."""
        if step < self.evaluated_step:
            self.evaluated_step = -1

    def saved(self, step: int, attempt: str, cost_s: float) -> None:
        """Note a committed checkpoint and the seconds that it cost the training."""
        self.committed.add((step, attempt))
        self.save_costs.append(cost_s)

    def broken(self, *, lost: bool) -> None:
        """Note that the world broke; `lost` if the reason is a lost member."""
        self._broken = True
        self.faults += lost

    def replay(self, rows: Iterable[dict[str, Any]], events: Iterable[dict[str, Any]]) -> None:
        """Take in the rows and events that an earlier keeper of this claim wrote; those of other claims are ignored."""
        ours = [r for r in (*rows, *events) if self._is_ours(r)]
        for record in sorted(ours, key=lambda r: r["time"]):
            if "kind" in record:
                self._take_event(record)
            else:
                self.take_row(record)

    def _is_ours(self, record: dict[str, Any]) -> bool:
        return "generation" in record and Generation.parse(record["generation"]).epoch == self._epoch

    def _take_event(self, event: dict[str, Any]) -> None:
        kind, generation = event["kind"], Generation.parse(event["generation"])
        if kind == STARTED and self.started is None:
            self.started, self.claim_step = event["time"], event["step"]
        elif kind == "world_formed":
            self.worlds = max(self.worlds, generation.n)
            self.gone -= frozenset(event["detail"].get("ids", ()))  # members that had only been silent
        elif kind == "checkpoint_committed":
            self._take_commit(event["step"], event.get("seconds", 0.0), event["detail"])
        elif kind == RESTORED:
            self.restored(event["step"])
            if self.claim_step is not None:  # lower if the newest checkpoint was damaged
                self.claim_step = min(self.claim_step, event["step"])
        elif kind == "scaled":
            self.max_workers = event["detail"]["max_workers"]
        elif kind in ENDED:
            self.ended = True
        if kind in _GONE and "member" in event:
            self.gone |= {event["member"]}
        if kind in ("member_lost", "world_broken") and generation.n == self.worlds > 0:
            self.broken(lost=kind == "member_lost")

    def _take_commit(self, step: int, seconds: float, detail: dict[str, Any]) -> None:
        if "stall_s" in detail:
            self.saved(step, detail["attempt"], save_cost(detail["stall_s"], seconds))
        else:  # a restarted keeper found this commit of the one before, whose figures are lost
            self.committed.add((step, detail["attempt"]))
