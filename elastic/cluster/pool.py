"""How a run's workers are kept at the number that it wants: what to ask of the cluster, and what to give back. Pure.

A unit is a worker, or what was asked for to become one. Each has a place in a placement, which is a placement group of
Ray's: one place, or as many as a node is to have together. The controller says what it sees, and carries out what is
decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from elastic.cluster.capacity import full_nodes, may_share
from elastic.cluster.sharing import Share

DEFAULT_NOTICE_S = 30.0  # of a node that goes away and does not say when


class Stage(Enum):
    """Life of a unit: its place is asked for, its process starts, it runs, its part is over and the run's with it."""

    ASKED = "asked"
    STARTING = "starting"
    RUNNING = "running"
    OVER = "over"


@dataclass(frozen=True)
class Unit:
    """One worker and its place.

    Args:
        key: its number; none is used twice.
        placement: the number of its placement group.
        since: when its stage began (monotonic seconds).
        id: of its process, once there is one.
        node: that it is on, once that is known.
    """

    key: int
    placement: int
    stage: Stage
    since: float
    id: str = ""
    node: str = ""


@dataclass(frozen=True)
class Bounds:
    """What stays the same for all of a run.

    Args:
        per_node: the most workers on one node; None for no limit.
        together: places of one placement, all on one node.
        packed: each placement has its node alone; else a node fills up with placements of one place.
        min_workers: fewer do not train.
        start_s: longest time in which a process has to start.
    """

    per_node: int | None
    together: int
    packed: bool
    min_workers: int
    start_s: float


@dataclass(frozen=True)
class Seen:
    """What the controller knows beside its units.

    Args:
        want: workers that the run can use.
        share: what other runs of the cluster leave it.
        had: workers that it had when it last looked.
        pausing: more than these were asked for in vain: not for now.
        draining: nodes that go away.
        drained: processes that hand over and end.
        excluded: nodes that are kept out.
        lost_placements: whose node is gone: nobody is placed there any more.
        ask_after: when more may be asked for, since the last ones could not get ready (monotonic seconds).
    """

    want: int
    share: Share = field(default_factory=Share)
    had: int = 0
    pausing: bool = False
    draining: frozenset[str] = frozenset()
    drained: frozenset[str] = frozenset()
    excluded: tuple[str, ...] = ()
    lost_placements: frozenset[int] = frozenset()
    ask_after: float = 0.0


# ---- what is to be done ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GiveUp:
    """A process did not start in time: end it."""

    key: int
    why: str


@dataclass(frozen=True)
class Withdraw:
    """Ask no more for a place that has not come."""

    key: int


@dataclass(frozen=True)
class AskIn:
    """Take a free place of a placement."""

    placement: int


@dataclass(frozen=True)
class AskAnew:
    """Ask for another placement, on a node that is none of these, and take so many of its places."""

    elsewhere: tuple[str, ...]
    places: int = 1


Action = GiveUp | Withdraw | AskIn | AskAnew


def decide(units: Sequence[Unit], seen: Seen, bounds: Bounds, now: float) -> list[Action]:
    """One turn: give up what does not start, give back what is too much, ask for what is missing.

    Who is there and too many is let go by the membership server, which knows who holds what. Nothing is asked for once
    a worker's part is over, since the run's is.
    """
    late = [u for u in units if u.stage is Stage.STARTING and now - u.since > bounds.start_s]
    why = f"the worker did not start within {bounds.start_s:.0f} s"
    actions: list[Action] = [GiveUp(u.key, why) for u in late]
    units = [u for u in units if u not in late]
    if any(u.stage is Stage.OVER for u in units):
        return actions
    staying = staying_units(units, seen)
    missing = _wanted(seen, bounds) - len(staying)
    asked = [u for u in units if u.stage is Stage.ASKED]
    withdrawn = asked[: max(0, -missing)]
    actions += [Withdraw(u.key) for u in withdrawn]
    if now < seen.ask_after:
        return actions
    return actions + _asks(missing, units, seen, bounds)


def _asks(missing: int, units: Sequence[Unit], seen: Seen, bounds: Bounds) -> list[Action]:
    actions: list[Action] = []
    free = _free_places(units, seen, bounds)
    one_by_one = bounds.per_node is not None and not bounds.packed
    waits = any(u.stage is Stage.ASKED for u in units)
    while missing > 0 and not (one_by_one and waits):  # where the last one comes decides which nodes are full
        placement = next((placement for placement, places in free.items() if places), None)
        if placement is not None:
            free[placement] -= 1
            missing -= 1
            actions.append(AskIn(placement))
        else:
            places = min(missing, bounds.together)
            missing -= places
            actions.append(AskAnew((*_full(units, bounds), *seen.excluded), places))
        waits = True
    return actions


def _free_places(units: Sequence[Unit], seen: Seen, bounds: Bounds) -> dict[int, int]:
    """Placements that may take more workers, with the number of places that are free."""
    free: dict[int, int] = {}
    for unit in units:
        if unit.placement not in seen.lost_placements and unit.node not in seen.draining:
            free.setdefault(unit.placement, bounds.together - sum(u.placement == unit.placement for u in units))
    return free


def _full(units: Sequence[Unit], bounds: Bounds) -> list[str]:
    """Nodes that have as many workers as they may; who is placed together has the node alone."""
    alone = 1 if bounds.packed else bounds.per_node
    return full_nodes([u.node for u in units if u.node], bounds.per_node and alone)


def _wanted(seen: Seen, bounds: Bounds) -> int:
    """What the run could use, as far as other runs and its own patience let it ask for that now."""
    limits = [seen.want, seen.share.most, seen.share.ask]
    if seen.pausing:
        limits.append(max(seen.had, bounds.min_workers))
    return min(n for n in limits if n is not None)


def staying_units(units: Iterable[Unit], seen: Seen) -> list[Unit]:
    """Those that are not known to go."""
    return [u for u in units if u.node not in seen.draining and u.id not in seen.drained]


def may_be_there(unit: Unit, node: str, units: Iterable[Unit], seen: Seen, bounds: Bounds) -> bool:
    """Whether the node on which a place came is one for it: one that joined after it was asked for may be excluded,
    and placements that were asked for together may have come together."""
    others = sum(u.node == node and u.placement != unit.placement for u in units)
    return node not in seen.excluded and may_share(others, bounds.together, bounds.per_node)


def closed_nodes(units: Iterable[Unit], seen: Seen, bounds: Bounds) -> set[str]:
    """Nodes that take no further worker, however much placement they have."""
    full = full_nodes([u.node for u in units if u.node], bounds.per_node)
    return {*full, *seen.draining, *seen.excluded}


def notices(
    draining: Mapping[str, int], before: Mapping[str, int], units: Iterable[Unit], unix_now: float
) -> list[tuple[str, float]]:
    """The nodes of units that go away, and the seconds that are left, of which the server is not told yet.

    Args:
        draining, before: deadlines by node, now and when this was last asked, in unix milliseconds; 0 for not known.
    """
    here = {u.node for u in units}
    found = []
    for node, deadline_ms in draining.items():
        sooner = node not in before or deadline_ms < before[node]  # a second notice may leave less time
        if sooner and node in here:
            left = deadline_ms / 1000 - unix_now if deadline_ms else DEFAULT_NOTICE_S
            found.append((node, max(0.0, left)))
    return found
