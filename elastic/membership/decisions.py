"""Who is in the world: a pure state machine, `advance(state, event) -> (state, commands)`.

    GATHERING --enough joined--> RUNNING --a member lost or failed--> BROKEN --all others joined again--> RUNNING
                                    |                                                                        ^
                                    +--someone to take in, or to let go--> LEAVING --all joined again--------+

A world is never changed: the next one gets a higher generation, and only those of its predecessor's members that
were not lost, plus those who wait and would lower the rounds of a step. Nobody is lost for being slow: those who are
back go on, where they can, without members that do not answer, and take them in when they do. With fewer than
`min_workers` nothing forms: the run is parked. After a restart of the server (REBUILDING) nothing forms before every
worker that the controller knows of has registered or is dead, or the lease is over, in which all others have stopped
by themselves.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from elastic.membership import faults as counted
from elastic.membership.faults import TRIES
from elastic.membership.forming import (
    all_back,
    awaited,
    can_do_without_others,
    choose,
    full_size,
    has_newest,
    helpful_size,
    may_follow,
    surplus,
    there,
    too_few_to_come,
    usable,
)
from elastic.membership.messages import (
    Acknowledged,
    Arrived,
    Break,
    Command,
    Done,
    Drained,
    Dropped,
    Event,
    Expected,
    Fail,
    Failed,
    Failure,
    Form,
    GiveUp,
    HandOver,
    Joined,
    Leave,
    LeftBehind,
    LeftOut,
    Lost,
    Notice,
    Park,
    Quiet,
    Rebuilt,
    Recorded,
    Refuse,
    Registered,
    SaveAlone,
    SavedAlone,
    SaveNow,
    Scaled,
    Slept,
    Stalled,
    Stopped,
    Stuck,
    Unable,
    Unfit,
    Welcome,
    Yielded,
)
from elastic.membership.state import Late, Phase, State, Waiting, going
from elastic.membership.world import Generation, Member, World

EXPLAINED_S = 2.0  # from the end of a connection until who watches over the process has said how that ended
LAST_WORLDS = 3  # formed to save what an error ends; then who holds the newest state saves it alone

_LEFT = "its world broke"
_SILENT = "it was silent, and its world went on without it"


def advance(state: State, event: Event) -> tuple[State, list[Command]]:
    """One decision."""
    if isinstance(event, (Joined, Registered, Acknowledged)) and (heard := _who(event)) in state.unheard:
        state = replace(state, gone=state.gone - {heard}, dead=state.dead - {heard}, unheard=state.unheard - {heard})
    if isinstance(event, Joined):
        return _joined(state, event)
    if isinstance(event, Registered):
        return _registered(state, event)
    if isinstance(event, Acknowledged):
        return replace(state, acked=state.acked | {event.member_id}, answered_at=event.now), []
    if isinstance(event, Lost):
        return _lost(state, event)
    if isinstance(event, Done):
        return replace(state, gone=state.gone | {event.member_id}), []
    if isinstance(event, Arrived):
        inside = event.member_id in state.waiting or (state.world is not None and event.member_id in state.world.ids)
        known = inside or event.member_id in state.gone
        state = replace(state, unexplained=_without(state.unexplained, event.member_id))
        return state if known else replace(state, warming=state.warming | {event.member_id}), []
    if isinstance(event, Stalled):
        return _stalled(state, event)
    if isinstance(event, Stuck):
        ending = replace(state, phase=Phase.ENDED)
        return (state, []) if state.phase is Phase.ENDED else (ending, [Fail(state.failing or event.reason)])
    if isinstance(event, Quiet):
        return _settle(replace(state, quiet=event.member_ids), event.now)
    if isinstance(event, Slept):
        return replace(state, answered_at=event.now), []
    if isinstance(event, Recorded):
        return replace(state, faults=state.faults.recorded(event.step)), []
    if isinstance(event, Unfit):
        return _unfit(state, event)
    if isinstance(event, Unable):
        return _unable(state, event)
    if isinstance(event, Notice):
        return _settle(replace(state, notices={**state.notices, event.node: event.deadline}), event.now)
    if isinstance(event, Drained):
        return _settle(replace(state, drained={**state.drained, event.member_id: event.deadline}), event.now)
    if isinstance(event, Scaled):
        return _settle(_resize(state, event.max_workers, state.ceiling), event.now)
    if isinstance(event, Yielded):
        return _settle(_resize(state, state.wished or state.limits.max_workers, event.most), event.now)
    if isinstance(event, SavedAlone):
        return _settle(replace(state, saved=event.step), event.now)
    if isinstance(event, Stopped):
        return _settle(replace(state, stopping=event.message), event.now)
    if isinstance(event, Expected):
        return _settle(replace(state, expected=event.member_ids), event.now)
    commands: list[Command] = []
    for member_id, since in state.unexplained.items():
        if event.now >= since + EXPLAINED_S:
            state, more = _lost(state, Lost(member_id, event.now, died=True))
            commands += more
    state, settled = _settle(state, event.now)
    return state, [*commands, *settled]


def _without(found: dict[str, float], member_id: str) -> dict[str, float]:
    return {k: v for k, v in found.items() if k != member_id}


def _who(event: Joined | Registered | Acknowledged) -> str:
    return event.member_id if isinstance(event, Acknowledged) else event.member.id


def _resize(state: State, wished: int, ceiling: int | None) -> State:
    """The most workers of a world change. Who yields to others keeps no spares. No world becomes smaller than the
    fewest that a run trains with: a ceiling of 0 is for one that is parked."""
    most = wished if ceiling is None else min(wished, max(ceiling, state.limits.min_workers))
    limits = replace(state.limits, max_workers=most)
    keep = full_size(limits) + (limits.spares if ceiling is None else 0)
    return replace(state, limits=limits, keep=keep, wished=wished, ceiling=ceiling, saver=None)


def _joined(state: State, event: Joined) -> tuple[State, list[Command]]:
    member = event.member
    if state.phase is Phase.ENDED or member.id in state.gone:
        return state, [Refuse(member.id, "the run went on without it")]
    commands: list[Command] = []
    saving = state.failing is not None and state.phase is Phase.RUNNING  # in a world that was formed for that
    inside = state.world is not None and member.id in state.world.ids
    if inside and (state.phase is Phase.RUNNING or (state.phase is Phase.LEAVING and event.failure is not None)):
        reason = event.why or f"{member.id} left: {event.failure.kind if event.failure else event.broke or _LEFT}"
        left = frozenset(state.waiting) if state.phase is Phase.LEAVING else frozenset()
        state = replace(state, phase=Phase.BROKEN, broken_at=event.now, acked=left | {member.id})
        assert state.world is not None
        commands.append(Break(state.world, None, reason, planned=bool(event.why)))
    if event.failure is not None:
        state, told = _failed(state, member, event.failure, nothing_to_save=saving or event.applied == 0)
        commands = [Failed(member, event.failure, state.world), *commands, *told]
        if state.phase is Phase.ENDED:
            return state, commands
    elif (event.why or event.broke) and not state.erred:
        state = replace(state, why=event.why or event.broke, erred=bool(event.why))
    waiting = Waiting(member, event.applied, event.now)
    registered = {k: v for k, v in state.registered.items() if k != member.id}
    state = replace(
        state,
        waiting={**state.waiting, member.id: waiting},
        last_join=event.now,
        registered=registered,
        warming=state.warming - {member.id},
        answered_at=event.now,
        quiet=state.quiet - {member.id},
        late={k: late for k, late in state.late.items() if k != member.id},
    )
    state, settled = _settle(state, event.now)
    return state, [*commands, *settled]


def _failed(state: State, member: Member, failure: Failure, *, nothing_to_save: bool) -> tuple[State, list[Command]]:
    """An error of a member: it is replayed, or the worker is left out, or the run ends with it."""
    limits = state.limits
    state = replace(state, faults=state.faults.failed(member.id, failure), why=failure.summary, erred=True)
    faults = state.faults
    if failure.fatal or faults.is_the_jobs(failure, limits.max_failures):
        failing = state.failing or faults.first_like(failure).message
        if nothing_to_save:
            return replace(state, phase=Phase.ENDED), [Fail(failing)]
        return replace(state, failing=failing), []
    others = there(state) - faults.sick - {member.id}
    alone = faults.is_the_workers(member.id, failure) and member.id not in faults.sick
    if not alone or len(others) < limits.min_workers:
        return state, []
    if limits.cut:
        return replace(state, parting=member), []
    return _leave_out(state, member)


def _leave_out(state: State, member: Member) -> tuple[State, list[Command]]:
    """Where others are enough, this worker is in no world any more."""
    faults = replace(state.faults, sick=state.faults.sick | {member.id})
    reason = f"it failed {TRIES} times at one step, where another worker is to try"
    return replace(state, faults=faults), [LeftOut(member, reason)]


def _unfit(state: State, event: Unfit) -> tuple[State, list[Command]]:
    """A worker could not get ready: the others go on without it. Where too few can, that is the run's error."""
    if state.phase is Phase.ENDED:
        return state, []
    state = replace(
        state,
        unfit=state.unfit + 1,
        unfit_at=event.now,
        never_ready=state.never_ready + 1,
        unfit_why=state.unfit_why or event.message,
        warming=state.warming - {event.member_id},
    )
    trained = bool(state.veterans or state.faults.step)  # then it waits for others, parked if it has to
    if not trained and state.phase is not Phase.REBUILDING and too_few_to_come(state):
        return replace(state, phase=Phase.ENDED), [Fail(state.unfit_why)]
    return _lost(state, Lost(event.member_id, event.now, "could not get ready, or not take part"))


