"""Finds workers that are silent or hang, and evicts those that hang: names them and saves the stacks of all members."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from elastic.membership.connections import Connections
from elastic.membership.events import Event, Quiet, Stalled, Stuck
from elastic.membership.failure import named
from elastic.membership.forming import awaited, holder_is_back, state_holders
from elastic.membership.keeper import Keeper
from elastic.membership.protocol import BEAT_S, LATELY_S, SILENT_S, STACKS_S, Dump, beat_s
from elastic.membership.stage import UNHEARD, Stage
from elastic.membership.state import Phase, State
from elastic.membership.watch import (
    QUIET,
    STALLED,
    Progress,
    caught_up,
    excuse,
    hang_limit_s,
    hung,
    overdue,
    p95,
    silent,
    slow,
    stalled_times,
)
from elastic.membership.world import Generation, World

#: Seconds from one look to the next, for each worker: a look takes about 8 us for each. So of 4096 it is two a second.
LOOK_S_EACH = 1.2e-4

_UNHEARD = Progress(UNHEARD, 0.0)


class Watchman:
    """Keeps the last heartbeat of each worker, and decides by them.

    Attributes:
        beat_s: seconds between two beats of a worker. They grow with the number of workers and never become less, since
            a worker hears of it only with its next beat; the patience with silence grows by twice as much.

    Args:
        hang_s: fixed hang time-out in seconds, or None for one that is computed from the steps seen.
        give_up: called for a worker that the run goes on without, with (member id, message to the worker, reason for
            the ledger, whether the worker applies nothing any more, whether silence is the only reason).
        decide: takes an event.
    """

    def __init__(
        self,
        keeper: Keeper,
        connections: Connections,
        hang_s: float | None,
        give_up: Callable[[str, str, str, bool, bool], None],
        decide: Callable[[Event], None],
    ):
        self._keeper, self._connections, self._hang_s, self._give_up = keeper, connections, hang_s, give_up
        self._decide = decide
        self.beat_s, self._silent_s, self._next_look = BEAT_S, SILENT_S, 0.0
        self._last_message: dict[str, float] = {}
        self._probed_s: dict[str, float] = {}  # between two probes of its machine
        self._delayed_until: dict[str, float] = {}  # when messages have arrived that were sent while the line was cut
        self._excused_until = 0.0
        self._progress: dict[str, Progress] = {}
        self._stacks: dict[str, str] = {}
        self._condemned: set[str] = set()
        self._waited_out: set[int] = set()  # samples whose loading somebody was given up for
        self._steps_out: set[int] = set()  # steps in which somebody was given up
        self._formed_at = 0.0
        self._stall_reported: World | None = None
        self._made_anew: set[int] = set()  # steps whose world was replaced because it stood still
        self._slow_reported: set[tuple[int, ...]] = set()
        self._slow_evaluation: Generation | None = None  # the newest world in which one was reported
        self._step_times: deque[float] = deque(maxlen=100)
        self._state: State

    def received(self, member_id: str, now: float) -> None:
        """The worker sent a message."""
        self._last_message[member_id] = now

    def connected(self, member_id: str, now: float, probed_s: float) -> None:
        """The worker has connected; its machine is probed every `probed_s` seconds while it is silent."""
        self._last_message[member_id], self._probed_s[member_id] = now, probed_s

    def forget(self, member_id: str) -> None:
        """The worker is not connected any more."""
        self._last_message.pop(member_id, None)
        self._probed_s.pop(member_id, None)
        self._delayed_until.pop(member_id, None)

    def slept(self, seconds: float, now: float) -> None:
        """This process was suspended or behind for `seconds`: messages of that time are not read yet, and no worker is
        late because of it."""
        self._last_message = {member_id: min(now, at + seconds) for member_id, at in self._last_message.items()}
        self._progress = {i: replace(p, since=min(now, p.since + seconds)) for i, p in self._progress.items()}

    def new_world(self, known: Iterable[str], now: float) -> None:
        """A world was formed. Progress counts within a world; that of the `known` members is kept."""
        self._progress = {i: self._progress[i] for i in known if i in self._progress}
        self._formed_at, self._stall_reported = now, None
        self._condemned.clear()

    def progress(self, member_id: str, reported: Progress) -> None:
        """A member of the world reported its position."""
        known = self._progress.get(member_id)
        if known is None or replace(reported, since=known.since) != known:
            self._progress[member_id] = reported

    def phases(self) -> dict[str, str]:
        """What each member of the world is doing, as far as it reported."""
        return {member_id: progress.label for member_id, progress in self._progress.items()}

    def steps_took(self, seconds: Iterable[float]) -> None:
        """Add the durations of steps, in seconds; the hang time-out is computed from the last 100."""
        self._step_times.extend(seconds)

    def stacks(self, member_id: str, text: str) -> None:
        """A member answered with the stacks that it was asked for."""
        self._stacks[member_id] = text

    def listen(self, state: State, now: float) -> None:
        """Decide on the waiting workers that sent nothing lately, if they are others than before."""
        lately_s = LATELY_S + 2 * (self.beat_s - BEAT_S)
        quiet = frozenset(i for i in state.waiting if now - self._last_message.get(i, now) > lately_s)
        if quiet != state.quiet:
            self._decide(Quiet(quiet, now))

    def look(self, state: State, now: float) -> None:
        """Give up silent workers, and begin to evict hanging ones: in the running world, or while members leave it."""
        if now < self._next_look:
            return
        workers = len(self._last_message)
        self._next_look = now + workers * LOOK_S_EACH
        self.beat_s = max(self.beat_s, beat_s(workers, state.limits.lease_s))
        self._silent_s = SILENT_S + 2 * (self.beat_s - BEAT_S)
        self._lose_silent(state, now)
        self._state, world = state, state.world
        if world is None:
            return
        self._report_slow(world, now)
        places = self._places(world, now)
        decided, found = self._hung(places, world, state, now)
        if decided is not None:
            self._decide(decided)
            return
        for member_id in found:
            if member_id not in self._condemned:
                self._condemned.add(member_id)
                self._connections.start(self._evict(member_id, world))
        inside = state.phase in (Phase.RUNNING, Phase.LEAVING) and world.ids.isdisjoint(state.waiting)
        if inside and self._condemned.isdisjoint(world.ids):
            self._watch_stalls(places, world, now)

    def _lose_silent(self, state: State, now: float) -> None:
        members, lease_s = state.world.ids if state.world else frozenset(), state.limits.lease_s
        seen = self._seen(now)
        self._excused_until = excuse(self._excused_until, seen, now, self._silent_s, members)
        ready = members | state.waiting.keys() | state.late.keys() if state.world is not None else frozenset()
        kept = state_holders(state)
        for member_id in silent(seen, now, self._silent_s, members, lease_s, self._excused_until, ready):
            if member_id in kept:
                continue
            silent_s = now - seen[member_id]
            self._last_message.pop(member_id)
            self._give_up(member_id, "", f"silent for {silent_s:.0f} s", silent_s > lease_s, True)

    def _seen(self, now: float) -> dict[str, float]:
        """When each worker last sent something, or its machine answered for it: its process lives, stopped or not."""
        seen = dict(self._last_message)
        for member_id, at in self._last_message.items():
            probed_s = self._probed_s.get(member_id, BEAT_S)
            if now - at > self._silent_s / 2:
                silence_s = max(0.0, self._connections.silence_s(member_id) - probed_s)
                seen[member_id] = max(at, now - silence_s)
                if silence_s > self._silent_s / 4:  # TCP resends lost packets at intervals that grow with the silence
                    self._delayed_until[member_id] = now + (now - at)
        return seen

    def _hung(
        self, places: Mapping[str, Progress], world: World, state: State, now: float
    ) -> tuple[Event | None, list[str]]:
        """The event to decide on, or the members to evict. A member that only does not answer is left behind instead,
        if the others can go on without it."""
        limits = p95(self._step_times), self._hang_s
        quiet = {i for i in world.ids if now - self._last_message.get(i, now) > self._silent_s}
        back = [state.waiting[i].since for i in world.ids if i in state.waiting]
        if state.phase is Phase.BROKEN:
            return self._overdue_in_broken(state, quiet, now)
        if state.phase is Phase.LEAVING and back:
            found = overdue(places, dict.fromkeys(awaited(state), 1.0), min(back), now, *limits)
        elif state.phase in (Phase.RUNNING, Phase.LEAVING):
            found = hung(places, self._as_of(world, now), *limits, self._waited_out, self._steps_out)
        else:
            return None, []
        answering = [i for i in found if state.limits.cut or i not in quiet]
        if found and not answering:
            self._note_given_up(places[found[0]])
            reason = f"{' and '.join(found)} does not answer, and the others have waited for longer than is usual"
            return Stalled(reason, now), []
        late = {i: self._place_of(i, now) for i in state.late}
        return None, answering + overdue(late, dict.fromkeys(late, QUIET), self._formed_at, now, *limits)

    def _overdue_in_broken(self, state: State, quiet: set[str], now: float) -> tuple[Event | None, list[str]]:
        """Members that do not come back from a broken world. The last one that holds the state is waited for as long as
        it may answer; if it answers but never comes back, waiting is useless. It is also useless where no member makes
        progress, stopped or not."""
        limits = p95(self._step_times), self._hang_s
        last = not (state.limits.cut or holder_is_back(state))
        missing = awaited(state)
        all_stalled = state.world is not None and missing == state.world.ids
        waited = STALLED if last or state.limits.cut else 1.0
        patience = {i: QUIET if i in quiet and not all_stalled else waited for i in missing}
        found = overdue({i: self._place_of(i, now) for i in patience}, patience, state.broken_at, now, *limits)
        if not found:
            return None, []
        where = self._progress.get(found[0], _UNHEARD)
        detail = f"worker {found[0]} {_describe(where)}"
        if last:
            if quiet.intersection(found):
                detail = (
                    f"worker {found[0]} does not answer, and nobody else has the state; last seen in {_place(where)}; "
                    "start the run again to go on from the newest checkpoint"
                )
            stuck = len(found) == len(patience) and (all_stalled or quiet.isdisjoint(found))
            return (Stuck(detail, now) if stuck else None), []
        if where.step in self._steps_out and state.failing is None:
            return Stalled(f"{detail}; another did before, at the same step", now, final=True), []
        return None, found

    def _places(self, world: World, now: float) -> dict[str, Progress]:
        return caught_up({m.id: self._place_of(m.id, now) for m in world.members})

    def _place_of(self, member_id: str, now: float) -> Progress:
        """Where a member is, as far as it reported. If it is silent, nobody knows whether it still waits for data, or
        ever came into this world: then it gets no more patience than others."""
        place = self._progress.get(member_id) or replace(_UNHEARD, since=self._formed_at)
        unsure = place.position.stage in (Stage.DATA, Stage.UNHEARD)
        quiet = now - self._last_message.get(member_id, now) > self._silent_s
        return replace(place, doubted=True) if unsure and quiet else place

    def _as_of(self, world: World, now: float) -> float:
        """Until when it is known that no member moved: one that is or just was cut off may well have moved."""
        seen = self._seen(now)
        known = {i: at if now >= self._delayed_until.get(i, 0.0) else self._last_message[i] for i, at in seen.items()}
        return min(known.get(m.id, 0.0) for m in world.members)

    def _note_given_up(self, where: Progress) -> None:
        if where.waits_for_data:
            self._waited_out.update(where.samples)
        elif where.step >= 0:
            self._steps_out.add(where.step)

    def _watch_stalls(self, places: Mapping[str, Progress], world: World, now: float) -> None:
        """If no member moves: report it, replace the world once, and end the run if it stands still at that step
        again."""
        limits = p95(self._step_times), self._hang_s
        times = stalled_times(places, self._as_of(world, now), *limits)
        if times <= 1.0:
            return
        where = min(places.values(), key=lambda p: p.position.key)
        step = where.step
        if self._stall_reported is not world:
            self._stall_reported = world
            seconds = now - max(p.since for p in places.values())
            detail = f"nobody has moved for {seconds:.0f} s, in {_place(where)}"
            self._connections.start(self._report_stall(world, step, detail))
        if times > STALLED:
            again = step in self._made_anew
            self._made_anew.add(step)
            self._decide(Stalled(f"all workers stand still: {_describe(where)}", now, final=again))

    async def _report_stall(self, world: World, step: int, detail: str) -> None:
        await self._save_stacks(world)
        self._keeper.event("world_stalled", generation=str(world.generation), step=step + 1, detail=detail)

    async def stacks_now(self) -> dict[str, str]:
        """The stacks of every worker that answers within `STACKS_S`."""
        self._stacks.clear()
        self._connections.broadcast(Dump())
        await asyncio.sleep(STACKS_S)
        return dict(sorted(self._stacks.items()))

    async def _save_stacks(self, world: World) -> None:
        self._connections.send_to_world(world, Dump())
        await asyncio.sleep(STACKS_S)
        for member in world.members:
            text = self._stacks.pop(member.id, "no answer: the process is stopped, or its watcher is")
            self._keeper.save_stacks(member, text)

    def _report_slow(self, world: World, now: float) -> None:
        """Record once for each slow sample, and once in a world for an evaluation or a trial, that it takes long, and
        how long the run will wait for it."""
        limits = p95(self._step_times), self._hang_s
        here = {m.id: self._progress[m.id] for m in world.members if m.id in self._progress}
        long = slow(here, now, *limits, Stage.EVALUATE)
        if long and self._slow_evaluation != world.generation:
            self._slow_evaluation = world.generation
            self._connections.start(self._report_slow_evaluation(world, long[0], here[long[0]]))
        for member_id in slow(here, now, *limits, Stage.DATA):
            where = here[member_id]
            if where.samples in self._slow_reported:
                continue
            self._slow_reported.add(where.samples)
            times = Stage.DATA.patience
            usual_s, longest_s = (hang_limit_s(s.patience, *limits) for s in (Stage.PASS, Stage.DATA))
            self._keeper.event(
                "slow_data",
                generation=str(world.generation),
                member=member_id,
                step=where.step + 1,
                detail=f"the training data takes more than {usual_s:g} s for {where.where}, {named(where.samples)}; "
                f"it is waited for up to {longest_s:g} s, which is {times:g} times --recovery.hang-timeout",
            )

    async def _report_slow_evaluation(self, world: World, member_id: str, where: Progress) -> None:
        """With the stacks of all members, as it may be a hang, of which nobody knows before the run has waited long."""
        limits, times = (p95(self._step_times), self._hang_s), Stage.EVALUATE.patience
        usual_s, longest_s = (hang_limit_s(s.patience, *limits) for s in (Stage.PASS, Stage.EVALUATE))
        await self._save_stacks(world)
        self._keeper.event(
            "slow_evaluation",
            generation=str(world.generation),
            member=member_id,
            step=where.step + 1,
            detail=f"a batch takes more than {usual_s:g} s in {_place(where)}; it is waited for up to {longest_s:g} s, "
            f"which is {times:g} times --recovery.hang-timeout; stacks are saved",
        )

    async def _evict(self, member_id: str, world: World) -> None:
        known = self._progress.get(member_id)
        where, late = known or _UNHEARD, self._state.late.get(member_id)
        everyone = world if late is None else World(late.generation, (late.member,))
        await self._save_stacks(everyone)
        state = self._state
        over = state.world != world or (late is not None and member_id not in state.late)
        if over or member_id in state.waiting or self._progress.get(member_id) is not known:
            self._condemned.discard(member_id)  # it has come round
            return
        lost = next(m for m in everyone.members if m.id == member_id)
        self._keeper.event(
            "member_evicted",
            generation=str(everyone.generation),
            member=lost.id,
            node=lost.node,
            pid=lost.pid,
            step=where.step + 1,
            detail=_describe(where),
        )
        self._note_given_up(where)
        self._give_up(member_id, "it hung, and its world went on without it", f"hung in {where.label}", False, False)


def _describe(where: Progress) -> str:
    """Where a worker hangs, and what to do if it only takes long."""
    return f"hung in {_place(where)}; if it only takes long, give a longer --recovery.hang-timeout"


def _place(where: Progress) -> str:
    text = where.label + (f": {where.where}" if where.where else "")
    return f"{text}, {named(where.samples)}" if where.samples else text
