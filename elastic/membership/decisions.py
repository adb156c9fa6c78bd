"""Who is in the world: a pure state machine, `advance(state, event) -> (state, commands)`.

    GATHERING --enough joined--> RUNNING --a member lost or failed--> BROKEN --all others joined again--> RUNNING
                                    |                                                                        ^
                                    +--someone to take in, or to let go--> LEAVING --all joined again--------+

A world is never changed. The next one gets a higher generation and consists of its predecessor's members that were not
lost, and of those waiting workers that would lower the rounds of a step. No worker is lost for being slow: the members
that are back go on without those that do not answer, where that is possible, and take them in when they answer. With
fewer than `min_workers` no world forms: the run is parked. After a restart of the server (REBUILDING) no world forms
before every worker that the controller knows has registered or is dead, or the lease is over: by then all other workers
have stopped by themselves.
"""

from __future__ import annotations

from dataclasses import replace

from elastic.membership.commands import Break, Command, Dropped, Fail, Failed, Refuse, Welcome
from elastic.membership.events import (
    Acknowledged,
    Arrived,
    Done,
    Drained,
    Event,
    Expected,
    Joined,
    Lost,
    Notice,
    Quiet,
    Recorded,
    Registered,
    SavedAlone,
    Scaled,
    Slept,
    Stalled,
    Stopped,
    Stuck,
    Unable,
    Unfit,
    Yielded,
)
from elastic.membership.failure import Failure
from elastic.membership.forming import full_size, present, too_few_to_come
from elastic.membership.settling import WENT_ON_WITHOUT, give_up, leave_out, settle
from elastic.membership.state import Phase, State, Waiting
from elastic.membership.world import Member

EXPLAINED_S = 2.0  # from the end of a connection until its process's supervisor must have said how the process ended

_LEFT = "its world broke"


def advance(state: State, event: Event) -> tuple[State, list[Command]]:
    """Take one event: the state after it, and the commands to carry out."""
    if isinstance(event, (Joined, Registered, Acknowledged)) and (sender := _sender(event)) in state.lost_silently:
        state = replace(
            state, gone=state.gone - {sender}, dead=state.dead - {sender}, lost_silently=state.lost_silently - {sender}
        )
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
        return settle(replace(state, quiet=event.member_ids), event.now)
    if isinstance(event, Slept):
        return replace(state, answered_at=event.now), []
    if isinstance(event, Recorded):
        return replace(state, faults=state.faults.recorded(event.step)), []
    if isinstance(event, Unfit):
        return _unfit(state, event)
    if isinstance(event, Unable):
        return _unable(state, event)
    if isinstance(event, Notice):
        return settle(replace(state, notices={**state.notices, event.node: event.deadline}), event.now)
    if isinstance(event, Drained):
        return settle(replace(state, drained={**state.drained, event.member_id: event.deadline}), event.now)
    if isinstance(event, Scaled):
        return settle(_resize(state, event.max_workers, state.ceiling), event.now)
    if isinstance(event, Yielded):
        return settle(_resize(state, state.wished or state.limits.max_workers, event.most), event.now)
    if isinstance(event, SavedAlone):
        return settle(replace(state, saved=event.step), event.now)
    if isinstance(event, Stopped):
        return settle(replace(state, stopping=event.message), event.now)
    if isinstance(event, Expected):
        return settle(replace(state, expected=event.member_ids), event.now)
    commands: list[Command] = []
    for member_id, since in state.unexplained.items():
        if event.now >= since + EXPLAINED_S:
            state, more = _lost(state, Lost(member_id, event.now, died=True))
            commands += more
    state, settled = settle(state, event.now)
    return state, [*commands, *settled]


def _without(found: dict[str, float], member_id: str) -> dict[str, float]:
    return {k: v for k, v in found.items() if k != member_id}


def _sender(event: Joined | Registered | Acknowledged) -> str:
    return event.member_id if isinstance(event, Acknowledged) else event.member.id