def _unable(state: State, event: Unable) -> tuple[State, list[Command]]:
    """An exception that ends a member's part in the run, and the run where it is not its own."""
    if state.phase is Phase.ENDED:
        return state, []
    veterans = state.veterans & there(state) - {event.member_id}
    if state.failing is not None or not event.fresh or (event.final and not veterans):
        return replace(state, phase=Phase.ENDED), [Fail(state.failing or event.message)]
    reason = f"left out, since it failed before its first step: {event.message.partition(chr(10))[0]}"
    state, lost = _lost(state, Lost(event.member_id, event.now, reason))
    state, unfit = _unfit(state, Unfit(event.member_id, event.message, event.now))
    return state, [Refuse(event.member_id, "it failed before its first step"), *lost, *unfit]


def _registered(state: State, event: Registered) -> tuple[State, list[Command]]:
    world, known = state.world, event.member.id not in state.gone
    if known and world is not None and world.generation == event.generation and event.member.id in world.ids:
        return state, [Welcome(event.member.id, event.generation, state.phase is Phase.BROKEN)]
    if event.member.id in state.late:
        return state, [Welcome(event.member.id, event.generation, broken=True)]
    if state.phase is not Phase.REBUILDING or not known:
        return state, [Refuse(event.member.id, f"world {event.generation} is over")]
    state = replace(
        state,
        registered={**state.registered, event.member.id: event},
        n=max(state.n, event.generation.n),
        waiting={k: w for k, w in state.waiting.items() if k != event.member.id},
    )
    return _settle(state, event.now)


