"""Who is in the world: a pure state machine, `advance(state, event) -> (state, commands)`.

    GATHERING --enough joined--> RUNNING --a member lost or failed--> BROKEN --all others joined again--> RUNNING
                                    |                                                                        ^
                                    +--someone to take in, or to let go--> LEAVING --all joined again--------+

A world is never changed: the next one gets a higher generation, and only those of its predecessor's members that
were not lost, plus whoever waits. With fewer than `min_workers` nothing forms: the run is parked. After a restart of
the server (REBUILDING) nothing forms before every worker that the controller knows of has registered or is dead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any


@dataclass(frozen=True, order=True)
class Generation:
    """(epoch of the claim, number of the world in it); only grows."""

    epoch: int
    n: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.n}"

    @staticmethod
    def parse(text: str) -> Generation:
        epoch, _, n = text.partition("-")
        return Generation(int(epoch), int(n))


@dataclass(frozen=True)
class Member:
    """A worker. `device` describes what its arithmetic depends on; bitwise worlds need it equal."""

    id: str
    node: str
    local_index: int = 0
    pid: int = 0
    host: str = ""
    device: str = ""


@dataclass(frozen=True)
class World:
    """An immutable formed membership; a member's rank is its place in `members`."""

    generation: Generation
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        return len(self.members)

    def rank_of(self, member_id: str) -> int | None:
        return next((r for r, m in enumerate(self.members) if m.id == member_id), None)


@dataclass(frozen=True)
class Limits:
    """Sizes and times (seconds) that decisions go by.

    Args:
        settle_s: the first world waits this long for more than `min_workers`.
        join_window_s: joins within it are taken in together: one stall, not several.
        suspect_grace_s: who does not acknowledge a broken world within it is suspected.
        lease_s: a world without any member of its predecessor waits this long, unless those are known dead.
        max_wait_s: longest parking; None for no limit.
        max_failures: times that one error at one step and microbatch is replayed.
        exact: all members of a world must have equal devices.
    """

    min_workers: int
    max_workers: int
    settle_s: float = 2.0
    join_window_s: float = 1.0
    suspect_grace_s: float = 0.3
    lease_s: float = 30.0
    max_wait_s: float | None = None
    max_failures: int = 3
    exact: bool = False


class Phase(Enum):
    REBUILDING = "rebuilding"
    GATHERING = "gathering"
    RUNNING = "running"
    LEAVING = "leaving"
    BROKEN = "broken"
    ENDED = "ended"


# ---- events -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """An error in the job's code; the same kind at the same place is replayed only so often."""

    kind: str
    step: int
    microbatch: int
    message: str


@dataclass(frozen=True)
class Joined:
    """A warm worker asks for a world. `applied`: updates in the state it holds, -1 for none."""

    member: Member
    now: float
    applied: int = -1
    failure: Failure | None = None


@dataclass(frozen=True)
class Registered:
    """After a restart of the server: a worker that is in the midst of a world says so."""

    member: Member
    generation: Generation
    rank: int
    size: int
    now: float


@dataclass(frozen=True)
class Acknowledged:
    """A worker's watcher has seen that its world is broken: it lives, however long its step still takes."""

    member_id: str
    now: float


@dataclass(frozen=True)
class Lost:
    """A worker is gone, or is to be treated so. `dead`: it applies nothing any more, since its process ended or its
    lease did."""

    member_id: str
    now: float
    reason: str = "connection lost"
    dead: bool = False


@dataclass(frozen=True)
class Done:
    """A worker said that it is done: its leaving is no loss."""

    member_id: str


@dataclass(frozen=True)
class Unfit:
    """A worker could not get ready. Before the first world that ends the run; later the others go on without it."""

    member_id: str
    message: str
    now: float


@dataclass(frozen=True)
class Notice:
    """A node will go away at `deadline`."""

    node: str
    deadline: float
    now: float


@dataclass(frozen=True)
class Expected:
    """The workers that the controller knows to exist, told to a restarted server."""

    member_ids: frozenset[str]
    now: float


@dataclass(frozen=True)
class Tick:
    now: float


Event = Joined | Registered | Acknowledged | Lost | Done | Unfit | Notice | Expected | Tick

# ---- commands ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """Tell the members of the world that it exists."""

    world: World


@dataclass(frozen=True)
class Break:
    """Tell everyone in the world that it is broken, so that blocked ones are freed."""

    world: World
    lost: Member | None
    reason: str


@dataclass(frozen=True)
class Leave:
    """Ask the members to leave the world together at their next step boundary and to join again."""

    world: World
    why: str


@dataclass(frozen=True)
class Suspect:
    """A member was given up because it did not acknowledge in time."""

    member: Member


