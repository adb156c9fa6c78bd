"""What follows from the state of a run by itself: a world is formed or left, the run is parked or given up. Pure.

`settle` is called after every event and as time passes. `forming` decides which workers fit into a world, and when it
may follow.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from elastic.membership import faults as counted
from elastic.membership.commands import (
    Break,
    Command,
    Dropped,
    Form,
    GiveUp,
    HandOver,
    Leave,
    LeftBehind,
    LeftOut,
    Park,
    Rebuilt,
    Refuse,
    SaveAlone,
    SaveNow,
)
from elastic.membership.faults import TRIES
from elastic.membership.forming import (
    all_back,
    awaited,
    can_do_without_others,
    choose,
    full_size,
    has_newest,
    helpful_of,
    in_cells,
    is_enough,
    may_follow,
    surplus,
    usable,
)
from elastic.membership.state import Late, Phase, State, Waiting, going
from elastic.membership.world import Generation, Member, World

LAST_WORLDS = 3  # worlds formed only to save because of an error; after them one worker saves alone
WENT_ON_WITHOUT = "it was silent, and its world went on without it"


def settle(state: State, now: float) -> tuple[State, list[Command]]:
    """Do what can be decided now: take workers in, form a world, park, give up."""
    if state.phase is Phase.ENDED:
        return state, []
    if state.phase is Phase.REBUILDING:
        return _rebuild(state, now)
    if state.phase is Phase.RUNNING and state.world is not None:
        return _leave_if_better(state, state.world, now) if state.failing is None else (state, [])
    return _form(state, now) if all_back(state) or can_do_without_others(state, now) else (state, [])


def _rebuild(state: State, now: float) -> tuple[State, list[Command]]:
    """Go on with the newest world that anyone is in, once every worker that can be in one has registered."""
    expected, present = state.expected, state.registered.keys() | state.waiting.keys() | state.gone
    sure = expected is not None and expected <= present and (state.registered or not expected & state.gone - state.dead)
    if not sure and now - state.broken_at < state.limits.lease_s:
        return state, []
    known = [r for r in state.registered.values() if expected is None or r.member.id in expected]
    newest = max((r.generation for r in known), default=None)
    members = [r.member for r in sorted(known, key=lambda r: r.rank) if r.generation == newest]
    strangers = [r.member for i, r in sorted(state.registered.items()) if r.member not in members]
    refused: list[Command] = []
    for member in strangers:
        refused += [Dropped(member, "in an older world"), Refuse(member.id, "the run went on without it")]
    absent = (expected or frozenset()) - present  # their lease is over: they have stopped, and do not come back
    gone = state.gone | {m.id for m in strangers} | absent
    state = replace(state, registered={}, gone=gone, acked=frozenset(), broken_at=now)
    if newest is None:
        state, settled = settle(replace(state, phase=Phase.GATHERING), now)
        return state, [*refused, *settled]
    world = World(newest, tuple(members))
    state = replace(state, world=world, newest=0)  # they hold a state, though it is not known which
    if len(members) == next(r.size for r in known if r.generation == newest):
        state, settled = settle(replace(state, phase=Phase.RUNNING), now)
        return state, [*refused, Rebuilt(world), *settled]
    broken = Break(world, None, "members were lost while the membership server was away")
    return replace(state, phase=Phase.BROKEN, answered_at=now), [*refused, Rebuilt(world), broken]


def _leave_if_better(state: State, world: World, now: float) -> tuple[State, list[Command]]:
    """Ask the running world to break up if a faster or safer one can follow it."""
    limits = state.limits
    leaving = bool(state.notices or state.drained or state.faults.sick & world.ids)
    if not state.waiting and not leaving and world.size <= limits.max_workers:
        return state, []
    state, commands = _report_left_out(state)
    state, dismissed = _dismiss(state, world)
    commands += dismissed
    largest = min(in_cells([*world.members, *state.waiting.values()], limits.cell_size), limits.max_workers)
    helpful = helpful_of(limits, largest)
    if not leaving and helpful <= in_cells(world.members, limits.cell_size) and world.size <= limits.max_workers:
        return state, commands  # the waiting workers are spares
    fitting, _ = usable(state)
    inside = [Waiting(m, sys.maxsize, 0.0) for m in world.members]  # they hold the newest state
    members = choose(state, [*inside, *fitting])
    following = {m.id for m in members}
    joining = [w for w in fitting if w.member.id in following]
    let_go = len(world.ids - following)
    deadlines = {m.id: deadline for m in world.members if (deadline := going(state, m)) is not None}
    due = bool(deadlines) and now >= min(deadlines.values()) - max(2.0, 0.25 * limits.lease_s)
    why = ""
    if joining:
        full = in_cells(members, limits.cell_size) >= full_size(limits)
        if full or now - min(w.since for w in joining) >= limits.join_window_s:
            why = f"{len(joining)} to take in" + (f", {let_go} to let go" if let_go else "")
    elif let_go and world.size > limits.max_workers:
        # the run was scaled down, or a member joined only to give its state, which it has done
        why = f"{let_go} to let go"
    elif let_go and due:
        why = f"{let_go} to let go, no replacement came"
    if why:
        return replace(state, phase=Phase.LEAVING, broken_at=now, acked=frozenset()), [*commands, Leave(world, why)]
    if due and not let_go and not deadlines.keys() <= state.saved_for:
        return replace(state, saved_for=state.saved_for | deadlines.keys()), [*commands, SaveNow(world)]
    return state, commands


def _dismiss(state: State, world: World) -> tuple[State, list[Command]]:
    """Let workers go that wait outside the running world and are not needed."""
    members = surplus(state, world)
    ids = {m.id for m in members}
    waiting = {k: w for k, w in state.waiting.items() if k not in ids}
    return replace(state, waiting=waiting, gone=state.gone | ids), [HandOver(m) for m in members]


def _report_left_out(state: State) -> tuple[State, list[Command]]:
    _, different = usable(state)
    new = [(w.member, reason) for w, reason in different if w.member.id not in state.left_out]
    if not new:
        return state, []
    return replace(state, left_out=state.left_out | {m.id for m, _ in new}), [LeftOut(m, reason) for m, reason in new]


def leave_out(state: State, member: Member) -> tuple[State, list[Command]]:
    """Keep this worker out of all worlds, as long as there are enough others."""
    faults = replace(state.faults, sick=state.faults.sick | {member.id})
    reason = f"it failed {TRIES} times at one step, where another worker is to try"
    return replace(state, faults=faults), [LeftOut(member, reason)]


def _form(state: State, now: float) -> tuple[State, list[Command]]:
    limits = state.limits
    if state.world is None and state.stopping is not None:
        return give_up(state, state.stopping, "stopped")
    if state.world is None and not _gathered(state, now):
        return state, []
    state = _count_break(state)
    fitting, _ = usable(state)
    members = choose(state, fitting)
    if not is_enough(limits, members):
        return _park(state, in_cells(members, limits.cell_size), now)
    if state.world is not None and not (may_follow(state, state.world, members, now) and has_newest(state, members)):
        return state, []
    if state.last_worlds >= LAST_WORLDS:
        return give_up(state, state.failing or "", "failed")
    nodes = sorted({m.node for m in members})
    members = sorted(members, key=lambda m: (nodes.index(m.node), m.local_index, m.id))
    world = World(Generation(state.epoch, state.n + 1), tuple(members))
    chosen = {m.id for m in members}
    old = state.world.ids if state.world else frozenset()
    behind = _left_behind(state)
    lost: list[Command] = [Refuse(i, WENT_ON_WITHOUT) for i in sorted(state.lost_silently)]
    rest = {k: w for k, w in state.waiting.items() if k not in chosen}
    handed = [w.member for w in rest.values() if w.member.node in state.notices and w.member.id in old]
    state = replace(
        state,
        phase=Phase.RUNNING,
        n=state.n + 1,
        world=world,
        parked_at=None,
        acked=frozenset(),
        saver=None,
        saved=-1,
        unfit=state.unfit if chosen <= old else 0,
        waiting={k: w for k, w in rest.items() if w.member not in handed},
        gone=state.gone | {m.id for m in handed},
        why="",
        erred=False,
        veterans=frozenset(w.member.id for w in state.waiting.values() if w.applied > 0),
        last_worlds=state.last_worlds + (state.failing is not None),
        newest=max(w.applied for w in state.waiting.values() if w.member.id in chosen),
        late={**state.late, **{late.member.id: late for late in behind}},
        lost_silently=frozenset(),
    )
    state, left = _report_left_out(state)
    left += [*(LeftBehind(late.member) for late in behind), *lost]
    left += [LeftBehind(w.member) for i, w in state.waiting.items() if i in old & state.quiet]
    state, dismissed = _dismiss(state, world)
    parting, out = state.parting, list[Command]()
    if parting is not None:
        state, out = leave_out(replace(state, parting=None), parting)
        if state.failing is None and parting.id in chosen:
            state = replace(state, phase=Phase.LEAVING, broken_at=now)
            return state, [Form(world, parting=True), *(HandOver(m) for m in handed), *left, *dismissed, *out]
    return state, [Form(world, state.failing), *(HandOver(m) for m in handed), *left, *dismissed, *out]


def _left_behind(state: State) -> list[Late]:
    """Members of the broken world that are not back when the next one forms."""
    world, missing = state.world, awaited(state)
    return [Late(m, world.generation) for m in world.members if m.id in missing] if world is not None else []


def _count_break(state: State) -> State:
    """Count a world that broke although all its members live and joined again: the reason may come again."""
    world = state.world
    if state.phase is not Phase.BROKEN or world is None or not world.ids <= state.waiting.keys():
        return state
    step = max(w.applied for w in state.waiting.values())
    faults = state.faults.broke(counted.Break(step, world.generation, state.why or "a connection ended", state.erred))
    return replace(state, faults=faults, failing=state.failing or faults.too_many_breaks(state.limits.max_failures))


def _gathered(state: State, now: float) -> bool:
    """Whether the first world has waited long enough for more workers; with fewer than `min_workers` it waits longer.

    If workers hold state, the server was restarted and all of them are known: then there is nobody to wait for.
    """
    limits = state.limits
    if not state.waiting:
        return state.parked_at is not None
    if any(w.applied >= 0 for w in state.waiting.values()):
        return True
    waited = now - state.last_join
    there = in_cells(state.waiting.values(), limits.cell_size)
    if there >= full_size(limits):
        fitting, _ = usable(state)
        if in_cells(fitting, limits.cell_size) >= full_size(limits):
            return True
    elif there < limits.min_workers:
        return state.parked_at is not None or waited >= limits.park_after_s
    return waited >= limits.settle_s


def _park(state: State, have: int, now: float) -> tuple[State, list[Command]]:
    limits = state.limits
    state, commands = _report_left_out(state)
    if state.failing is not None or state.stopping is not None:
        ending = (state.failing, "failed") if state.failing is not None else (state.stopping or "", "stopped")
        state, given_up = give_up(state, *ending)
        return state, [*commands, *given_up]
    park = Park(have, limits.min_workers, limits.cell_size)
    if state.parked_at is None:
        return replace(state, parked_at=now), [*commands, park]
    if limits.max_wait_s is None or now - state.parked_at < limits.max_wait_s:
        state, vacating = _vacate(state)
        return state, [*commands, *vacating]
    message = (
        f"parked for {limits.max_wait_s:g} s with {have} of at least {limits.min_workers} {park.what}; add "
        "nodes, or lower --scaling.min-workers, and start the run again"
    )
    state, given_up = give_up(state, message, "failed")
    return state, [*commands, *given_up]


def _vacate(state: State) -> tuple[State, list[Command]]:
    """Other runs need the workers of this parked run: let all go, once the state that they hold is saved. They are in
    no world and will be in none, which counts as their death. If the state cannot be saved, they stay."""
    if state.ceiling != 0 or not state.waiting:
        return state, []
    holder = max(state.waiting.values(), key=lambda w: (w.applied, w.member.id not in state.quiet))
    if holder.applied > state.saved:
        if state.saver is not None and state.saver.id in state.waiting:
            return state, []
        return replace(state, saver=holder.member), [SaveAlone(holder.member)]
    ids = state.waiting.keys()
    members = [w.member for w in state.waiting.values()]
    state = replace(state, waiting={}, gone=state.gone | ids, dead=state.dead | ids, saver=None)
    return state, [HandOver(m) for m in members]


def give_up(state: State, message: str, status: str) -> tuple[State, list[Command]]:
    """End the run; the worker that holds the newest state commits it first."""
    answers = {i: i not in state.quiet for i in state.waiting}
    holder = max(state.waiting.values(), key=lambda w: (w.applied, answers[w.member.id]), default=None)
    command = GiveUp(holder.member if holder is not None and holder.applied >= 0 else None, message, status)
    return replace(state, phase=Phase.ENDED, giving_up=command), [command]
