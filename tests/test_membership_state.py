"""Who is in the world: the rules, driven by every order of joins, losses and time that hypothesis can think of."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elastic.membership.state import Break, Done, Form, Generation, Joined, Lost, Member, Refuse, State, Tick, advance

SETTLE_S = 2.0


def _member(name, group=1, node="n"):
    return Member(name, group, node, 0)


class Membership:
    """A state with everything that was ever commanded."""

    def __init__(self, **options):
        self.state = State(epoch=3, settle_s=SETTLE_S, **{"min_workers": 1, **options})
        self.now, self.commands = 0.0, []

    def tell(self, event):
        self.state, commands = advance(self.state, event)
        self.commands += commands
        return commands

    def join(self, *members, size):
        return [c for m in members for c in self.tell(Joined(m, size, self.now))]

    def lose(self, name):
        return self.tell(Lost(name, self.now))

    def wait(self, seconds):
        self.now += seconds
        return self.tell(Tick(self.now))


def _worlds(commands):
    return [(str(c.world.generation), [m.id for m in c.world.members]) for c in commands if isinstance(c, Form)]


# ---- the rules, one by one -------------------------------------------------------------------------------------


def test_the_first_world_forms_as_soon_as_the_whole_group_joined():
    run = Membership()

    assert run.join(_member("a"), _member("b"), size=3) == []
    assert _worlds(run.join(_member("c"), size=3)) == [("3-1", ["a", "b", "c"])]


def test_an_incomplete_group_starts_when_enough_joined_and_none_came_for_a_while():
    run = Membership(min_workers=2)
    run.join(_member("a"), size=4)
    assert run.wait(100) == []  # too few
    run.join(_member("b"), size=4)
    assert run.wait(SETTLE_S - 0.1) == []
    run.join(_member("c"), size=4)
    assert run.wait(SETTLE_S - 0.1) == []  # somebody came in between

    assert _worlds(run.wait(0.2)) == [("3-1", ["a", "b", "c"])]


def test_ranks_follow_nodes_and_places_on_them_not_the_order_of_joining():
    members = [Member("w3", 1, "b", 1), Member("w2", 1, "b", 0), Member("w1", 1, "a", 1), Member("w0", 1, "a", 0)]
    run = Membership()

    found = run.join(*members, size=4)

    assert _worlds(found) == [("3-1", ["w0", "w1", "w2", "w3"])]
    world = found[0].world
    assert [world.rank_of(f"w{i}") for i in range(4)] == [0, 1, 2, 3]
    assert world.rank_of("stranger") is None


def test_a_loss_breaks_the_world_and_the_survivors_form_the_next_when_all_are_back():
    run = Membership()
    run.join(_member("a"), _member("b"), _member("c"), size=3)

    (told,) = run.lose("b")
    assert isinstance(told, Break)
    assert told.lost == _member("b")
    assert run.join(_member("a"), size=3) == []

    assert _worlds(run.join(_member("c"), size=3)) == [("3-2", ["a", "c"])]


def test_a_member_that_joins_again_by_itself_breaks_its_world():
    run = Membership()
    run.join(_member("a"), _member("b"), size=2)

    (told,) = run.join(_member("b"), size=2)

    assert isinstance(told, Break)
    assert told.lost is None
    assert _worlds(run.join(_member("a"), size=2)) == [("3-2", ["a", "b"])]


def test_fewer_survivors_than_wanted_wait_instead_of_training():
    run = Membership(min_workers=2)
    run.join(_member("a"), _member("b"), size=2)
    run.lose("a")

    assert run.join(_member("b"), size=2) == []
    assert run.wait(1000) == []


def test_who_is_done_may_leave():
    run = Membership()
    run.join(_member("a"), _member("b"), size=2)
    run.tell(Done("a"))

    assert run.lose("a") == []
    assert not run.state.broken


def test_a_newer_group_replaces_the_older_one_whose_workers_are_refused():
    run = Membership()
    run.join(_member("a"), _member("b"), size=2)

    found = run.join(_member("c", group=2), size=1)
    (refused,) = run.join(_member("a"), size=2)

    assert _worlds(found) == [("3-2", ["c"])]
    assert isinstance(refused, Refuse)
    assert (refused.member_id, "group 1" in refused.reason) == ("a", True)


def test_a_member_that_was_lost_never_comes_back_not_even_two_worlds_later():
    run = Membership()
    run.join(_member("a"), _member("b"), _member("c"), size=3)
    run.lose("c")
    run.join(_member("a"), _member("b"), size=3)  # world 2: a, b

    (refused,) = run.join(_member("c"), size=3)

    assert isinstance(refused, Refuse)
    run.lose("b")
    assert _worlds(run.join(_member("a"), size=3)) == [("3-3", ["a"])]


def test_generations_are_ordered_by_number_and_survive_text():
    assert Generation(1, 10) > Generation(1, 9)
    assert Generation(2, 1) > Generation(1, 99)
    assert Generation.parse(str(Generation(12, 34))) == Generation(12, 34)


# ---- any order of events ---------------------------------------------------------------------------------------

NAMES = ["a", "b", "c", "d"]


class AnyOrder(RuleBasedStateMachine):
    """Workers are named by group: `2a` is worker a of group 2. What a worker may do, it does at any time."""

    @initialize(min_workers=st.integers(1, 3), more=st.integers(0, 2))
    def begin(self, min_workers, more):
        self.run = Membership(min_workers=min_workers)
        self.size, self.group = min(4, min_workers + more), 1
        self.worlds, self.lost, self.done = [], set(), set()

    def _note(self, commands):
        for command in commands:
            if isinstance(command, Form):
                self.worlds.append(command.world)
                self._check_new_world()

    def _check_new_world(self):
        world = self.worlds[-1]
        ids = [m.id for m in world.members]
        assert ids, "a world has members"
        assert len(set(ids)) == len(ids), "a member is in a world once"
        assert len(ids) >= self.run.state.min_workers
        assert {m.group for m in world.members} == {self.group}, "no member of an older group"
        assert not set(ids) & self.lost, "who was lost stays lost"
        generations = [w.generation for w in self.worlds]
        assert generations == sorted(set(generations)), "generations only grow, one world each"

    @property
    def world(self):
        return self.worlds[-1] if self.worlds and self.worlds[-1].members[0].group == self.group else None

    @rule(name=st.sampled_from(NAMES), behind=st.sampled_from([0, 0, 0, 1]))
    def join(self, name, behind):
        group = max(1, self.group - behind)
        if NAMES.index(name) < self.size:
            member = _member(f"{group}{name}", group, node=f"node-{name}")
            commands = self.run.join(member, size=self.size)
            if group < self.group or member.id in self.lost | self.done:
                assert [type(c) for c in commands] == [Refuse]
            self._note(commands)

    @rule(name=st.sampled_from(NAMES), behind=st.sampled_from([0, 0, 0, 1]))
    def lose(self, name, behind):
        member_id = f"{max(1, self.group - behind)}{name}"
        world = self.world
        in_world = world is not None and world.rank_of(member_id) is not None
        if in_world and member_id not in self.done:
            self.lost.add(member_id)
        commands = self.run.lose(member_id)
        assert in_world or not [c for c in commands if isinstance(c, Break)], "only a member's loss breaks a world"
        self._note(commands)

    @precondition(lambda self: self.world is not None and not self.run.state.broken)
    @rule(data=st.data())
    def finish(self, data):
        member = data.draw(st.sampled_from(self.world.members))
        if member.id not in self.lost:
            self.done.add(member.id)
            assert self.run.tell(Done(member.id)) == []

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.5]))
    def wait(self, seconds):
        self._note(self.run.wait(seconds))

    @precondition(lambda self: self.group < 4)
    @rule(more=st.integers(0, 2))
    def restart_whole_group(self, more):
        self.group, self.size = self.group + 1, min(4, self.run.state.min_workers + more)
        self._note(self.run.join(_member(f"{self.group}a", self.group, "node-a"), size=self.size))

    @precondition(lambda self: self.world is not None and self.run.state.broken)
    @rule()
    def all_awaited_come_back(self):
        members = [m for m in self.world.members if m.id not in self.lost | self.done]
        before = len(self.worlds)
        for member in members:
            if len(self.worlds) == before:
                self._note(self.run.join(member, size=self.size))
        if len(members) >= self.run.state.min_workers:
            assert len(self.worlds) == before + 1
            assert {m.id for m in members} <= {m.id for m in self.world.members}

    @invariant()
    def no_new_world_beside_one_that_lives(self):
        if hasattr(self, "run") and self.world is not None and not self.run.state.broken:
            assert self.run.state.world == self.world

    @invariant()
    def time_alone_changes_no_formed_world(self):
        if hasattr(self, "run") and self.world is not None and not self.run.state.broken:
            state, commands = advance(self.run.state, Tick(self.run.now + 1e6))
            assert (state, commands) == (self.run.state, [])


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40)