@dataclass(frozen=True)
class Refuse:
    """Tell a worker that it has no part in the run any more."""

    member_id: str
    reason: str


@dataclass(frozen=True)
class LeftOut:
    """A worker waits outside because its device differs."""

    member: Member
    reason: str


@dataclass(frozen=True)
class HandOver:
    """A worker on a node that goes away is not in the new world; it can end."""

    member: Member


@dataclass(frozen=True)
class SaveNow:
    """A node goes away and its workers cannot be spared: make the state durable at the next boundary."""

    world: World


@dataclass(frozen=True)
class Park:
    """Too few workers: `waiting` of them hold the state in memory."""

    have: int
    need: int


@dataclass(frozen=True)
class GiveUp:
    """Parked for too long: `saver` (if anyone holds state) commits it, then the run ends."""

    saver: Member | None
    message: str


@dataclass(frozen=True)
class Fail:
    """The same error came too often."""

    message: str


Command = Form | Break | Leave | Suspect | Refuse | LeftOut | HandOver | SaveNow | Park | GiveUp | Fail

# ---- state ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Waiting:
    """A worker outside a world, ready for the next one."""

    member: Member
    applied: int
    since: float


@dataclass(frozen=True)
class State:
    """Soft state. Mappings are never changed in place.

    `gone` are workers that were lost or are done: never let in again. `acked` have acknowledged the broken world.
    """

    epoch: int
    limits: Limits
    phase: Phase = Phase.GATHERING
    n: int = 0
    world: World | None = None
    waiting: dict[str, Waiting] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    dead: frozenset[str] = frozenset()
    acked: frozenset[str] = frozenset()
    broken_at: float = 0.0
    last_join: float = 0.0
    parked_at: float | None = None
    notices: dict[str, float] = field(default_factory=dict)
    saved_for: frozenset[str] = frozenset()
    left_out: frozenset[str] = frozenset()
    failures: dict[tuple[str, int, int], int] = field(default_factory=dict)
    registered: dict[str, Registered] = field(default_factory=dict)
    expected: frozenset[str] | None = None


def advance(state: State, event: Event) -> tuple[State, list[Command]]:
    """One decision."""
    if isinstance(event, Joined):
        return _joined(state, event)
    if isinstance(event, Registered):
        return _registered(state, event)
    if isinstance(event, Acknowledged):
        return replace(state, acked=state.acked | {event.member_id}), []
    if isinstance(event, Lost):
        return _lost(state, event)
    if isinstance(event, Done):
        return replace(state, gone=state.gone | {event.member_id}), []
    if isinstance(event, Unfit):
        if state.world is None and state.phase is not Phase.REBUILDING:
            return replace(state, phase=Phase.ENDED), [Fail(event.message)]
        return _lost(state, Lost(event.member_id, event.now, "could not get ready"))
    if isinstance(event, Notice):
        return _settle(replace(state, notices={**state.notices, event.node: event.deadline}), event.now)
    if isinstance(event, Expected):
        return _settle(replace(state, expected=event.member_ids), event.now)
    return _settle(state, event.now)


def _joined(state: State, event: Joined) -> tuple[State, list[Command]]:
    member = event.member
    if state.phase is Phase.ENDED or member.id in state.gone:
        return state, [Refuse(member.id, "the run went on without it")]
    commands: list[Command] = []
    if state.phase is Phase.RUNNING and state.world is not None and state.world.rank_of(member.id) is not None:
        reason = event.failure.message.splitlines()[0] if event.failure else "a member left in the middle of a step"
        state = replace(state, phase=Phase.BROKEN, broken_at=event.now, acked=frozenset({member.id}))
        assert state.world is not None
        commands.append(Break(state.world, None, reason))
    if event.failure is not None:
        key = (event.failure.kind, event.failure.step, event.failure.microbatch)
        count = state.failures.get(key, 0) + 1
        state = replace(state, failures={**state.failures, key: count})
        if count > state.limits.max_failures:
            return replace(state, phase=Phase.ENDED), [*commands, Fail(event.failure.message)]
    waiting = Waiting(member, event.applied, event.now)
    registered = {k: v for k, v in state.registered.items() if k != member.id}
    state = replace(
        state, waiting={**state.waiting, member.id: waiting}, last_join=event.now, registered=registered
    )  # fmt: skip
    state, settled = _settle(state, event.now)
    return state, [*commands, *settled]


def _registered(state: State, event: Registered) -> tuple[State, list[Command]]:
    if state.phase is Phase.RUNNING and state.world is not None and state.world.generation == event.generation:
        return state, []  # it only lost its connection
    if state.phase is not Phase.REBUILDING or event.member.id in state.gone:
        return state, [Refuse(event.member.id, f"world {event.generation} is over")]
    state = replace(
        state, registered={**state.registered, event.member.id: event}, n=max(state.n, event.generation.n)
    )  # fmt: skip
    return _settle(state, event.now)


