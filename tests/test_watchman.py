"""A server that watches over workers which are stopped or cut off, at times of the test's own and without a network."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from elastic.membership import server as served
from elastic.membership.events import Expected
from elastic.membership.protocol import Beat, BeatHeard, Hello, Join, Whereabouts
from elastic.membership.server import MembershipServer
from elastic.membership.stage import ENTERED, Position, Stage
from elastic.membership.state import Limits, Phase, State
from elastic.membership.world import Generation, Member
from jobs.bench.control_plane import Notes

HANG_S, TICK_S = 6.0, 0.25
FENCE = Position(5, Stage.FENCE)


@pytest.fixture(autouse=True)
def loop() -> Iterator[None]:
    """What the server does on the side is begun in this loop, and never goes on: times are the test's own."""
    own = asyncio.new_event_loop()
    asyncio.set_event_loop(own)
    yield
    for task in asyncio.all_tasks(own):
        task.cancel()
    own.run_until_complete(asyncio.sleep(0))
    own.close()
    asyncio.set_event_loop(None)


class Watched:
    """`beating` say once a second where they are; whoever is `cut` has a machine that does not answer either."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, phase: Phase = Phase.GATHERING, **limits: Any):
        self.now, self.keeper, self.cut = 100.0, Notes(), set[str]()
        self.beating: dict[str, Position] = {}
        monkeypatch.setattr(served, "time", SimpleNamespace(monotonic=lambda: self.now))
        state = State(1, Limits(**{"min_workers": 1, "max_workers": 3, **limits}), phase=phase, broken_at=self.now)
        self.server = MembershipServer(
            self.keeper, state, "token", host="127.0.0.1", hang_s=HANG_S, new_store=lambda: (0, lambda: None)
        )
        monkeypatch.setattr(self.server._connections, "silence_s", lambda i: 1e9 if i in self.cut else 0.0)

    def says(self, name: str, message: Any, generation: Generation | None = None) -> None:
        self.server._watchman.received(name, self.now)
        self.server._from_worker(name, message, generation)

    def join(self, name: str, applied: int = -1) -> None:
        self.server._watchman.connected(name, self.now, 1.0)
        self.says(name, Join(Member(name, name), applied, None, "", "", 0.0, {}))

    def hello(self, name: str, rank: int, size: int, position: Position) -> None:
        self.server._watchman.connected(name, self.now, 1.0)
        self.says(name, Hello(Member(name, name), rank, size, Whereabouts(Generation(1, 1), position)))

    def wait(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += TICK_S
            for name, position in self.beating.items() if self.now % 1 == 0 else ():
                world = self.server._state.world
                at = Whereabouts(world.generation, position) if world is not None else None
                self.says(name, Beat(self.now, at))
            self.server._watchman.listen(self.server._state, self.now)
            self.server._handle(served.Tick(self.now))
            self.server._watchman.look(self.server._state, self.now)

    @property
    def members(self) -> list[str]:
        world = self.server._state.world
        return [m.id for m in world.members] if world is not None else []


def test_a_restarted_server_knows_where_somebody_is_that_is_stopped_before_it_speaks_again(monkeypatch):
    watched = Watched(monkeypatch, phase=Phase.REBUILDING)
    watched.server._handle(Expected(frozenset("ab"), watched.now))
    watched.hello("b", 1, 2, Position(5, Stage.PASS, 3))
    watched.wait(2)
    watched.hello("a", 0, 2, FENCE)
    assert watched.server._state.phase is Phase.RUNNING
    assert watched.server._watchman.phases() == {"a": "step", "b": "step"}
    watched.beating["a"] = FENCE
    watched.wait(HANG_S - 1)
    assert watched.server._state.phase is Phase.RUNNING
    watched.wait(2)
    assert watched.server._state.phase is Phase.BROKEN
    watched.join("a", 5)
    watched.wait(1)
    assert (watched.members, list(watched.server._state.late)) == (["a"], ["b"])
    assert "member_late" in watched.keeper.kinds


def test_who_is_stopped_before_it_came_into_its_world_costs_the_others_no_more_than_who_hangs(monkeypatch):
    watched = Watched(monkeypatch, max_workers=2)
    for name in "ab":
        watched.join(name)
    assert len(watched.members) == 2
    watched.beating["a"] = ENTERED  # it waits for the other one to connect
    watched.wait(HANG_S)
    assert watched.server._state.phase is Phase.RUNNING
    watched.wait(2)
    assert watched.server._state.phase is Phase.BROKEN
    watched.join("a")
    watched.wait(1)
    assert (watched.members, list(watched.server._state.late)) == (["a"], ["b"])


def test_a_spare_that_is_stopped_is_not_taken_instead_of_one_that_answers(monkeypatch):
    watched = Watched(monkeypatch, max_workers=2)
    for name in ("a", "b", "stopped", "well"):
        watched.join(name)
    watched.beating = {"a": FENCE, "b": FENCE, "well": ENTERED}
    watched.wait(4)
    del watched.beating["b"]
    watched.server._handle(served.Lost("b", watched.now, died=True))
    watched.join("a", 5)
    assert watched.members == ["a", "well"]


def test_a_parked_survivor_that_was_cut_off_goes_on_with_what_it_holds(monkeypatch):
    watched = Watched(monkeypatch, min_workers=2, max_workers=2)
    for name in "ab":
        watched.join(name)
    watched.server._handle(served.Lost("b", watched.now, died=True))
    watched.join("a", 5)
    assert "set_status" in watched.keeper.kinds, "it is parked"

    watched.cut = {"a"}
    watched.wait(60)
    watched.cut, watched.beating = set(), {"a": FENCE}
    watched.wait(1)
    watched.join("new")
    assert watched.members == ["a", "new"]
    assert watched.server._state.newest == 5


def test_a_spare_without_state_that_is_cut_off_is_lost(monkeypatch):
    watched = Watched(monkeypatch, max_workers=1)
    for name in ("a", "spare"):
        watched.join(name)
    watched.beating, watched.cut = {"a": FENCE}, {"spare"}
    watched.wait(6)
    assert watched.server._state.gone == {"spare"}


def test_the_only_worker_is_told_of_tried_again_and_ended_also_where_it_is_stopped(monkeypatch):
    watched = Watched(monkeypatch, max_workers=1)
    watched.join("a")
    watched.beating = {"a": FENCE}
    watched.wait(2)
    watched.beating = {}
    watched.wait(3 * HANG_S - 3)
    assert watched.server._state.phase is Phase.RUNNING
    watched.wait(4)
    assert watched.server._state.phase is Phase.BROKEN
    watched.wait(3 * HANG_S - 3)
    assert watched.server._state.phase is Phase.BROKEN, "it may be continued"
    watched.wait(5)
    assert watched.server._state.phase is Phase.ENDED


def test_of_a_world_that_a_loss_broke_the_last_with_the_state_is_waited_for_also_where_it_is_stopped(monkeypatch):
    watched = Watched(monkeypatch, max_workers=2)
    for name in "ab":
        watched.join(name)
    watched.beating = {"a": FENCE, "b": FENCE}
    watched.wait(2)
    watched.beating = {"b": ENTERED}
    watched.server._handle(served.Lost("b", watched.now, died=True))
    watched.join("c")
    watched.wait(20 * HANG_S)
    assert watched.server._state.phase is Phase.BROKEN


@pytest.mark.parametrize(("workers", "beat_s", "silent_s"), [(8, 1.0, 5.0), (4096, 4.0, 11.0)])
def test_of_many_workers_each_beats_less_often_and_is_waited_for_longer(monkeypatch, workers, beat_s, silent_s):
    watched = Watched(monkeypatch, max_workers=workers, lease_s=30.0)
    for number in range(workers):
        watched.join(f"w{number}")
    watched.wait(1)
    sent: list[Any] = []
    monkeypatch.setattr(watched.server._connections, "send", lambda name, message: sent.append(message))
    watched.says("w0", Beat(7.0, None))
    assert sent == [BeatHeard(7.0, beat_s)]

    watched.cut.add("w1")
    at = watched.now
    watched.says("w1", Beat(at, None))
    while watched.now - at < silent_s:
        if (watched.now - at) % beat_s == 0:
            for number in (0, *range(2, workers)):
                watched.server._watchman.received(f"w{number}", watched.now)
        assert watched.server._state.phase is Phase.RUNNING, watched.now - at
        watched.wait(TICK_S)
    watched.wait(1)
    assert watched.server._state.phase is Phase.BROKEN, "a worker whose machine does not answer is given up"
