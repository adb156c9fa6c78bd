"""Who is in the world: a pure state machine, `advance(state, event) -> (state, commands)`.

    GATHERING --enough joined--> RUNNING --a member lost or failed--> BROKEN --all others joined again--> RUNNING
                                    |                                                                        ^
                                    +--someone to take in, or to let go--> LEAVING --all joined again--------+

A world is never changed: the next one gets a higher generation, and only those of its predecessor's members that
were not lost, plus whoever waits. With fewer than `min_workers` nothing forms: the run is parked. After a restart of
the server (REBUILDING) nothing forms before every worker that the controller knows of has registered or is dead.
"""

from __future__ import annotations

from dataclasses import replace

from elastic.membership.forming import awaited, choose, may_follow, usable
from elastic.membership.messages import (
    Acknowledged,
    Break,
    Command,
    Done,
    Event,
    Expected,
    Fail,
    Form,
    GiveUp,
    HandOver,
    Joined,
    Leave,
    LeftOut,
    Lost,
    Notice,
    Park,
    Refuse,
    Registered,
    SaveNow,
    Suspect,
    Unfit,
)
from elastic.membership.state import Phase, State, Waiting
from elastic.membership.world import Generation, Member, World


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
    missing = awaited(state)
    if missing:
        return _suspect(state, missing, now)
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


def _suspect(state: State, missing: list[Member], now: float) -> tuple[State, list[Command]]:
    if state.phase is not Phase.BROKEN or now - state.broken_at < state.limits.suspect_grace_s:
        return state, []
    silent = [m for m in missing if m.id not in state.acked]
    if not silent:
        return state, []
    state = replace(state, gone=state.gone | {m.id for m in silent})
    commands: list[Command] = [Suspect(m) for m in silent]
    state, settled = _settle(state, now)
    return state, [*commands, *settled]


def _leave_if_better(state: State, now: float) -> tuple[State, list[Command]]:
    """Ask the running world to leave where a bigger or safer one can follow."""
    assert state.world is not None
    if not state.waiting and not state.notices:
        return state, []
    limits, world = state.limits, state.world
    state, commands = _report_left_out(state)
    fitting, _ = usable(state)
    newcomers = [w for w in fitting if w.member.node not in state.notices]
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
    _, different = usable(state)
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
    fitting, _ = usable(state)
    members = choose(state, fitting)
    if len(members) < limits.min_workers:
        return _park(state, len(members), fitting, now)
    if state.world is not None and not may_follow(state, members, now):
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


def _park(state: State, have: int, fitting: list[Waiting], now: float) -> tuple[State, list[Command]]:
    limits = state.limits
    if state.parked_at is None:
        return replace(state, parked_at=now), [Park(have, limits.min_workers)]
    if limits.max_wait_s is not None and now - state.parked_at >= limits.max_wait_s:
        holder = max(fitting, key=lambda w: w.applied, default=None)
        saver = holder.member if holder is not None and holder.applied >= 0 else None
        message = (
            f"parked for {limits.max_wait_s:.0f} s with {have} of at least {limits.min_workers} workers; add nodes, or "
            "lower --scaling.min-workers, and start the run again"
        )
        return replace(state, phase=Phase.ENDED), [GiveUp(saver, message)]
    return state, []