def _lost(state: State, event: Lost) -> tuple[State, list[Command]]:
    known = event.member_id in state.gone
    state = replace(
        state,
        waiting={k: v for k, v in state.waiting.items() if k != event.member_id},
        registered={k: v for k, v in state.registered.items() if k != event.member_id},
        gone=state.gone | {event.member_id},
        dead=state.dead | {event.member_id} if event.dead else state.dead,
    )
    commands: list[Command] = []
    world = state.world
    rank = None if world is None or known else world.rank_of(event.member_id)
    if world is not None and rank is not None and state.phase in (Phase.RUNNING, Phase.LEAVING):
        state = replace(state, phase=Phase.BROKEN, broken_at=event.now, acked=frozenset(state.waiting))
        commands.append(Break(world, world.members[rank], event.reason))
    elif world is not None and rank is not None:
        commands.append(Break(world, world.members[rank], event.reason))
    state, settled = _settle(state, event.now)
    return state, [*commands, *settled]


def _settle(state: State, now: float) -> tuple[State, list[Command]]:
    """What can be decided now: take people in, form a world, suspect, park, give up."""
    if state.phase is Phase.ENDED:
        return state, []
    if state.phase is Phase.REBUILDING:
        return _rebuild(state, now)
    if state.phase is Phase.RUNNING:
        return _leave_if_better(state, now)
    awaited = _awaited(state)
    if awaited:
        return _suspect(state, awaited, now)
    return _form(state, now)


def _rebuild(state: State, now: float) -> tuple[State, list[Command]]:
    if state.expected is None or not state.expected <= (set(state.registered) | set(state.waiting) | state.gone):
        return state, []
    if not state.registered:
        return _settle(replace(state, phase=Phase.GATHERING), now)
    newest = max(r.generation for r in state.registered.values())
    there = sorted((r.rank, r) for r in state.registered.values() if r.generation == newest)
    world = World(newest, tuple(r.member for _, r in there))
    whole = len(there) == there[0][1].size
    state = replace(
        state, world=world, registered={}, phase=Phase.RUNNING if whole else Phase.BROKEN, broken_at=now,
        acked=frozenset(),
    )  # fmt: skip
    if whole:
        return _settle(state, now)
    return state, [Break(world, None, "members were lost while the membership server was away")]


def _awaited(state: State) -> list[Member]:
    """Members of the broken or left world that have not joined again."""
    if state.world is None:
        return []
    return [m for m in state.world.members if m.id not in state.gone and m.id not in state.waiting]


def _suspect(state: State, awaited: list[Member], now: float) -> tuple[State, list[Command]]:
    if state.phase is not Phase.BROKEN or now - state.broken_at < state.limits.suspect_grace_s:
        return state, []
    silent = [m for m in awaited if m.id not in state.acked]
    if not silent:
        return state, []
    state = replace(state, gone=state.gone | {m.id for m in silent})
    commands: list[Command] = [Suspect(m) for m in silent]
    state, settled = _settle(state, now)
    return state, [*commands, *settled]


def _usable(state: State) -> tuple[list[Waiting], list[Waiting]]:
    """(waiting workers that fit into one world, those whose device differs)."""
    everyone = list(state.waiting.values())
    if not state.limits.exact or not everyone:
        return everyone, []
    if state.phase is Phase.RUNNING and state.world is not None:
        device = state.world.members[0].device
    else:
        device = max(everyone, key=lambda w: (w.applied, -w.since)).member.device
    return [w for w in everyone if w.member.device == device], [w for w in everyone if w.member.device != device]


def _leave_if_better(state: State, now: float) -> tuple[State, list[Command]]:
    """Ask the running world to leave where a bigger or safer one can follow."""
    assert state.world is not None
    if not state.waiting and not state.notices:
        return state, []
    limits, world = state.limits, state.world
    state, commands = _report_left_out(state)
    usable, _ = _usable(state)
    newcomers = [w for w in usable if w.member.node not in state.notices]
    going = [m for m in world.members if m.node in state.notices]
    staying = world.size - len(going)
    room = limits.max_workers - staying
    settled = bool(newcomers) and (
        len(newcomers) >= room or now - min(w.since for w in newcomers) >= limits.join_window_s
    )
    why = ""
    if room > 0 and settled:
        why = f"{min(room, len(newcomers))} to take in" + (f", {len(going)} to let go" if going else "")
    elif going:
        soonest = min(state.notices[m.node] for m in going)
        due = now >= soonest - max(2.0, 0.25 * limits.lease_s)
        if staying >= limits.min_workers and due:
            why = f"{len(going)} to let go, no replacement came"
        elif due and staying < limits.min_workers and not {m.id for m in going} <= state.saved_for:
            state = replace(state, saved_for=state.saved_for | {m.id for m in going})
            return state, [*commands, SaveNow(world)]
    if not why:
        return state, commands
    return replace(state, phase=Phase.LEAVING, broken_at=now, acked=frozenset()), [*commands, Leave(world, why)]


