"""What the membership decisions know: soft state, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

from elastic.membership.commands import GiveUp
from elastic.membership.events import Registered
from elastic.membership.faults import Faults
from elastic.membership.world import Generation, Member, World


@dataclass(frozen=True)
class Limits:
    """Sizes and times (seconds) that decisions go by.

    Args:
        spares: warm workers kept outside the world when the run is scaled down.
        microbatches: V, the equal parts of a step's batch: a world never has more cells, or pipelines. None: no such
            limit.
        cell_size: workers that run a microbatch together, on one node. Numbers of workers are multiples of it.
        stages: the fewest cells of a pipeline; 1 without pipelines.
        settle_s: for so long the first world waits for more than `min_workers`.
        park_after_s: a first world that lacks workers counts as parked if none joins for this long.
        join_window_s: workers that join within it are taken in together, which costs one stall instead of several.
        grace_s: members of a broken world that have answered wait at most this long after the last answer for the
            others, if they can go on without them.
        lease_s: a world without any member of its predecessor waits this long, unless those are known to be dead.
        max_wait_s: longest parking; None for no limit.
        max_failures: how often one error at one step and microbatch is replayed.
        exact: all members of a world must have equal devices, and data that is equal to the last bit.
        cut: the state is sharded over the members, so a member is left out only after its shard is saved.
        expects: number of workers that are started, if nobody replaces those that cannot get ready; None if somebody
            does.
    """

    min_workers: int
    max_workers: int
    spares: int = 0
    microbatches: int | None = None
    cell_size: int = 1
    stages: int = 1
    settle_s: float = 2.0
    park_after_s: float = 30.0
    join_window_s: float = 1.0
    grace_s: float = 0.3
    lease_s: float = 30.0
    max_wait_s: float | None = None
    max_failures: int = 3
    exact: bool = False
    cut: bool = False
    expects: int | None = None

    @property
    def most_cells(self) -> int | None:
        """The most cells that a world can have, each of them, or each pipeline, with a microbatch; None: no limit."""
        return None if self.microbatches is None else (self.microbatches + 1) * self.stages - 1


class Phase(Enum):
    REBUILDING = "rebuilding"
    GATHERING = "gathering"
    RUNNING = "running"
    LEAVING = "leaving"
    BROKEN = "broken"
    ENDED = "ended"


@dataclass(frozen=True)
class Waiting:
    """A worker outside a world, ready for the next one."""

    member: Member
    applied: int
    since: float

    @property
    def node(self) -> str:
        return self.member.node


@dataclass(frozen=True)
class Late:
    """A worker that was in a world whose other members went on before it answered. It has left that world or will, and
    is taken in like any other when it joins: whatever state it holds is older than theirs, from the same run."""

    member: Member
    generation: Generation


@dataclass(frozen=True)
class State:
    """Soft state. Mappings are never changed in place.

    Workers that left:
        gone: lost or done; never let in again, except those `lost_silently`.
        lost_silently: lost only for being silent, from a world that has no successor yet.
        dead: gone, and known not to apply anything any more.
        late: the others went on without them; they may join again.
    Workers outside of the world:
        waiting: ready for the next world. `quiet` ones of them sent nothing lately.
        warming: connected, and getting ready.
        unexplained: they were getting ready until their connection ended at the given time; how their process ended is
            about to be reported.
        never_ready: how many could not get ready, the first because of `unfit_why`. `unfit`: how many in a row.
        sick workers are in `faults`; `left_out` were reported as left out.
    Numbers:
        keep: how many workers to have, in the world and outside of it, once that was changed.
        wished: the most that the run was given; `ceiling`: the most while it yields to others. `limits` has the lower.
        last_worlds: how many worlds were formed only to save because of `failing`.
        newest: updates in the newest state that the world began with.
    Members of the world:
        acked: have acknowledged that it is broken. `veterans`: held trained state when they entered it.
        notices, drained: deadlines of nodes and of workers that are to go; `saved_for`: a checkpoint was asked for
            them.
        parting: to be left out, once a world was formed to save its shard.
    Ends and breaks:
        why: why the world broke; `erred`: because a member reported an error.
        stopping: why the run is to end. `failing`: the error that ends it, once the state of its workers is saved.
        saver: the worker that commits the state before a parked run lets all go; `saved`: the step that it committed.
        broken_at: when the world broke, or began to be left, or when a restarted server began to rebuild its state.
        answered_at: when a worker last answered to that.
    """

    epoch: int
    limits: Limits
    phase: Phase = Phase.GATHERING
    n: int = 0
    world: World | None = None
    waiting: dict[str, Waiting] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    dead: frozenset[str] = frozenset()
    lost_silently: frozenset[str] = frozenset()
    quiet: frozenset[str] = frozenset()
    acked: frozenset[str] = frozenset()
    broken_at: float = 0.0
    answered_at: float = 0.0
    newest: int = -1
    late: dict[str, Late] = field(default_factory=dict)
    last_join: float = 0.0
    parked_at: float | None = None
    notices: dict[str, float] = field(default_factory=dict)
    drained: dict[str, float] = field(default_factory=dict)
    keep: int | None = None
    wished: int | None = None
    ceiling: int | None = None
    saver: Member | None = None
    saved: int = -1
    stopping: str | None = None
    saved_for: frozenset[str] = frozenset()
    left_out: frozenset[str] = frozenset()
    faults: Faults = field(default_factory=Faults)
    why: str = ""
    erred: bool = False
    failing: str | None = None
    last_worlds: int = 0
    parting: Member | None = None
    veterans: frozenset[str] = frozenset()
    warming: frozenset[str] = frozenset()
    unexplained: dict[str, float] = field(default_factory=dict)
    never_ready: int = 0
    unfit_why: str = ""
    registered: dict[str, Registered] = field(default_factory=dict)
    expected: frozenset[str] | None = None
    giving_up: GiveUp | None = None
    unfit: int = 0
    unfit_at: float = 0.0


#: The shortest and the longest pause, in seconds, after a worker that could not get ready; it doubles in between.
BACK_OFF_S = (1.0, 60.0)


def ask_again_s(state: State, now: float) -> float:
    """Seconds for which no further worker should be started, because the last ones could not get ready."""
    if not state.unfit:
        return 0.0
    least, most = BACK_OFF_S
    return max(0.0, state.unfit_at + min(most, least * 2.0 ** min(state.unfit - 1, 10)) - now)


def going(state: State, member: Member) -> float | None:
    """When a worker must be gone, because its node goes away or it was drained; None if it stays."""
    deadlines = (state.notices.get(member.node), state.drained.get(member.id))
    return min((d for d in deadlines if d is not None), default=None)


def holds_state(state: State) -> bool:
    """Whether trained state would be lost with the workers, as far as the server knows."""
    world = state.world
    inside = world is not None and bool(world.ids - state.gone - state.waiting.keys())
    waits = any(w.applied >= 0 for w in state.waiting.values())
    return inside or waits or bool(state.late) or state.phase is Phase.REBUILDING


class Memory(NamedTuple):
    """What a worker uses: resident bytes of its process, and a share of its device's memory (None on CPU)."""

    resident_bytes: int | None = None
    device: float | None = None


