"""Watching over the workers: who has gone silent, who hangs. A hung one is named, with everybody's stacks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from elastic.membership.connections import Connections
from elastic.membership.events import Event, Quiet, Stalled, Stuck
from elastic.membership.failure import named
from elastic.membership.forming import awaited, holder_is_back, keepers
from elastic.membership.keeper import Keeper
from elastic.membership.protocol import BEAT_S, LATELY_S, SILENT_S, STACKS_S, Dump
from elastic.membership.stage import UNHEARD, Stage
from elastic.membership.state import Phase, State
from elastic.membership.watch import (
    QUIET,
    STILL,
    Progress,
    caught_up,
    excuse,
    hang_limit_s,
    hung,
    overdue,
    p95,
    silent,
    slow_data,
    still,
)
from elastic.membership.world import World

_UNHEARD = Progress(UNHEARD, 0.0)


class Watchman:
    """Keeps what heartbeats said.

    Args:
        hang_s: fixed hang time-out, or None for one that goes by the steps seen.
        give_up: called with (member id, what it is told, why it counts as lost, whether it applies nothing any more,
            whether only silence speaks against it) of a worker to go on without.
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
        self._heard: dict[str, float] = {}
        self._probed_s: dict[str, float] = {}  # between two probes of its machine
        self._delayed_until: dict[str, float] = {}  # by when it is here what was said while the line was cut
        self._excused_until = 0.0
        self._progress: dict[str, Progress] = {}
        self._stacks: dict[str, str] = {}
        self._condemned: set[str] = set()
        self._waited_out: set[int] = set()  # samples that somebody was given up for
        self._steps_out: set[int] = set()  # steps that somebody was given up in
        self._formed_at = 0.0
        self._stall_reported: World | None = None
        self._made_anew: set[int] = set()  # steps whose world was made anew because it stood still
        self._slow_reported: set[tuple[int, ...]] = set()
        self._step_times: deque[float] = deque(maxlen=100)
        self._state: State

    def heard(self, member_id: str, now: float) -> None:
        """The worker said something."""
        self._heard[member_id] = now

    def connected(self, member_id: str, now: float, probed_s: float) -> None:
        """The worker has connected; its machine is probed that often while it is silent."""
        self._heard[member_id], self._probed_s[member_id] = now, probed_s

    def forget(self, member_id: str) -> None:
        """The worker is not connected any more."""
        self._heard.pop(member_id, None)
        self._probed_s.pop(member_id, None)
        self._delayed_until.pop(member_id, None)

    def slept(self, seconds: float, now: float) -> None:
        """This process was away for so long, or behind: what was said meanwhile is not heard yet, and nobody is late
        for it."""
        self._heard = {member_id: min(now, at + seconds) for member_id, at in self._heard.items()}
        self._progress = {i: replace(p, since=min(now, p.since + seconds)) for i, p in self._progress.items()}

    def new_world(self, known: Iterable[str], now: float) -> None:
        """Progress counts within a world. Of those who are `known` it is kept: they are where they said to be."""
        self._progress = {i: self._progress[i] for i in known if i in self._progress}
        self._formed_at, self._stall_reported = now, None
        self._condemned.clear()

    def progress(self, member_id: str, said: Progress) -> None:
        """How far a member of the world is."""
        known = self._progress.get(member_id)
        if known is None or replace(said, since=known.since) != known:
            self._progress[member_id] = said

    def phases(self) -> dict[str, str]:
        """What each member of the world is doing, as far as it said."""
        return {member_id: progress.label for member_id, progress in self._progress.items()}

    def steps_took(self, seconds: Iterable[float]) -> None:
        """How long steps took; the hang time-out goes by it."""
        self._step_times.extend(seconds)

    def stacks(self, member_id: str, text: str) -> None:
        """The stacks that were asked for."""
        self._stacks[member_id] = text

    def listen(self, state: State, now: float) -> None:
        """Say who of those that wait was not heard lately, and who was heard again."""
        quiet = frozenset(i for i in state.waiting if now - self._heard.get(i, now) > LATELY_S)
        if quiet != state.quiet:
            self._decide(Quiet(quiet, now))

    def look(self, state: State, now: float) -> None:
        """Give up who is silent, and start to evict who hangs: in the running world, or on the way out of it."""
        self._lose_silent(state, now)
        self._state, world = state, state.world
        if world is None:
            return
        self._report_slow(world, now)
        decided, found = self._hung(world, state, now)
        if decided is not None:
            self._decide(decided)
            return
        for member_id in found:
            if member_id not in self._condemned:
                self._condemned.add(member_id)
                self._connections.start(self._evict(member_id, world))
        inside = state.phase in (Phase.RUNNING, Phase.LEAVING) and world.ids.isdisjoint(state.waiting)
        if inside and self._condemned.isdisjoint(world.ids):
            self._watch_stalls(world, now)

    def _lose_silent(self, state: State, now: float) -> None:
        members, lease_s = state.world.ids if state.world else frozenset(), state.limits.lease_s
        seen = self._seen(now)
        self._excused_until = excuse(self._excused_until, seen, now, SILENT_S, members)
        ready = members | state.waiting.keys() | state.late.keys() if state.world is not None else frozenset()
        kept = keepers(state)
        for member_id in silent(seen, now, SILENT_S, members, lease_s, self._excused_until, ready):
            if member_id in kept:
                continue
            silent_s = now - seen[member_id]
            self._heard.pop(member_id)
            self._give_up(member_id, "", f"silent for {silent_s:.0f} s", silent_s > lease_s, True)

    def _seen(self, now: float) -> dict[str, float]:
        """When each worker last spoke, or its machine answered for it: its process lives, stopped or not."""
        seen = dict(self._heard)
        for member_id, at in self._heard.items():
            probed_s = self._probed_s.get(member_id, BEAT_S)
            if now - at > SILENT_S / 2:
                silence_s = max(0.0, self._connections.silence_s(member_id) - probed_s)
                seen[member_id] = max(at, now - silence_s)
                if silence_s > SILENT_S / 4:  # TCP repeats what was lost at intervals that grow with the silence
                    self._delayed_until[member_id] = now + (now - at)
        return seen

    def _hung(self, world: World, state: State, now: float) -> tuple[Event | None, list[str]]:
        """What is to be decided, or whom to evict. Who only does not answer is left behind instead, where the others
        can do without."""
        limits = p95(self._step_times), self._hang_s
        quiet = {i for i in world.ids if now - self._heard.get(i, now) > SILENT_S}
        back = [state.waiting[i].since for i in world.ids if i in state.waiting]
        if state.phase is Phase.BROKEN:
            return self._overdue_in_broken(state, quiet, now)
        if state.phase is Phase.LEAVING and back:
            found = overdue(self._places(world, now), dict.fromkeys(awaited(state), 1.0), min(back), now, *limits)
        elif state.phase in (Phase.RUNNING, Phase.LEAVING):
            found = hung(self._places(world, now), self._as_of(world, now), *limits, self._waited_out, self._steps_out)
        else:
            return None, []
        answering = [i for i in found if state.limits.cut or i not in quiet]
        if found and not answering:
            self._note_given_up(self._places(world, now)[found[0]])
            reason = f"{' and '.join(found)} does not answer, and the others have waited for longer than is usual"
            return Stalled(reason, now), []
        late = {i: self._place_of(i, now) for i in state.late}
        return None, answering + overdue(late, dict.fromkeys(late, QUIET), self._formed_at, now, *limits)

    def _overdue_in_broken(self, state: State, quiet: set[str], now: float) -> tuple[Event | None, list[str]]:
        """Who does not come back from a broken world. The last who holds the state is waited for as long as it may
        answer; where it does, but never comes, there is nothing left to wait for. Nor is there where all stand still,
        stopped or not."""
        limits = p95(self._step_times), self._hang_s
        last = not (state.limits.cut or holder_is_back(state))
        missing = awaited(state)
        all_still = state.world is not None and missing == state.world.ids
        waited = STILL if last or state.limits.cut else 1.0
        patience = {i: QUIET if i in quiet and not all_still else waited for i in missing}
        found = overdue({i: self._place_of(i, now) for i in patience}, patience, state.broken_at, now, *limits)
        if not found:
            return None, []
        where = self._progress.get(found[0], _UNHEARD)
        told = f"worker {found[0]} {_describe(where)}"
        if last:
            if quiet.intersection(found):
                told = (
                    f"worker {found[0]} does not answer, and nobody else has the state; last seen in {_place(where)}; "
                    "start the run again to go on from the newest checkpoint"
                )
            stuck = len(found) == len(patience) and (all_still or quiet.isdisjoint(found))
            return (Stuck(told, now) if stuck else None), []
        if where.step in self._steps_out and state.failing is None:
            return Stalled(f"{told}; another did before, at the same step", now, final=True), []
        return None, found

    def _places(self, world: World, now: float) -> dict[str, Progress]:
        return caught_up({m.id: self._place_of(m.id, now) for m in world.members})

    def _place_of(self, member_id: str, now: float) -> Progress:
        """Where a member is, as far as it said. Whether one that says nothing any more still waits for data, or ever
        came into this world, is not known: it is given no longer than others."""
        place = self._progress.get(member_id) or replace(_UNHEARD, since=self._formed_at)
        unsure = place.position.stage in (Stage.DATA, Stage.UNHEARD)
        quiet = now - self._heard.get(member_id, now) > SILENT_S
        return replace(place, doubted=True) if unsure and quiet else place

    def _as_of(self, world: World, now: float) -> float:
        """Until when it is known that nobody moved: who is cut off, or was just now, does not stand still."""
        seen = self._seen(now)
        known = {i: at if now >= self._delayed_until.get(i, 0.0) else self._heard[i] for i, at in seen.items()}
        return min(known.get(m.id, 0.0) for m in world.members)

    def _note_given_up(self, where: Progress) -> None:
        if where.waits_for_data:
            self._waited_out.update(where.samples)
        elif where.step >= 0:
            self._steps_out.add(where.step)

    def _watch_stalls(self, world: World, now: float) -> None:
        """Nobody moves: say so, make the world anew once, and end the run if it comes to stand at that step again."""
        places, limits = self._places(world, now), (p95(self._step_times), self._hang_s)
        times = still(places, self._as_of(world, now), *limits)
        if times <= 1.0:
            return
        where = min(places.values(), key=lambda p: p.position.key)
        step = where.step
        if self._stall_reported is not world:
            self._stall_reported = world
            seconds = now - max(p.since for p in places.values())
            told = f"nobody has moved for {seconds:.0f} s, in {_place(where)}"
            self._connections.start(self._report_stall(world, step, told))
        if times > STILL:
            again = step in self._made_anew
            self._made_anew.add(step)
            self._decide(Stalled(f"all workers stand still: {_describe(where)}", now, final=again))

    async def _report_stall(self, world: World, step: int, told: str) -> None:
        await self._save_stacks(world)
        self._keeper.event("world_stalled", generation=str(world.generation), step=step + 1, detail=told)

    async def _save_stacks(self, world: World) -> None:
        self._connections.send_to_world(world, Dump())
        await asyncio.sleep(STACKS_S)
        for member in world.members:
            text = self._stacks.pop(member.id, "no answer: the process is stopped, or its watcher is")
            self._keeper.save_stacks(member, text)

    def _report_slow(self, world: World, now: float) -> None:
        """Say once of each sample that it takes long, and for how long it is waited for."""
        limits = p95(self._step_times), self._hang_s
        here = {m.id: self._progress[m.id] for m in world.members if m.id in self._progress}
        for member_id in slow_data(here, now, *limits):
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
    """Where a worker hangs, and what to do if it does not."""
    return f"hung in {_place(where)}; if it only takes long, give a longer --recovery.hang-timeout"


def _place(where: Progress) -> str:
    text = where.label + (f": {where.where}" if where.where else "")
    return f"{text}, {named(where.samples)}" if where.samples else text