def _report_left_out(state: State) -> tuple[State, list[Command]]:
    _, different = _usable(state)
    new = [w.member for w in different if w.member.id not in state.left_out]
    if not new:
        return state, []
    reason = "its device, torch build or thread count differs from the world's"
    return replace(state, left_out=state.left_out | {m.id for m in new}), [LeftOut(m, reason) for m in new]


def _form(state: State, now: float) -> tuple[State, list[Command]]:
    limits = state.limits
    if not state.waiting and state.world is None:
        return state, []
    if state.world is None and state.parked_at is None:
        complete = len(state.waiting) >= limits.max_workers
        if not complete and (len(state.waiting) < limits.min_workers or now - state.last_join < limits.settle_s):
            return state, []
    usable, _ = _usable(state)
    members = _choose(state, usable)
    if len(members) < limits.min_workers:
        return _park(state, len(members), usable, now)
    if state.world is not None and not _may_follow(state, members, now):
        return state, []
    nodes = sorted({m.node for m in members})
    members = sorted(members, key=lambda m: (nodes.index(m.node), m.local_index, m.id))
    world = World(Generation(state.epoch, state.n + 1), tuple(members))
    chosen = {m.id for m in members}
    old = {m.id for m in state.world.members} if state.world else set()
    rest = {k: w for k, w in state.waiting.items() if k not in chosen}
    handed = [w.member for w in rest.values() if w.member.node in state.notices and w.member.id in old]
    state = replace(
        state, phase=Phase.RUNNING, n=state.n + 1, world=world, parked_at=None, acked=frozenset(),
        waiting={k: w for k, w in rest.items() if w.member not in handed},
        gone=state.gone | {m.id for m in handed},
    )  # fmt: skip
    state, left = _report_left_out(state)
    return state, [Form(world), *(HandOver(m) for m in handed), *left]


def _choose(state: State, usable: list[Waiting]) -> list[Member]:
    """The members of the next world: those with the newest state first; those on nodes that go away only if needed."""
    newest = max((w.applied for w in usable), default=-1)
    ranked = sorted(
        usable, key=lambda w: (w.member.node in state.notices, -w.applied, w.since, w.member.id)
    )  # fmt: skip
    staying = [w for w in ranked if w.member.node not in state.notices]
    enough = len(staying) >= state.limits.min_workers
    if enough and (newest < 0 or any(w.applied == newest for w in staying)):
        return [w.member for w in staying[: state.limits.max_workers]]
    if enough:  # only workers that go away hold the state: one comes along to give it
        giver = next(w for w in ranked if w.applied == newest)
        return [*(w.member for w in staying[: max(1, state.limits.max_workers - 1)]), giver.member]
    return [w.member for w in ranked[: state.limits.max_workers]]


def _may_follow(state: State, members: Iterable[Member], now: float) -> bool:
    """Two worlds never apply steps at one time: a successor shares a member, or waits out the lease."""
    assert state.world is not None
    old = {m.id for m in state.world.members}
    shares = any(m.id in old for m in members)
    return shares or old <= state.dead or now - state.broken_at >= state.limits.lease_s


def _park(state: State, have: int, usable: list[Waiting], now: float) -> tuple[State, list[Command]]:
    limits = state.limits
    if state.parked_at is None:
        return replace(state, parked_at=now), [Park(have, limits.min_workers)]
    if limits.max_wait_s is not None and now - state.parked_at >= limits.max_wait_s:
        holder = max(usable, key=lambda w: w.applied, default=None)
        saver = holder.member if holder is not None and holder.applied >= 0 else None
        message = (
            f"parked for {limits.max_wait_s:.0f} s with {have} of at least {limits.min_workers} workers; add nodes, or "
            "lower --scaling.min-workers, and start the run again"
        )
        return replace(state, phase=Phase.ENDED), [GiveUp(saver, message)]
    return state, []


def describe(state: State) -> dict[str, Any]:
    """For people and the controller: the phase, who is in, who waits, who is gone."""
    return {
        "phase": state.phase.value,
        "members": [m.id for m in state.world.members if m.id not in state.gone] if state.world else [],
        "waiting": sorted(state.waiting),
        "left_out": sorted(state.left_out),
        "gone": sorted(state.gone),
        "going": sorted(state.notices),
    }