def people(
    state: State, phases: Mapping[str, str] = MappingProxyType({}), memory: Mapping[str, Memory] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Every present worker, by rank, with node, state, phase and memory: what commands show to people."""

    def waits(name: str) -> str:
        return "does not answer" if name in state.quiet else "waiting"

    world = state.world
    found: list[tuple[Member, int | None, str, str]] = []
    for rank, member in enumerate(world.members if world else ()):
        if member.id not in state.gone:
            between = state.phase not in (Phase.RUNNING, Phase.LEAVING) or member.id in state.waiting
            where = "between worlds" if between else "in the world"
            found.append((member, rank, where, phases.get(member.id, "")))
    known = world.ids if world else frozenset()
    for name, waiting in sorted(state.waiting.items()):
        if name not in known:
            out = name in state.left_out or name in state.faults.sick
            found.append((waiting.member, None, "left out" if out else "spare", waits(name)))
    found += [(late.member, None, "does not answer", "") for _, late in sorted(state.late.items())]
    return [
        {
            "id": m.id,
            "node": m.node,
            "host": m.host,
            "pid": m.pid,
            "rank": rank,
            "state": where if going(state, m) is None else f"{where}, to go",
            "phase": phase,
            "memory_bytes": memory.get(m.id, Memory()).resident_bytes,
            "device_memory": memory.get(m.id, Memory()).device,
        }
        for m, rank, where, phase in found
    ]


def describe(state: State, now: float) -> dict[str, Any]:
    """The phase, the members, the waiting and the lost workers, and when to start more: for people and the
    controller."""
    return {
        "phase": state.phase.value,
        "members": [m.id for m in state.world.members if m.id not in state.gone] if state.world else [],
        "waiting": sorted(state.waiting),
        "left_out": sorted(state.left_out),
        "late": sorted(state.late),
        "gone": sorted(state.gone),
        "going": sorted(state.notices),
        "drained": sorted(state.drained),
        "min_workers": state.limits.min_workers,
        "max_workers": state.limits.max_workers,
        "ceiling": state.ceiling,
        "holds_state": holds_state(state),
        "ask_again_s": round(ask_again_s(state, now), 3),
    }