def _lost(state: State, event: Lost) -> tuple[State, list[Command]]:
    known, waited = event.member_id in state.gone, state.waiting.get(event.member_id)
    world, late = state.world, state.late.get(event.member_id)
    rank = None if world is None or known else world.rank_of(event.member_id)
    may_come_back = event.silent and rank is not None and waited is None
    had_part = known or rank is not None or waited is not None or late is not None
    asked = event.member_id in state.unexplained
    if (event.died or asked) and not had_part and state.phase is not Phase.REBUILDING:
        if not event.dead and not asked:
            return replace(state, unexplained={**state.unexplained, event.member_id: event.now}), []
        state = replace(state, unexplained=_without(state.unexplained, event.member_id))
        why = f"worker {event.member_id} was lost while it got ready: {event.reason}; the output has what it printed"
        state, commands = _unfit(state, Unfit(event.member_id, why, event.now))
        return state, [Dropped(Member(event.member_id, ""), f"while it got ready: {event.reason}"), *commands]
    faults = state.faults
    if event.died and known:
        faults = faults.explained(event.member_id, event.reason)
    elif event.died and rank is not None and world is not None:
        faults = faults.died(world.generation, event.member_id, event.reason)
    elif event.died and late is not None:
        faults = faults.died(late.generation, event.member_id, event.reason)
    state = replace(
        state,
        faults=faults,
        failing=state.failing or faults.too_many_deaths(state.limits.max_failures),
        waiting={k: v for k, v in state.waiting.items() if k != event.member_id},
        registered={k: v for k, v in state.registered.items() if k != event.member_id},
        late={k: v for k, v in state.late.items() if k != event.member_id},
        gone=state.gone | {event.member_id},
        dead=state.dead | {event.member_id} if event.dead else state.dead,
        unheard=state.unheard | {event.member_id} if may_come_back else state.unheard,
    )
    saver = state.giving_up.saver if state.giving_up is not None else None
    if state.giving_up is not None and saver is not None and saver.id == event.member_id:
        return _give_up(state, state.giving_up.message, state.giving_up.status)
    commands = []
    if world is not None and rank is not None and state.phase in (Phase.RUNNING, Phase.LEAVING):
        state = replace(
            state, phase=Phase.BROKEN, broken_at=event.now, answered_at=event.now, acked=frozenset(state.waiting)
        )
        commands.append(Break(world, world.members[rank], event.reason))
    elif world is not None and rank is not None:
        commands.append(Break(world, world.members[rank], event.reason))
    elif waited is not None:
        commands.append(Dropped(waited.member, event.reason))
    elif late is not None:
        commands.append(Dropped(late.member, event.reason))
    if event.silent and not known and not may_come_back:
        commands.append(Refuse(event.member_id, _SILENT))
    state, settled = _settle(state, event.now)
    return state, [*commands, *settled]


