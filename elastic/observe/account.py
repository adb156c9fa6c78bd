"""The account of a run: what each of its worker-seconds was spent on, and what that cost. Pure, from the ledger alone.

A worker's time begins with its process, as far as that is recorded (`worker_warm` has the seconds that the worker took
to get ready), and ends when the worker was lost or handed over, or with its claim. Every second between has exactly one
of the causes in `causes`, so that the causes add up to the whole. Seconds that a ledger of an earlier version does not
explain have the cause `unknown`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from elastic.observe.causes import CAUSES, PRODUCTIVE
from elastic.prices import Prices

FORMAT = 1


@dataclass
class Interruption:
    """An interruption of the training, and what it took from all workers until training went on.

    Args:
        kind: "lost" (a worker was lost), "broken" (connections broke, or the job raised), "regrouped" (workers joined
            or left as planned), or "restarted" (another command continued the run).
        time: when the interruption was recorded, unix seconds.
        step: the newest step at that time.
        members: the ids of the workers that were lost.
        generation: the generation of the world that went on; None if no world did.
        seconds: worker-seconds by cause.
        costs: money by cause.
    """

    kind: str
    time: float
    step: int | None = None
    reason: str = ""
    members: list[str] = field(default_factory=list)
    generation: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)

    @property
    def worker_seconds(self) -> float:
        return math.fsum(self.seconds.values())

    @property
    def cost(self) -> float:
        return math.fsum(self.costs.values())


@dataclass(frozen=True)
class Account:
    """The worker-seconds of a run by cause.

    Args:
        begin, end: the time that is accounted for, unix seconds; None for a run without workers so far.
        whole_s: the sum of all workers' times, in seconds.
        seconds: the same by cause, with all causes, in the order of `CAUSES`.
        costs: money by cause; None if no price is known.
        on_demand_cost: the cost of the same worker-seconds at on-demand prices; None unless these are known for all of
            them.
        unpriced_s: the worker-seconds for which no price is known.
        interruptions: in the order in which they happened.
    """

    begin: float | None
    end: float | None
    whole_s: float
    seconds: dict[str, float]
    costs: dict[str, float] | None
    on_demand_cost: float | None
    unpriced_s: float
    interruptions: tuple[Interruption, ...]

    @property
    def goodput(self) -> float | None:
        """The share of the worker-seconds that were spent on steps which count; None without worker-seconds."""
        return self.seconds[PRODUCTIVE] / self.whole_s if self.whole_s > 0 else None

    @property
    def cost(self) -> float | None:
        """The cost of all worker-seconds for which a price is known; None if there are none."""
        return None if self.costs is None else math.fsum(self.costs.values())

    def to_json(self) -> dict[str, Any]:
        """Return the account as JSON values; all numbers are finite."""
        return {
            "format": FORMAT,
            "begin": self.begin,
            "end": self.end,
            "worker_seconds": round(self.whole_s, 6),
            "goodput": None if self.goodput is None else round(self.goodput, 6),
            "seconds": _rounded(self.seconds),
            "cost": None if self.cost is None else round(self.cost, 6),
            "costs": None if self.costs is None else _rounded(self.costs),
            "on_demand_cost": None if self.on_demand_cost is None else round(self.on_demand_cost, 6),
            "unpriced_seconds": round(self.unpriced_s, 6),
            "interruptions": [
                {
                    "kind": i.kind,
                    "time": i.time,
                    "step": i.step,
                    "reason": i.reason,
                    "members": i.members,
                    "generation": i.generation,
                    "worker_seconds": round(i.worker_seconds, 6),
                    "seconds": _rounded(i.seconds),
                    "cost": None if self.costs is None else round(i.cost, 6),
                }
                for i in self.interruptions
            ],
            "causes": CAUSES,
        }


def _rounded(found: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in found.items()}


def account(
    rows: Iterable[dict[str, Any]],
    events: Iterable[dict[str, Any]],
    *,
    prices: Prices | None = None,
    until: float | None = None,
    live: bool = False,
    microbatches: int | None = None,
) -> Account:
    """Compute the account of a run from its ledger.

    Args:
        rows, events: the records of all claims, as `read_records` returns them; invalid ones are left out. Without rows
            the sum of worker-seconds is known, but not their causes.
        prices: used instead of those in the ledger.
        until: the end of the account if the newest claim recorded no end, unix seconds: now for a live run, the last
            heartbeat for a run whose driver was killed; by default the time of the newest record.
        live: whether the run goes on.
        microbatches: the number of microbatches per step, for ledgers of earlier versions that do not record it.
    """
    from elastic.observe.timeline import Timeline

    known = [e for e in _with_time(events) if isinstance(e.get("kind"), str)]
    timeline = Timeline(prices or _recorded_prices(known), microbatches)
    timeline.take(_with_time(rows), known, until, live=live)
    return timeline.account()


def _recorded_prices(events: Sequence[dict[str, Any]]) -> Prices:
    """Return the prices of the newest command that gave any."""
    for event in reversed(events):
        detail = event.get("detail")
        if event["kind"] == "run_started" and isinstance(detail, dict) and "prices" in detail:
            return Prices.from_json(detail["prices"])
    return Prices()


def _with_time(records: Iterable[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Return the records that have a finite time."""
    return [r for r in records if isinstance(r.get("time"), (int, float)) and math.isfinite(r["time"])]