def _resize(state: State, wished: int, ceiling: int | None) -> State:
    """Change the most workers of a world. A run that yields workers to others keeps no spares. No world becomes smaller
    than `min_workers`; a ceiling of 0 concerns a parked run only."""
    most = wished if ceiling is None else min(wished, max(ceiling, state.limits.min_workers))
    limits = replace(state.limits, max_workers=most)
    keep = full_size(limits) + (limits.spares if ceiling is None else 0)
    return replace(state, limits=limits, keep=keep, wished=wished, ceiling=ceiling, saver=None)


def _joined(state: State, event: Joined) -> tuple[State, list[Command]]:
    member = event.member
    if state.phase is Phase.ENDED or member.id in state.gone:
        return state, [Refuse(member.id, "the run went on without it")]
    commands: list[Command] = []
    saving = state.failing is not None and state.phase is Phase.RUNNING  # in a world that was formed to save only
    world = state.world if state.world is not None and member.id in state.world.ids else None
    ends = state.phase is Phase.RUNNING or (state.phase is Phase.LEAVING and event.failure is not None)
    if world is not None and ends:
        reason = event.why or f"{member.id} left: {event.failure.kind if event.failure else event.broke or _LEFT}"
        left = frozenset(state.waiting) if state.phase is Phase.LEAVING else frozenset()
        state = replace(state, phase=Phase.BROKEN, broken_at=event.now, acked=left | {member.id})
        commands.append(Break(world, None, reason, planned=bool(event.why)))
    if event.failure is not None:
        state, more = _failed(state, member, event.failure, nothing_to_save=saving or event.applied == 0)
        commands = [Failed(member, event.failure, state.world), *commands, *more]
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
    state, settled = settle(state, event.now)
    return state, [*commands, *settled]


def _failed(state: State, member: Member, failure: Failure, *, nothing_to_save: bool) -> tuple[State, list[Command]]:
    """A member failed: its steps are replayed, or the worker is left out, or the run ends with its error."""
    limits = state.limits
    state = replace(state, faults=state.faults.failed(member.id, failure), why=failure.summary, erred=True)
    faults = state.faults
    if failure.fatal or faults.is_the_jobs(failure, limits.max_failures):
        failing = state.failing or faults.first_like(failure).message
        if nothing_to_save:
            return replace(state, phase=Phase.ENDED), [Fail(failing)]
        return replace(state, failing=failing), []
    others = present(state) - faults.sick - {member.id}
    alone = faults.is_the_workers(member.id, failure) and member.id not in faults.sick
    if not alone or len(others) < limits.min_workers:
        return state, []
    if limits.cut:
        return replace(state, parting=member), []
    return leave_out(state, member)


def _unfit(state: State, event: Unfit) -> tuple[State, list[Command]]:
    """A worker could not get ready: the others go on without it. Where they are too few, it is the run's error."""
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
    trained = bool(state.veterans or state.faults.step)  # such a run waits for other workers, parked if need be
    if not trained and state.phase is not Phase.REBUILDING and too_few_to_come(state):
        return replace(state, phase=Phase.ENDED), [Fail(state.unfit_why)]
    return _lost(state, Lost(event.member_id, event.now, "could not get ready, or not take part"))


def _unable(state: State, event: Unable) -> tuple[State, list[Command]]:
    """A member met an exception that it cannot train after: leave the member out, or end the run if all would fail."""
    if state.phase is Phase.ENDED:
        return state, []
    veterans = state.veterans & present(state) - {event.member_id}
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
    return settle(state, event.now)


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
        lost_silently=state.lost_silently | {event.member_id} if may_come_back else state.lost_silently,
    )
    saver = state.giving_up.saver if state.giving_up is not None else None
    if state.giving_up is not None and saver is not None and saver.id == event.member_id:
        return give_up(state, state.giving_up.message, state.giving_up.status)
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
        commands.append(Refuse(event.member_id, WENT_ON_WITHOUT))
    state, settled = settle(state, event.now)
    return state, [*commands, *settled]


def _stalled(state: State, event: Stalled) -> tuple[State, list[Command]]:
    """The world stands still: break it. No member is lost by that: those that answer join again."""
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
    state, settled = settle(state, event.now)
    return state, [*commands, *settled]