def _stalled(state: State, event: Stalled) -> tuple[State, list[Command]]:
    """Nobody is lost for it: who answers joins again."""
    world = state.world
    if world is None or state.phase not in (Phase.RUNNING, Phase.LEAVING, Phase.BROKEN):
        return state, []
    if event.final:
        state = replace(state, failing=state.failing or event.reason)
    commands: list[Command] = []
    if state.phase is not Phase.BROKEN:
        state = replace(
            state,
            phase=Phase.BROKEN,
            broken_at=event.now,
            answered_at=event.now,
            acked=frozenset(state.waiting),
            why=event.reason,
        )
        commands = [Break(world, None, event.reason)]
    state, settled = _settle(state, event.now)
    return state, [*commands, *settled]


def _settle(state: State, now: float) -> tuple[State, list[Command]]:
    """What can be decided now: take people in, form a world, park, give up."""
    if state.phase is Phase.ENDED:
        return state, []
    if state.phase is Phase.REBUILDING:
        return _rebuild(state, now)
    if state.phase is Phase.RUNNING:
        return _leave_if_better(state, now) if state.failing is None else (state, [])
    return _form(state, now) if all_back(state) or can_do_without_others(state, now) else (state, [])


def _rebuild(state: State, now: float) -> tuple[State, list[Command]]:
    """Go on with the newest world that anyone is in, once everyone who can be in one has said so."""
    expected, there = state.expected, state.registered.keys() | state.waiting.keys() | state.gone
    sure = expected is not None and expected <= there and (state.registered or not expected & state.gone - state.dead)
    if not sure and now - state.broken_at < state.limits.lease_s:
        return state, []
    known = [r for r in state.registered.values() if expected is None or r.member.id in expected]
    newest = max((r.generation for r in known), default=None)
    members = [r.member for r in sorted(known, key=lambda r: r.rank) if r.generation == newest]
    strangers = [r.member for i, r in sorted(state.registered.items()) if r.member not in members]
    refused: list[Command] = []
    for member in strangers:
        refused += [Dropped(member, "in an older world"), Refuse(member.id, "the run went on without it")]
    absent = (expected or frozenset()) - there  # they have stopped, and do not come back after their lease
    gone = state.gone | {m.id for m in strangers} | absent
    state = replace(state, registered={}, gone=gone, acked=frozenset(), broken_at=now)
    if newest is None:
        state, settled = _settle(replace(state, phase=Phase.GATHERING), now)
        return state, [*refused, *settled]
    world = World(newest, tuple(members))
    state = replace(state, world=world, newest=0)  # they hold a state, it is not known which
    if len(members) == next(r.size for r in known if r.generation == newest):
        state, settled = _settle(replace(state, phase=Phase.RUNNING), now)
        return state, [*refused, Rebuilt(world), *settled]
    broken = Break(world, None, "members were lost while the membership server was away")
    return replace(state, phase=Phase.BROKEN, answered_at=now), [*refused, Rebuilt(world), broken]


