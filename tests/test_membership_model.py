"""The membership decisions, checked against a model of a cluster in which anything may happen at any time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elastic.membership.decisions import advance
from elastic.membership.messages import (
    Acknowledged,
    Break,
    Command,
    Done,
    Event,
    Expected,
    Fail,
    Failure,
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
    Tick,
)
from elastic.membership.state import Limits, Phase, State
from elastic.membership.world import Generation, Member, World


class Machine:
    """The state machine with a clock, for tests that tell a story."""

    def __init__(self, **limits: object):
        defaults = {"min_workers": 1, "max_workers": 3}
        self.state, self.now = State(epoch=1, limits=Limits(**{**defaults, **limits})), 0.0  # type: ignore[arg-type]

    def tell(self, event: Event) -> list[Command]:
        self.state, commands = advance(self.state, event)
        return commands

    def join(
        self, name: str, applied: int = -1, node: str | None = None, device: str = "", **more: object
    ) -> list[Command]:
        member = Member(name, node or f"node-{name}", device=device)
        return self.tell(Joined(member, self.now, applied, **more))  # type: ignore[arg-type]

    def lose(self, name: str, **more: object) -> list[Command]:
        return self.tell(Lost(name, self.now, **more))  # type: ignore[arg-type]

    def wait(self, seconds: float) -> list[Command]:
        self.now += seconds
        return self.tell(Tick(self.now))

    @property
    def members(self) -> list[str]:
        assert self.state.world is not None
        return [m.id for m in self.state.world.members]


def formed(commands: list[Command]) -> World:
    worlds = [c.world for c in commands if isinstance(c, Form)]
    assert len(worlds) == 1, commands
    return worlds[0]


def test_the_first_world_forms_as_soon_as_the_most_have_joined() -> None:
    machine = Machine(max_workers=3)
    assert machine.join("a") == machine.join("b") == []
    assert formed(machine.join("c")).size == 3


def test_the_first_world_forms_with_the_fewest_when_none_came_for_a_while() -> None:
    machine = Machine(min_workers=2, max_workers=3, settle_s=2.0)
    machine.join("a")
    assert machine.wait(60) == []
    machine.join("b")
    assert machine.wait(1.9) == []
    assert formed(machine.wait(0.2)).size == 2


def three(**limits: object) -> Machine:
    machine = Machine(**limits)
    for name in "abc":
        machine.join(name)
    assert machine.members == ["a", "b", "c"]
    return machine


def test_survivors_form_the_next_world_as_soon_as_all_of_them_are_back() -> None:
    machine = three()
    (broken,) = machine.lose("b")
    assert isinstance(broken, Break)
    assert broken.lost is not None
    assert broken.lost.id == "b"
    assert machine.join("a", 7) == []
    assert formed(machine.join("c", 7)).generation == Generation(1, 2)
    assert machine.members == ["a", "c"]


def test_who_acknowledges_is_awaited_and_who_does_not_is_suspected_after_the_grace() -> None:
    machine = three(suspect_grace_s=0.3)
    machine.lose("b")
    machine.tell(Acknowledged("c", machine.now))
    machine.join("a", 7)
    assert machine.wait(10) == []  # c is deep in a long step, but lives

    machine = three(suspect_grace_s=0.3)
    machine.lose("b")
    machine.join("a", 7)
    assert machine.wait(0.2) == []
    suspect, form = machine.wait(0.2)
    assert suspect == Suspect(Member("c", "node-c"))
    assert isinstance(form, Form)
    assert machine.members == ["a"]
    (refused,) = machine.join("c", 7)
    assert isinstance(refused, Refuse)


def test_newcomers_within_the_window_are_taken_in_together_at_a_step_boundary() -> None:
    machine = Machine(max_workers=4, join_window_s=1.0)
    machine.join("a")
    formed(machine.wait(2.5))
    machine.join("b")
    machine.wait(0.5)
    machine.join("c")
    (leave,) = machine.wait(0.6)
    assert isinstance(leave, Leave)
    assert formed(machine.join("a", 5)).size == 3


def test_a_spare_fills_a_loss_in_the_same_re_formation() -> None:
    machine = three(max_workers=3)
    assert machine.join("spare") == []
    machine.lose("b")
    machine.join("a", 7)
    assert {m.id for m in formed(machine.join("c", 7)).members} == {"a", "c", "spare"}


def test_too_few_are_parked_with_their_state_and_resumed_or_given_up() -> None:
    machine = three(min_workers=3, max_wait_s=100.0)
    machine.lose("b")
    machine.join("a", 7)
    assert machine.join("c", 8) == [Park(2, 3)]
    assert formed(machine.join("d")).size == 3

    machine = three(min_workers=3, max_wait_s=100.0)
    machine.lose("b")
    machine.join("a", 7)
    machine.join("c", 8)
    (given_up,) = machine.wait(100)
    assert isinstance(given_up, GiveUp)
    assert given_up.saver is not None
    assert given_up.saver.id == "c"
    assert "at least 3 workers" in given_up.message


def test_a_noticed_node_is_replaced_at_once_and_its_worker_handed_over() -> None:
    machine = three()
    machine.tell(Notice("node-b", machine.now + 60, machine.now))
    assert machine.wait(1) == []  # nobody there to replace it, and time enough
    (leave,) = machine.join("d")
    assert isinstance(leave, Leave)
    machine.join("a", 7)
    machine.join("b", 7)
    form, hand = machine.join("c", 7)
    assert {m.id for m in formed([form]).members} == {"a", "c", "d"}
    assert hand == HandOver(Member("b", "node-b"))


def test_without_a_replacement_a_noticed_node_is_left_before_its_deadline() -> None:
    machine = three(min_workers=2)
    machine.tell(Notice("node-b", machine.now + 60, machine.now))
    assert machine.wait(40) == []
    (leave,) = machine.wait(15)
    assert isinstance(leave, Leave)


def test_where_nobody_can_be_spared_the_state_is_saved_before_the_deadline() -> None:
    machine = three(min_workers=3)
    machine.tell(Notice("node-b", machine.now + 60, machine.now))
    (save,) = machine.wait(58)
    assert isinstance(save, SaveNow)
    assert machine.wait(0.5) == []


def test_if_only_a_worker_that_goes_away_holds_the_state_it_comes_along_to_give_it() -> None:
    machine = Machine(max_workers=1)
    machine.join("old")
    machine.tell(Notice("node-old", machine.now + 60, machine.now))
    (leave,) = machine.join("new")
    assert isinstance(leave, Leave)
    assert {m.id for m in formed(machine.join("old", 9)).members} == {"old", "new"}
    (again,) = machine.wait(45) or machine.wait(10)
    assert isinstance(again, Leave)
    machine.join("new", 10)
    form, hand = machine.join("old", 10)
    assert [m.id for m in formed([form]).members] == ["new"]
    assert isinstance(hand, HandOver)


def test_a_worker_with_another_device_is_left_out_of_an_exact_world() -> None:
    machine = Machine(max_workers=3, exact=True)
    machine.join("a", device="x")
    machine.join("b", device="x")
    formed(machine.wait(2.5))
    (left,) = machine.join("c", device="y")
    assert isinstance(left, LeftOut)
    assert machine.wait(60) == []


def test_the_same_error_at_the_same_place_ends_the_run_another_does_not() -> None:
    machine = Machine(max_workers=1, max_failures=2)
    machine.join("a")
    for microbatch in (3, 3, 4):
        commands = machine.join("a", 5, failure=Failure("ValueError", 6, microbatch, "boom"))
        assert isinstance(commands[-1], Form)
    commands = machine.join("a", 5, failure=Failure("ValueError", 6, 3, "boom"))
    assert isinstance(commands[-1], Fail)


def test_a_successor_without_a_common_member_waits_out_the_lease_unless_all_are_known_dead() -> None:
    for dead in (False, True):
        machine = Machine(max_workers=1, lease_s=30.0)
        machine.join("a")
        machine.lose("a", dead=dead)
        commands = machine.join("b")
        assert any(isinstance(c, Form) for c in commands) == dead
        if not dead:
            assert formed(machine.wait(30.1)).size == 1


def test_a_restarted_server_forms_nothing_before_everyone_has_registered() -> None:
    limits = Limits(min_workers=1, max_workers=3)
    for missing in (False, True):
        state = State(epoch=1, limits=limits, phase=Phase.REBUILDING)
        commands: list[Command] = []
        for rank, name in enumerate("abc"):
            if missing and name == "b":
                continue
            state, more = advance(state, Registered(Member(name, "n"), Generation(1, 4), rank, 3, 0.0))
            commands += more
        assert commands == []
        state, commands = advance(state, Expected(frozenset("abc"), 1.0))
        if missing:
            assert commands == []
            state, commands = advance(state, Lost("b", 2.0, dead=True))
            assert [type(c) for c in commands] == [Break]
        else:
            assert state.phase is Phase.RUNNING
            assert state.world is not None
            assert state.world.generation == Generation(1, 4)


def test_who_is_done_may_leave() -> None:
    machine = three()
    machine.tell(Done("b"))
    assert machine.lose("b") == []


@pytest.mark.parametrize("size", [8, 512, 4096])
def test_a_large_world_forms_in_under_a_second_of_its_time(size: int) -> None:
    machine = Machine(max_workers=size)
    members = [Member(f"w{i}", f"n{i // 8}", i % 8) for i in range(size)]
    began = time.process_time()
    for member in members:
        commands = machine.tell(Joined(member, 0.0))
    assert formed(commands).size == size
    assert time.process_time() - began < 1.0


# ---- the model ----------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A worker as it really is. `lineage`: the generation in which each step of its state was applied."""

    member: Member
    lineage: list[Generation] = field(default_factory=list)
    holds: bool = False
    world: World | None = None
    entered: bool = False  # it has entered the fence of its next step
    alive: bool = True
    told_to_go: bool = False
    failed: int = 0

    @property
    def applied(self) -> int:
        return len(self.lineage) if self.holds else -1


