"""What the membership decisions know: soft state, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from elastic.membership.commands import GiveUp
from elastic.membership.events import Registered
from elastic.membership.faults import Faults
from elastic.membership.world import Generation, Member, World


@dataclass(frozen=True)
class Limits:
    """Sizes and times (seconds) that decisions go by.

    Args:
        spares: warm workers kept outside the world when the run is scaled down.
        microbatches: V, equal parts of a step's batch: a world never has more members. None: every size helps.
        settle_s: the first world waits this long for more than `min_workers`.
        park_after_s: a first world that lacks workers is said to be parked after this long without another.
        join_window_s: joins within it are taken in together: one stall, not several.
        grace_s: members of a broken world that answered wait for the others at most this long after the last answer,
            if they can do without them.
        lease_s: a world without any member of its predecessor waits this long, unless those are known dead.
        max_wait_s: longest parking; None for no limit.
        max_failures: times that one error at one step and microbatch is replayed.
        exact: all members of a world must have equal devices and data that are equal to the last bit.
        cut: the state is cut over the members, so that none is left out while it holds a part.
        expects: workers that are started, if nobody replaces those that cannot get ready.
    """

    min_workers: int
    max_workers: int
    spares: int = 0
    microbatches: int | None = None
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


@dataclass(frozen=True)
class Late:
    """A worker that was in a world whose others went on before it answered. It has left that world or will, and is
    taken in like any other when it joins: what it holds is on the way to what they hold."""

    member: Member
    generation: Generation


@dataclass(frozen=True)
class State:
    """Soft state. Mappings are never changed in place.

    `gone` are workers that were lost or are done: never let in again, but for those `unheard`, which were lost for
    their silence alone, from a world that no other one has followed yet. `quiet` wait, but said nothing lately. `acked`
    have acknowledged the broken world. `notices` and `drained` are the deadlines of nodes and of workers that are to
    go. `keep` is how many workers to have, in the world and outside of it, once that was changed. `wished` is the most
    that the run was given, `ceiling` the most while it yields to others; the limits have the lower. `saver` is who
    commits the state before a parked run lets all go, `saved` the step of what was committed so. `stopping` says why
    the run is to end; `failing` is the error that ends it, once what its workers hold is saved, for which `last_worlds`
    were formed.
    `parting` is to be left out, once a world was formed in which what it holds of the state is saved.
    `warming` are connected and get ready; `unexplained` did, until their connection ended at that time: how their
    process ended is about to be told; `never_ready` were not able to, the first because of `unfit_why`.
    `veterans` held trained state when they entered the world. `why` the world broke, `erred`: by an error of a member.
    `broken_at` is also when a world began to be left, and when a restarted server began to rebuild itself;
    `answered_at` is when somebody last answered that. `newest`: updates in the newest state that the world began with.
    """

    epoch: int
    limits: Limits
    phase: Phase = Phase.GATHERING
    n: int = 0
    world: World | None = None
    waiting: dict[str, Waiting] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    dead: frozenset[str] = frozenset()
    unheard: frozenset[str] = frozenset()
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


#: The first and the longest pause, in seconds, after a worker that could not get ready; it doubles in between.
BACK_OFF_S = (1.0, 60.0)


def ask_again_s(state: State, now: float) -> float:
    """Seconds in which no further worker should be started: the last ones could not get ready."""
    if not state.unfit:
        return 0.0
    least, most = BACK_OFF_S
    return max(0.0, state.unfit_at + min(most, least * 2.0 ** min(state.unfit - 1, 10)) - now)


def going(state: State, member: Member) -> float | None:
    """When a worker is to be gone, because its node goes away or it was drained; None for one that stays."""
    deadlines = (state.notices.get(member.node), state.drained.get(member.id))
    return min((d for d in deadlines if d is not None), default=None)


def holds_state(state: State) -> bool:
    """Whether there are workers with whom trained state would be lost, as far as the server knows."""
    world = state.world
    inside = world is not None and bool(world.ids - state.gone - state.waiting.keys())
    waits = any(w.applied >= 0 for w in state.waiting.values())
    return inside or waits or bool(state.late) or state.phase is Phase.REBUILDING


def people(state: State, phases: Mapping[str, str]) -> list[dict[str, Any]]:
    """For people: every worker that is there, by rank, with node, state and phase."""

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
        }
        for m, rank, where, phase in found
    ]


def describe(state: State, now: float) -> dict[str, Any]:
    """For people and the controller: the phase, who is in, who waits, who is gone, when to start more."""
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