def _leave_if_better(state: State, now: float) -> tuple[State, list[Command]]:
    """Ask the running world to leave where a faster or safer one can follow."""
    limits, world = state.limits, state.world
    assert world is not None
    leaving = bool(state.notices or state.drained or state.faults.sick & world.ids)
    if not state.waiting and not leaving and world.size <= limits.max_workers:
        return state, []
    state, commands = _report_left_out(state)
    state, dismissed = _dismiss(state)
    commands += dismissed
    largest = min(world.size + len(state.waiting), limits.max_workers)
    helpful = helpful_size(limits.microbatches, largest, limits.min_workers)
    if not leaving and helpful <= world.size <= limits.max_workers:
        return state, commands  # whoever waits is a spare
    fitting, _ = usable(state)
    there = [Waiting(m, sys.maxsize, 0.0) for m in world.members]  # they hold the newest state
    following = {m.id for m in choose(state, [*there, *fitting])}
    taken = [w for w in fitting if w.member.id in following]
    let_go = len(world.ids - following)
    deadlines = {m.id: deadline for m in world.members if (deadline := going(state, m)) is not None}
    due = bool(deadlines) and now >= min(deadlines.values()) - max(2.0, 0.25 * limits.lease_s)
    why = ""
    if taken:
        full = world.size - let_go + len(taken) >= full_size(limits)
        if full or now - min(w.since for w in taken) >= limits.join_window_s:
            why = f"{len(taken)} to take in" + (f", {let_go} to let go" if let_go else "")
    elif let_go and world.size > limits.max_workers:
        why = f"{let_go} to let go"  # the run was scaled down, or one came along to give its state, and has given it
    elif let_go and due:
        why = f"{let_go} to let go, no replacement came"
    if why:
        return replace(state, phase=Phase.LEAVING, broken_at=now, acked=frozenset()), [*commands, Leave(world, why)]
    if due and not let_go and not deadlines.keys() <= state.saved_for:
        return replace(state, saved_for=state.saved_for | deadlines.keys()), [*commands, SaveNow(world)]
    return state, commands


def _dismiss(state: State) -> tuple[State, list[Command]]:
    """Let go who waits outside the running world and is not needed."""
    members = surplus(state)
    ids = {m.id for m in members}
    waiting = {k: w for k, w in state.waiting.items() if k not in ids}
    return replace(state, waiting=waiting, gone=state.gone | ids), [HandOver(m) for m in members]


def _report_left_out(state: State) -> tuple[State, list[Command]]:
    _, different = usable(state)
    new = [(w.member, reason) for w, reason in different if w.member.id not in state.left_out]
    if not new:
        return state, []
    return replace(state, left_out=state.left_out | {m.id for m, _ in new}), [LeftOut(m, reason) for m, reason in new]


