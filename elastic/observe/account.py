"""The account of a run: what each of its worker-seconds went into, and what that cost. Pure, from the ledger alone.

A worker's time begins with its process, as far as it said (`worker_warm` has the seconds that it took to get ready),
and ends when it was lost or handed over, or with its claim. Every second between has one of the causes of `causes`:
the parts add up to the whole. What a ledger of an earlier version does not tell is `unknown`.
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
    """What training was interrupted by, and what that took of all workers until it went on.

    Args:
        kind: lost (a worker was), broken (its connections were, or the job raised), regrouped (workers came or went as
            planned), or restarted (another command went on with the run).
        time: when it was known, unix seconds.
        step: the newest step then.
        members: workers that were lost.
        generation: of the world that went on; None if none did.
        seconds: worker-seconds by cause.
        costs: the same in money.
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
    """What the worker-seconds of a run went into.

    Args:
        begin, end: of all that is accounted for, unix seconds; None for a run without workers so far.
        whole_s: worker-seconds: the sum of all workers' times.
        seconds: the same by cause, in the order of `CAUSES`; all causes are there.
        costs: money by cause; None where nothing has a price.
        on_demand_cost: of the same worker-seconds at prices on demand; None where none are known for all of them.
        unpriced_s: worker-seconds that no price is known for.
        interruptions: in the order in which they came.
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
        """Share of the worker-seconds that trained steps which count; None without any."""
        return self.seconds[PRODUCTIVE] / self.whole_s if self.whole_s > 0 else None

    @property
    def cost(self) -> float | None:
        """Of all of it, as far as it has a price."""
        return None if self.costs is None else math.fsum(self.costs.values())

    def to_json(self) -> dict[str, Any]:
        """JSON values, all of them finite."""
        told = {
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
        return told


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
    """The account of a run from its ledger.

    Args:
        rows, events: of all claims, as `read_records` returns them; what is no record of a ledger is left out. Without
            rows the whole is known, and not what it went into.
        prices: other ones than the ledger tells.
        until: up to when the newest claim is accounted for, unix seconds, where it has not said how it ended: now for a
            live run, the last heartbeat for one whose driver was killed; the default is its newest record.
        live: it goes on.
        microbatches: V, for ledgers of earlier versions that do not tell.
    """
    from elastic.observe.timeline import Timeline

    told = [e for e in _whole(events) if isinstance(e.get("kind"), str)]
    timeline = Timeline(prices or _prices_told(told), microbatches)
    timeline.take(_whole(rows), told, until, live=live)
    return timeline.account()


def _prices_told(events: Sequence[dict[str, Any]]) -> Prices:
    """Those of the newest command that gave any."""
    for event in reversed(events):
        detail = event.get("detail")
        if event["kind"] == "run_started" and isinstance(detail, dict) and "prices" in detail:
            return Prices.from_json(detail["prices"])
    return Prices()


def _whole(records: Iterable[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Those that have a time."""
    return [r for r in records if isinstance(r.get("time"), (int, float)) and math.isfinite(r["time"])]
