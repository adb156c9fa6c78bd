"""How a run's workers are kept at the number that it wants: what to request from the cluster, and what to give back.
Pure.

A unit is a worker, or the request for one. It has a place in a placement, which stands for one of Ray's placement
groups: with one place, or with as many as a node is to have together. The controller describes what it sees, and
carries out what is decided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from elastic.cluster.capacity import full_nodes, may_share
from elastic.cluster.sharing import Share

DEFAULT_NOTICE_S = 30.0  # assumed for a node that goes away without giving a deadline


class Stage(Enum):
    """The life of a unit: its place is requested, its process starts, it runs, it is done, which ends the run."""

    ASKED = "asked"
    STARTING = "starting"
    RUNNING = "running"
    OVER = "over"


@dataclass(frozen=True)
class Unit:
    """One worker and its place.

    Args:
        key: its number; no two units of a run have the same.
        placement: the number of its placement group.
        since: when its stage began (monotonic seconds).
        id: of its process, once there is one.
        node: on which it is, once that is known.
    """

    key: int
    placement: int
    stage: Stage
    since: float
    id: str = ""
    node: str = ""


@dataclass(frozen=True)
class Bounds:
    """Values that are constant during a run.

    Args:
        per_node: the most workers on one node; None for no limit.
        together: places of one placement, all on one node.
        packed: each placement has a node to itself; otherwise a node fills up with placements of one place.
        min_workers: the fewest workers that the run trains with.
        start_s: the longest time that a process may take to start.
    """

    per_node: int | None
    together: int
    packed: bool
    min_workers: int
    start_s: float


@dataclass(frozen=True)
class Seen:
    """What the controller knows besides its units.

    Args:
        want: workers that the run can use.
        share: what other runs of the cluster leave it.
        had: workers that it had when it last looked.
        pausing: a request for more workers was in vain, so none is made for now.
        draining: nodes that go away.
        drained: processes that hand over and end.
        excluded: nodes to keep out.
        lost_placements: their node is gone, so no worker is placed there any more.
        ask_after: when more may be requested, since the last workers could not get ready (monotonic seconds).
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
    """Withdraw the request for a place that was not granted yet."""

    key: int


@dataclass(frozen=True)
class AskIn:
    """Take a free place of an existing placement."""

    placement: int


@dataclass(frozen=True)
class AskAnew:
    """Request another placement on a node that is not in `elsewhere`, and take `places` of its places."""

    elsewhere: tuple[str, ...]
    places: int = 1


Action = GiveUp | Withdraw | AskIn | AskAnew


def decide(units: Sequence[Unit], seen: Seen, bounds: Bounds, now: float) -> list[Action]:
    """Decide one turn: give up units that do not start, withdraw surplus requests, request missing workers.

    Surplus workers are dismissed by the membership server instead, which knows what state each holds. Once a worker is
    done, nothing is requested: the run is over.
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
    while missing > 0 and not (one_by_one and waits):  # the node of the last request decides which nodes are full
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
    """The number of free places of each placement that may take more workers."""
    free: dict[int, int] = {}
    for unit in units:
        if unit.placement not in seen.lost_placements and unit.node not in seen.draining:
            free.setdefault(unit.placement, bounds.together - sum(u.placement == unit.placement for u in units))
    return free


def _full(units: Sequence[Unit], bounds: Bounds) -> list[str]:
    """Nodes that have as many workers as they may; a packed placement has its node to itself."""
    alone = 1 if bounds.packed else bounds.per_node
    return full_nodes([u.node for u in units if u.node], bounds.per_node and alone)


def _wanted(seen: Seen, bounds: Bounds) -> int:
    """The number of workers to have now, given other runs' demands and its own patience."""
    limits = [seen.want, seen.share.most, seen.share.ask]
    if seen.pausing:
        limits.append(max(seen.had, bounds.min_workers))
    return min(n for n in limits if n is not None)


def staying_units(units: Iterable[Unit], seen: Seen) -> list[Unit]:
    """The units that are not known to leave."""
    return [u for u in units if u.node not in seen.draining and u.id not in seen.drained]


def may_be_there(unit: Unit, node: str, units: Iterable[Unit], seen: Seen, bounds: Bounds) -> bool:
    """Whether a unit may start on the node where its place was granted. A node that joined after the request may be
    excluded, and placements that were requested together may have come to the same node."""
    others = sum(u.node == node and u.placement != unit.placement for u in units)
    return node not in seen.excluded and may_share(others, bounds.together, bounds.per_node)


def closed_nodes(units: Iterable[Unit], seen: Seen, bounds: Bounds) -> set[str]:
    """Nodes that may take no further worker, whatever resources they have free."""
    full = full_nodes([u.node for u in units if u.node], bounds.per_node)
    return {*full, *seen.draining, *seen.excluded}


def notices(
    draining: Mapping[str, int], before: Mapping[str, int], units: Iterable[Unit], unix_now: float
) -> list[tuple[str, float]]:
    """(node, remaining seconds) for nodes of units that go away, if the server does not know it yet.

    Args:
        draining, before: deadlines by node, now and at the last call, in unix milliseconds; 0 if unknown.
    """
    here = {u.node for u in units}
    found = []
    for node, deadline_ms in draining.items():
        sooner = node not in before or deadline_ms < before[node]  # a second notice may leave less time
        if sooner and node in here:
            left = deadline_ms / 1000 - unix_now if deadline_ms else DEFAULT_NOTICE_S
            found.append((node, max(0.0, left)))
    return found