def _form(state: State, now: float) -> tuple[State, list[Command]]:
    limits = state.limits
    if state.world is None and state.stopping is not None:
        return _give_up(state, state.stopping, "stopped")
    if state.world is None and not _gathered(state, now):
        return state, []
    state = _count_break(state)
    fitting, _ = usable(state)
    members = choose(state, fitting)
    if len(members) < limits.min_workers:
        return _park(state, len(members), now)
    if state.world is not None and not (may_follow(state, members, now) and has_newest(state, members)):
        return state, []
    if state.last_worlds >= LAST_WORLDS:
        return _give_up(state, state.failing or "", "failed")
    nodes = sorted({m.node for m in members})
    members = sorted(members, key=lambda m: (nodes.index(m.node), m.local_index, m.id))
    world = World(Generation(state.epoch, state.n + 1), tuple(members))
    chosen = {m.id for m in members}
    old = state.world.ids if state.world else frozenset()
    behind = _left_behind(state)
    lost: list[Command] = [Refuse(i, _SILENT) for i in sorted(state.unheard)]
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
        unheard=frozenset(),
    )
    state, left = _report_left_out(state)
    left += [*(LeftBehind(late.member) for late in behind), *lost]
    left += [LeftBehind(w.member) for i, w in state.waiting.items() if i in old & state.quiet]
    state, dismissed = _dismiss(state)
    parting, out = state.parting, list[Command]()
    if parting is not None:
        state, out = _leave_out(replace(state, parting=None), parting)
        if state.failing is None and parting.id in chosen:
            state = replace(state, phase=Phase.LEAVING, broken_at=now)
            return state, [Form(world, parting=True), *(HandOver(m) for m in handed), *left, *dismissed, *out]
    return state, [Form(world, state.failing), *(HandOver(m) for m in handed), *left, *dismissed, *out]


def _left_behind(state: State) -> list[Late]:
    """Members of the broken world that are not back when the next one forms."""
    world, missing = state.world, awaited(state)
    return [Late(m, world.generation) for m in world.members if m.id in missing] if world is not None else []


def _count_break(state: State) -> State:
    """A world whose members all live and joined again broke for a reason that may come again: it is counted."""
    world = state.world
    if state.phase is not Phase.BROKEN or world is None or not world.ids <= state.waiting.keys():
        return state
    step = max(w.applied for w in state.waiting.values())
    faults = state.faults.broke(counted.Break(step, world.generation, state.why or "a connection ended", state.erred))
    return replace(state, faults=faults, failing=state.failing or faults.too_many_breaks(state.limits.max_failures))


def _gathered(state: State, now: float) -> bool:
    """Whether the first world has waited long enough for more; it waits longer where it has too few.

    Workers that hold state wait for nobody: the server was restarted, and everyone who can be there is.
    """
    limits = state.limits
    if not state.waiting:
        return state.parked_at is not None
    if any(w.applied >= 0 for w in state.waiting.values()):
        return True
    waited = now - state.last_join
    if len(state.waiting) >= full_size(limits):
        fitting, _ = usable(state)
        if len(fitting) >= full_size(limits):
            return True
    elif len(state.waiting) < limits.min_workers:
        return state.parked_at is not None or waited >= limits.park_after_s
    return waited >= limits.settle_s


def _park(state: State, have: int, now: float) -> tuple[State, list[Command]]:
    limits = state.limits
    state, commands = _report_left_out(state)
    if state.failing is not None or state.stopping is not None:
        ending = (state.failing, "failed") if state.failing is not None else (state.stopping or "", "stopped")
        state, given_up = _give_up(state, *ending)
        return state, [*commands, *given_up]
    if state.parked_at is None:
        return replace(state, parked_at=now), [*commands, Park(have, limits.min_workers)]
    if limits.max_wait_s is None or now - state.parked_at < limits.max_wait_s:
        state, vacating = _vacate(state)
        return state, [*commands, *vacating]
    message = (
        f"parked for {limits.max_wait_s:g} s with {have} of at least {limits.min_workers} workers; add nodes, or "
        "lower --scaling.min-workers, and start the run again"
    )
    state, given_up = _give_up(state, message, "failed")
    return state, [*commands, *given_up]


def _vacate(state: State) -> tuple[State, list[Command]]:
    """Others need what this parked run has more: let all go, once what they hold is saved. Who waits is in no world,
    and will be in none: that counts as its death. Where it cannot be saved they stay."""
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


def _give_up(state: State, message: str, status: str) -> tuple[State, list[Command]]:
    """End the run; whoever holds the newest state commits it first."""
    answers = {i: i not in state.quiet for i in state.waiting}
    holder = max(state.waiting.values(), key=lambda w: (w.applied, answers[w.member.id]), default=None)
    command = GiveUp(holder.member if holder is not None and holder.applied >= 0 else None, message, status)
    return replace(state, phase=Phase.ENDED, giving_up=command), [command]
