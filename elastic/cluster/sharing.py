"""Several runs on one cluster: how many workers each may hold and request. Pure functions of the runs' demands.

First every run gets its `min_workers`: higher priority first, then the older run. If a run of higher priority is short
of workers, lower ones shrink to their minimum. If several runs are short while they hold some workers, they could wait
for each other for ever: then the last of them in that order save their state and give up their workers, if that is
enough for the first one. Remaining workers go in the same order to runs that can use more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

#: A demand that did not change for so long is ignored: the run's controller is dead, or cut off.
STALE_S = 10.0
#: Other runs shrink for a run that was short for so long: if there were free resources, it would have its workers.
YIELD_AFTER_S = 3.0
#: A parked run gives up its workers for a run if both were short for so long: by then other runs have shrunk, and lost
#: workers were replaced where there are free resources.
GIVE_UP_AFTER_S = 10.0
#: The longest pause between two requests for more workers than the cluster could give.
LONGEST_PAUSE_S = 3600.0


@dataclass(frozen=True)
class Terms:
    """A run's terms on a cluster that it shares. `since`: when its driver began, in unix seconds."""

    run: str
    priority: int
    since: float
    accelerator: str
    min_workers: int
    request_timeout_s: float


@dataclass(frozen=True)
class Demand:
    """What a run publishes about itself once a second.

    Args:
        have: workers whose resources it holds.
        asks: workers that it requests in addition.
        short_s: how long it has had fewer than its `min_workers`.
        steady_s: how long it has had as many as now.
    """

    terms: Terms
    have: int
    asks: int
    short_s: float = 0.0
    steady_s: float = 0.0

    @property
    def short(self) -> bool:
        """Whether it has too few workers to train."""
        return self.have < self.terms.min_workers

    @property
    def order(self) -> tuple[int, float, str]:
        """Sort key; the run with the lowest is served first."""
        return (-self.terms.priority, self.terms.since, self.terms.run)

    def to_bytes(self, beat: int) -> bytes:
        """As JSON, to publish. `beat` is a counter, which makes every value different."""
        return json.dumps({"format": 1, "beat": beat, **asdict(self)}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Demand:
        values = json.loads(data)
        return cls(Terms(**values["terms"]), values["have"], values["asks"], values["short_s"], values["steady_s"])


@dataclass(frozen=True)
class Share:
    """What a run may have now.

    `most`: it shrinks to so many workers at its next step boundary, for the runs `to`. With 0 a parked run saves its
    state and lets all go. `ask`: it holds and requests at most so many, and lets all go if that is 0. None: no limit.
    """

    most: int | None = None
    to: tuple[str, ...] = ()
    ask: int | None = None


def share(me: Demand, others: Iterable[Demand], *, holds_state: bool) -> Share:
    """What `me` may have, given the demands of all other living runs.

    Args:
        holds_state: its workers have trained, so that ending them would lose state.
    """
    rivals = [o for o in others if o.terms.accelerator == me.terms.accelerator]
    short = [o for o in rivals if o.short]
    waiting = [o for o in short if o.short_s >= YIELD_AFTER_S]
    to = tuple(sorted(o.terms.run for o in waiting if o.terms.priority > me.terms.priority))
    most = me.terms.min_workers if to else None
    if me.short:
        if any(o.order < me.order for o in short):  # two runs that each hold some of what they need wait for ever
            first = gives_up_for(me, short)
            if first is not None and holds_state:
                return Share(0, (first,), me.have)
            return Share(most, to, me.have if holds_state else 0)
        return Share(most, to, me.terms.min_workers if short else None)
    others_first = short or [o for o in rivals if o.asks and o.order < me.order]
    return Share(most, to, me.have if others_first else None)


def gives_up_for(me: Demand, short: Sequence[Demand]) -> str | None:
    """The run for which a short `me` gives up all its workers, None if it does not; `short` are the other short runs.

    That is the first run in order, if the workers of all others are enough for it. The last in order give up first, and
    no more of them than are needed: so what one run gave up must have had time to arrive.
    """
    first, *others = sorted([me, *short], key=lambda o: o.order)
    lack = first.terms.min_workers - first.have
    early = min(first.short_s, me.short_s) < GIVE_UP_AFTER_S
    early |= any(o.steady_s < YIELD_AFTER_S for o in (first, *others))
    if me is first or early or me.have == 0 or sum(o.have for o in others) < lack:
        return None
    after = sum(o.have for o in others if o.order > me.order)
    return first.terms.run if after < lack else None


@dataclass(frozen=True)
class Patience:
    """When to request workers beyond the fewest. A request is withdrawn after `timeout_s`, since idle nodes are not
    ended while there are requests. It is repeated after a pause, which doubles, or when there are free resources."""

    timeout_s: float
    refusals: int = 0
    until: float = 0.0

    def pausing(self, now: float) -> bool:
        return now < self.until

    def after(self, now: float, *, waited_s: float, served: bool, room: bool) -> Patience:
        """The patience after one look at the cluster.

        Args:
            waited_s: age of the oldest request above `min_workers`; 0 if there is none.
            served: the run got a worker since the last look, or has too few to train with.
            room: a node could take a worker now.
        """
        if served:
            return Patience(self.timeout_s)
        if self.pausing(now):
            return replace(self, until=now) if room else self
        if waited_s <= self.timeout_s:
            return self
        pause_s = min(LONGEST_PAUSE_S, self.timeout_s * 2.0 ** min(self.refusals, 30))
        return replace(self, refusals=self.refusals + 1, until=now + pause_s)
