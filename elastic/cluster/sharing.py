"""Several runs on one cluster: who may hold and ask for how many workers. Pure functions of what each run says.

First every run gets its `min_workers`: the higher priority first, then the older run. Where a run of higher priority
lacks some, lower ones shrink to theirs. Where several lack some and hold a part, which might be for ever, the last of
them save their state and give up their part, if that is enough for the first. What is left goes in the same order to
those that can use more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

#: A run that says nothing new for so long counts no more: its controller is dead, or cut off.
STALE_S = 10.0
#: Others shrink for a run that has been short for so long: where there is room, it has its workers by then.
YIELD_AFTER_S = 3.0
#: A parked run gives up what it holds for one that has been short for so long, as it has itself: others have shrunk by
#: then, and a lost worker is replaced where there is room.
GIVE_UP_AFTER_S = 10.0
#: The longest pause between two attempts to get more than is there.
LONGEST_PAUSE_S = 3600.0


@dataclass(frozen=True)
class Terms:
    """What a run asks of a cluster that it shares. `since`: when its driver began, in unix seconds."""

    run: str
    priority: int
    since: float
    accelerator: str
    min_workers: int
    request_timeout_s: float


@dataclass(frozen=True)
class Standing:
    """What a run says of itself once a second.

    Args:
        have: workers whose resources it holds.
        asks: workers that it asks for beside those.
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
        """Whether it lacks workers to train with."""
        return self.have < self.terms.min_workers

    @property
    def order(self) -> tuple[int, float, str]:
        """The lowest is served first."""
        return (-self.terms.priority, self.terms.since, self.terms.run)

    def to_bytes(self, beat: int) -> bytes:
        """For the standings of the cluster; `beat` makes it another value every time."""
        return json.dumps({"format": 1, "beat": beat, **asdict(self)}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Standing:
        values = json.loads(data)
        return cls(Terms(**values["terms"]), values["have"], values["asks"], values["short_s"], values["steady_s"])


@dataclass(frozen=True)
class Share:
    """What a run may have now.

    `most`: it shrinks to so many at its next step boundary, for the runs `to`; 0 is for a parked one, which saves its
    state and lets all go. `ask`: it holds and asks for at most so many, and holds none if that is 0. None: no limit.
    """

    most: int | None = None
    to: tuple[str, ...] = ()
    ask: int | None = None


def share(me: Standing, others: Iterable[Standing], *, holds_state: bool) -> Share:
    """What `me` may have, given what all other living runs say.

    Args:
        holds_state: its workers have trained: what they hold would be lost with them.
    """
    rivals = [o for o in others if o.terms.accelerator == me.terms.accelerator]
    short = [o for o in rivals if o.short]
    waiting = [o for o in short if o.short_s >= YIELD_AFTER_S]
    to = tuple(sorted(o.terms.run for o in waiting if o.terms.priority > me.terms.priority))
    most = me.terms.min_workers if to else None
    if me.short:
        if any(o.order < me.order for o in short):  # two that each hold a part of what they need would wait for ever
            first = gives_up_for(me, short)
            if first is not None and holds_state:
                return Share(0, (first,), me.have)
            return Share(most, to, me.have if holds_state else 0)
        return Share(most, to, me.terms.min_workers if short else None)
    others_first = short or [o for o in rivals if o.asks and o.order < me.order]
    return Share(most, to, me.have if others_first else None)


def gives_up_for(me: Standing, short: Sequence[Standing]) -> str | None:
    """The run for which a short `me` gives up all that it holds, if it does; `short` are the others that lack workers.

    That is the first in order, where what the others hold is enough for it. The last in order give up first, and no
    more than are needed: so what one gave up must have had the time to arrive.
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
    """Requests beyond what a run needs are withdrawn after `timeout_s`, since nodes that could be given back stay
    while somebody asks. They are made again after a pause, which doubles, or when there is room."""

    timeout_s: float
    refusals: int = 0
    until: float = 0.0

    def pausing(self, now: float) -> bool:
        return now < self.until

    def after(self, now: float, *, waited_s: float, served: bool, room: bool) -> Patience:
        """One look.

        Args:
            waited_s: how long the oldest request above `min_workers` waits; 0 for none.
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
