"""Watching over the workers: who has gone silent, who hangs. A hung one is named, with everybody's stacks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from elastic.membership.connections import Connections
from elastic.membership.forming import awaited
from elastic.membership.messages import named
from elastic.membership.protocol import SILENT_S, STACKS_S, Keeper
from elastic.membership.state import Phase, State
from elastic.membership.watch import (
    DATA,
    PATIENCE,
    Progress,
    excuse,
    hang_limit_s,
    hung,
    overdue,
    p95,
    silent,
    slow_data,
)
from elastic.membership.world import World


class Watchman:
    """Keeps what heartbeats said.

    Args:
        hang_s: fixed hang time-out, or None for one that goes by the steps seen.
        give_up: called with (member id, what it is told, why it counts as lost, whether it applies nothing any more) of
            a worker to go on without.
    """

    def __init__(
        self, keeper: Keeper, connections: Connections, hang_s: float | None,
        give_up: Callable[[str, str, str, bool], None],
    ):  # fmt: skip
        self._keeper, self._connections, self._hang_s, self._give_up = keeper, connections, hang_s, give_up
        self._heard: dict[str, float] = {}
        self._excused_until = 0.0
        self._progress: dict[str, Progress] = {}
        self._stacks: dict[str, str] = {}
        self._condemned: set[str] = set()
        self._waited_out: set[int] = set()  # samples that somebody was given up for
        self._told_slow: set[tuple[int, ...]] = set()
        self._step_times: deque[float] = deque(maxlen=100)
        self._state: State

    def heard(self, member_id: str, now: float) -> None:
        """The worker said something."""
        self._heard[member_id] = now

    def forget(self, member_id: str) -> None:
        """The worker is not connected any more."""
        self._heard.pop(member_id, None)

    def new_world(self) -> None:
        """Progress counts within a world."""
        self._progress = {}
        self._condemned.clear()

    def progress(self, member_id: str, said: Progress) -> None:
        """How far a member of the world is."""
        known = self._progress.get(member_id)
        if known is None or replace(said, since=known.since) != known:
            self._progress[member_id] = said

    def phases(self) -> dict[str, str]:
        """What each member of the world is doing, as far as it said."""
        return {member_id: progress.phase for member_id, progress in self._progress.items()}

    def steps_took(self, seconds: Iterable[float]) -> None:
        """How long steps took; the hang time-out goes by it."""
        self._step_times.extend(seconds)

    def stacks(self, member_id: str, text: str) -> None:
        """The stacks that were asked for."""
        self._stacks[member_id] = text

    def look(self, state: State, now: float) -> None:
        """Give up who is silent, and start to evict who hangs: in the running world, or on the way out of it."""
        self._lose_silent(state, now)
        self._state, world = state, state.world
        if world is None:
            return
        self._tell_slow(world, now)
        for member_id in self._hung(world, state, now):
            if member_id not in self._condemned:
                self._condemned.add(member_id)
                self._connections.start(self._evict(member_id, world))

    def _lose_silent(self, state: State, now: float) -> None:
        members, lease_s = state.world.ids if state.world else frozenset(), state.limits.lease_s
        self._excused_until = excuse(self._excused_until, self._heard, now, SILENT_S, members)
        for member_id in silent(self._heard, now, SILENT_S, members, lease_s, self._excused_until):
            silent_s = now - self._heard.pop(member_id)
            told = "it was silent, and its world went on without it"
            self._give_up(member_id, told, f"silent for {silent_s:.0f} s", silent_s > lease_s)

    def _hung(self, world: World, state: State, now: float) -> list[str]:
        limits = p95(self._step_times), self._hang_s
        here = {m.id: self._progress[m.id] for m in world.members if m.id in self._progress}
        back = [state.waiting[i].since for i in world.ids if i in state.waiting]
        if state.phase is Phase.BROKEN or (state.phase is Phase.LEAVING and back):
            since = state.broken_at if state.phase is Phase.BROKEN else min(back)
            return overdue(here, awaited(state), since, now, *limits)
        if state.phase in (Phase.RUNNING, Phase.LEAVING) and len(here) == world.size:
            as_of = min(self._heard.get(m.id, 0.0) for m in world.members)  # silence is not standing still
            return hung(here, as_of, *limits, self._waited_out)
        return []

    def _tell_slow(self, world: World, now: float) -> None:
        """Say once of each sample that it takes long, and for how long it is waited for."""
        limits = p95(self._step_times), self._hang_s
        here = {m.id: self._progress[m.id] for m in world.members if m.id in self._progress}
        for member_id in slow_data(here, now, *limits):
            where = here[member_id]
            if where.samples in self._told_slow:
                continue
            self._told_slow.add(where.samples)
            usual_s, longest_s = hang_limit_s("step", *limits), hang_limit_s(DATA, *limits)
            self._keeper.event(
                "slow_data", generation=str(world.generation), member=member_id, step=where.position[0] + 1,
                detail=f"the training data takes more than {usual_s:g} s for {where.where}, {named(where.samples)}; "
                f"it is waited for up to {longest_s:g} s, which is {PATIENCE[DATA]:g} times --recovery.hang-timeout",
            )  # fmt: skip

    async def _evict(self, member_id: str, world: World) -> None:
        where = known = self._progress.get(member_id)
        if where is None:
            where = Progress((-1, 0, 0), "load", 0.0)
        self._connections.tell(world, {"kind": "dump"})
        await asyncio.sleep(STACKS_S)
        if self._state.world != world or member_id in self._state.waiting or self._progress.get(member_id) is not known:
            self._condemned.discard(member_id)  # it has come round
            return
        for member in world.members:
            text = self._stacks.pop(member.id, "no answer: the process is stopped, or its watcher is")
            self._keeper.save_stacks(member, text)
        lost = next(m for m in world.members if m.id == member_id)
        self._keeper.event(
            "member_evicted", generation=str(world.generation), member=lost.id, node=lost.node, pid=lost.pid,
            step=where.position[0] + 1, detail=_told(where),
        )  # fmt: skip
        if where.phase == DATA:
            self._waited_out.update(where.samples)
        self._give_up(member_id, "it hung, and its world went on without it", f"hung in {where.phase}", False)


def _told(where: Progress) -> str:
    """Where a worker hangs, and what to do if it does not."""
    what = f"hung in {where.phase}" + (f": {where.where}" if where.where else "")
    if where.samples:
        what += f", {named(where.samples)}"
    return what + "; if it only takes long, give a longer --recovery.hang-timeout"
