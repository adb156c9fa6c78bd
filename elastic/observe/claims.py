"""The records of a ledger sorted by claim and by world, and what is known of a claim while they are read. Pure.

Each command that drives a run claims it, under a number that grows (the epoch); the worlds of a claim are numbered too,
so that a generation is "epoch-number".
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from elastic.observe.charges import Kind
from elastic.observe.segments import Deal, after_s, number


def epoch_of(generation: Any) -> tuple[int, int] | None:
    """Return the two numbers of a generation such as "2-7", or None for any other value."""
    first, _, second = str(generation).partition("-")
    return (int(first), int(second)) if first.isdecimal() and second.isdecimal() else None


class Rows:
    """The rows of `metrics.jsonl` by the world that wrote them. Rows without a step or a generation are left out.

    Args:
        rows: each with a finite `time`.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]):
        #: Rows of steps, by generation and step.
        self.steps: dict[str, dict[int, dict[str, Any]]] = {}
        #: Rows of evaluations, by generation and step.
        self.evaluations: dict[str, dict[int, dict[str, Any]]] = {}
        #: The end of the newest row of each claim, unix seconds, by epoch.
        self.last: dict[int, float] = {}
        self._places: dict[int, tuple[int, int]] = {}
        for written, found in groupby(rows, lambda row: row.get("generation")):
            if (place := epoch_of(written)) is not None:
                self._add(str(written), place, [row for row in found if isinstance(row.get("step"), int)])
        for generation, steps in self.steps.items():
            if not steps:
                continue
            newest, (epoch, _) = steps[max(steps)], epoch_of(generation) or (0, 0)
            evaluation = self.evaluations.get(generation, {}).get(newest["step"])
            self.last[epoch] = max(self.last[epoch], newest["time"] + after_s(newest, evaluation))
        names = {place: "{}-{}".format(*place) for place in set(self._places.values())}
        #: The generation whose update of a step counts, by step: the newest one.
        self.kept = {step: names[place] for step, place in self._places.items()}
        self._counting = set(names.values())

    def _add(self, generation: str, place: tuple[int, int], rows: list[dict[str, Any]]) -> None:
        """Add rows of one generation, which were written one after another; there may be a hundred thousand."""
        if not rows:
            return
        self.last[place[0]] = max(self.last.get(place[0], -math.inf), *[row["time"] for row in rows])
        steps = {row["step"]: row for row in reversed(rows) if "sample_hash" in row}  # the first row of a step counts
        evaluations = {row["step"]: row for row in reversed(rows) if "sample_hash" not in row}
        for known, found in ((self.steps, steps), (self.evaluations, evaluations)):
            if generation not in known:
                known[generation] = found
                continue
            for step, row in found.items():
                known[generation].setdefault(step, row)
        self._places |= {step: place for step in steps if place > self._places.get(step, ())}

    def redone(self, generation: str) -> dict[int, str]:
        """Return the generation whose update counts instead, for each step of this one for which there is any."""
        if self._counting == {generation}:
            return {}
        return {step: kept for step in self.steps.get(generation, ()) if (kept := self.kept[step]) != generation}


@dataclass
class Worker:
    """A worker of a claim.

    Args:
        kind: type and market of its node, and how many workers share the node.
        born: when its process began, unix seconds.
        since: its time is charged up to here, unix seconds.
        going: it was told to leave.
        silent: it does not answer and is in no world.
    """

    id: str
    node: str
    kind: Kind
    born: float
    since: float
    alive: bool = True
    going: bool = False
    silent: bool = False


@dataclass
class World:
    """A world of a claim.

    Args:
        ids: its members, without those that handed over.
        formed: unix seconds.
        rows: of its steps, ascending.
        evaluations: its rows of evaluations, by step.
        because: the interruption that led to it, by its index.
        idle: the members that train nothing, spares.
    """

    generation: str
    ids: list[str]
    formed: float
    rows: list[dict[str, Any]]
    evaluations: dict[int, dict[str, Any]]
    because: int | None
    idle: frozenset[str]


@dataclass
class Claim:
    """What is known of a claim while its events are read.

    Args:
        epoch: its number.
        deal: how microbatches are dealt.
        workers: by member id.
        world: the one that stands, if any.
        last_ids: the members of the newest world.
        worlds: how many were formed.
        parked: its workers wait, since there are too few of them.
        pending: the interruption that no world has ended yet, by its index.
        vacant: interruptions whose lost workers are not replaced yet, by index.
        now: the time of the newest event, unix seconds.
    """

    epoch: int
    deal: Deal
    workers: dict[str, Worker] = field(default_factory=dict)
    world: World | None = None
    last_ids: frozenset[str] = frozenset()
    worlds: int = 0
    parked: bool = False
    pending: int | None = None
    vacant: deque[int] = field(default_factory=deque)
    ended: bool = False
    now: float = -math.inf


def by_claim(events: Sequence[dict[str, Any]]) -> list[tuple[int, list[dict[str, Any]]]]:
    """Sort events into claims: (epoch, its events), ascending.

    Earlier versions wrote events outside of a world without a generation; their order tells the claim.
    """
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    early: list[dict[str, Any]] = []  # of a claim whose number comes later
    epoch = 0
    for event in events:
        place = epoch_of(event.get("generation"))
        if place is not None:
            epoch = place[0]
            found[epoch] += [*early, event]
            early = []
        elif early or event["kind"] == "run_started" or not epoch:
            early.append(event)
        else:
            found[epoch].append(event)
    if early:
        found[epoch + 1] += early
    return sorted(found.items())


def workers_by_node(events: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return the largest number of workers that each node had at one time, from the events of a claim."""
    homes: dict[str, str] = {}
    here: Counter[str] = Counter()
    most: dict[str, int] = {}
    for event in events:
        member = str(event.get("member"))
        if event["kind"] == "worker_warm" and member not in homes:
            homes[member] = node = str(event.get("node", ""))
            here[node] += 1
            most[node] = max(most.get(node, 1), here[node])
        elif event["kind"] in ("member_lost", "handed_over") and member in homes:
            here[homes.pop(member)] -= 1
    return most


def seen_alive(later: Sequence[dict[str, Any]]) -> float | None:
    """Return when a claim was last seen alive, unix seconds, as the first event of the claim after it tells."""
    for event in later:
        if event["kind"] == "run_started":
            detail = event.get("detail")
            beat = detail.get("heartbeat_before") if isinstance(detail, dict) else None
            return number(beat) or None
    return None