class Cluster(RuleBasedStateMachine):
    """Workers join, step, die, are cut off, hang, raise and drain in any order, and the server is restarted."""

    @initialize(least=st.integers(1, 3), most=st.integers(3, 5))
    def start(self, least: int, most: int) -> None:
        self.limits = Limits(min_workers=least, max_workers=most, max_failures=10**6)
        self.state, self.now = State(epoch=1, limits=self.limits), 0.0
        self.workers: dict[str, Worker] = {}
        self.worlds: dict[Generation, World] = {}
        self.fence: dict[tuple[Generation, int], set[str]] = {}
        self.count = 0

    # -- what happens

    def tell(self, event: Event) -> None:
        self.state, commands = advance(self.state, event)
        for command in commands:
            if isinstance(command, Form):
                self.form(command.world)
            elif isinstance(command, (Refuse, Suspect, HandOver)):
                name = command.member_id if isinstance(command, Refuse) else command.member.id
                self.workers[name].told_to_go = True

    def form(self, world: World) -> None:
        assert world.generation not in self.worlds, "two worlds of one generation"
        assert all(world.generation > g for g in self.worlds), "generations only grow"
        assert len({m.id for m in world.members}) == world.size <= max(2, self.limits.max_workers)
        assert world.size >= self.limits.min_workers
        self.worlds[world.generation] = world
        members = [self.workers[m.id] for m in world.members]
        assert not any(w.told_to_go for w in members), "who was given up comes back"
        newest = max(w.applied for w in members)
        for w in members:  # roll forward what was prepared
            if w.holds and w.applied == newest - 1 and w.entered and w.world is not None:
                w.lineage.append(w.world.generation)
        giver = next((w for w in members if w.applied == newest), members[0])
        for w in members:
            if w.applied != newest or not w.holds:
                w.lineage, w.holds = list(giver.lineage), True
            w.world, w.entered = world, False

    def in_world(self, w: Worker) -> bool:
        return w.alive and not w.told_to_go and w.world is not None and w.member.id not in self.state.waiting

    def choose(self, number: int, among: list[Worker]) -> Worker:
        return among[number % len(among)]

    def living(self) -> list[Worker]:
        return [w for w in self.workers.values() if w.alive and not w.told_to_go]

    @rule(node=st.integers(0, 3))
    @precondition(lambda self: len(self.workers) < 12)
    def join(self, node: int) -> None:
        self.count += 1
        member = Member(f"w{self.count}", f"n{node}", self.count)
        self.workers[member.id] = Worker(member)
        self.tell(Joined(member, self.now))

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: any(map(self.in_world, self.workers.values())))
    def enter_fence(self, number: int) -> None:
        w = self.choose(number, [w for w in self.workers.values() if self.in_world(w)])
        assert w.world is not None
        w.entered = True
        self.fence.setdefault((w.world.generation, w.applied), set()).add(w.member.id)

    def may_pass(self, w: Worker) -> bool:
        if not (w.alive and w.entered and w.world and w.member.id not in self.state.waiting):
            return False
        inside = self.fence.get((w.world.generation, w.applied), set())
        return inside >= {m.id for m in w.world.members}

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: any(map(self.may_pass, self.workers.values())))
    def apply(self, number: int) -> None:
        w = self.choose(number, [w for w in self.workers.values() if self.may_pass(w)])
        assert w.world is not None
        w.lineage.append(w.world.generation)
        w.entered = False

    @rule(number=st.integers(0, 99), dead=st.booleans(), noticed=st.booleans())
    @precondition(lambda self: bool(self.living()))
    def kill(self, number: int, dead: bool, noticed: bool) -> None:
        w = self.choose(number, self.living())
        w.alive = False
        if noticed:
            self.tell(Lost(w.member.id, self.now, dead=dead))

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: any(not w.alive for w in self.workers.values()))
    def notice_death(self, number: int) -> None:
        w = self.choose(number, [w for w in self.workers.values() if not w.alive])
        self.tell(Lost(w.member.id, self.now, dead=True))

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: bool(self.living()))
    def cut_off(self, number: int) -> None:
        """Its connection is lost, but it goes on: a zombie."""
        w = self.choose(number, self.living())
        w.told_to_go = True
        self.tell(Lost(w.member.id, self.now, "silent"))

    def must_leave(self, w: Worker) -> bool:
        return self.in_world(w) and (self.state.world != w.world or self.state.phase is not Phase.RUNNING)

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: any(map(self.must_leave, self.workers.values())))
    def join_again(self, number: int) -> None:
        w = self.choose(number, [w for w in self.workers.values() if self.must_leave(w)])
        self.tell(Joined(w.member, self.now, w.applied))

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: any(map(self.in_world, self.workers.values())))
    def raise_error(self, number: int) -> None:
        w = self.choose(number, [w for w in self.workers.values() if self.in_world(w)])
        self.tell(Joined(w.member, self.now, w.applied, Failure("ValueError", w.applied, 0, "boom")))

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: bool(self.living()))
    def acknowledge(self, number: int) -> None:
        self.tell(Acknowledged(self.choose(number, self.living()).member.id, self.now))

    @rule(node=st.integers(0, 3), seconds=st.floats(0, 60))
    @precondition(lambda self: not self.state.notices)
    def drain(self, node: int, seconds: float) -> None:
        self.tell(Notice(f"n{node}", self.now + seconds, self.now))

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.5, 3.0, 40.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.tell(Tick(self.now))

    @rule()
    @precondition(lambda self: self.state.phase in (Phase.RUNNING, Phase.BROKEN) and bool(self.worlds))
    def restart_server(self) -> None:
        """The membership server is killed; another takes its place and knows nothing."""
        waiting = [w for w in self.living() if w.member.id in self.state.waiting]
        newest = max(self.worlds).n
        self.state = State(epoch=1, limits=self.limits, phase=Phase.REBUILDING, n=newest + 1000)
        for w in self.living():
            if w in waiting or w.world is None:
                self.tell(Joined(w.member, self.now, w.applied))
            else:
                rank = w.world.rank_of(w.member.id)
                assert rank is not None
                self.tell(Registered(w.member, w.world.generation, rank, w.world.size, self.now))
        self.tell(Expected(frozenset(w.member.id for w in self.living()), self.now))

    # -- what must hold

    @invariant()
    def living_workers_agree_on_where_each_step_was_applied(self) -> None:
        if not hasattr(self, "workers"):
            return
        lineages = [w.lineage for w in self.living() if w.holds]
        longest = max(lineages, key=len, default=[])
        for lineage in lineages:
            assert lineage == longest[: len(lineage)], "a step was applied in two worlds"

    @invariant()
    def no_member_is_in_two_live_worlds(self) -> None:
        if hasattr(self, "workers") and self.state.world is not None and self.state.phase is Phase.RUNNING:
            for member in self.state.world.members:
                assert member.id not in self.state.waiting

    def teardown(self) -> None:
        """When nothing more happens, every living worker that may stay is in the world, up to the most."""
        if not hasattr(self, "workers") or self.state.phase is Phase.ENDED:
            return
        for w in self.workers.values():
            if not w.alive or w.told_to_go:
                self.tell(Lost(w.member.id, self.now, dead=True))
        for _ in range(12):
            for w in self.living():
                self.tell(Acknowledged(w.member.id, self.now))
                if self.must_leave(w):
                    self.tell(Joined(w.member, self.now, w.applied))
            self.tick(40.0)
        staying = [w for w in self.living() if w.member.node not in self.state.notices]
        if len(staying) < self.limits.min_workers:
            return
        assert self.state.phase is Phase.RUNNING
        assert self.state.world is not None
        inside = {m.id for m in self.state.world.members}
        assert len(inside & {w.member.id for w in staying}) == min(len(staying), self.limits.max_workers)


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
