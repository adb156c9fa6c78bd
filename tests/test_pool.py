"""How the workers of a run are kept at their number, against a cluster in which anything may happen. No cluster."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elastic.cluster.pool import (
    AskAnew,
    AskIn,
    Bounds,
    GiveUp,
    Seen,
    Stage,
    Unit,
    Withdraw,
    decide,
    may_be_there,
    notices,
    staying_units,
)
from elastic.cluster.sharing import Share

ALONE = Bounds(per_node=None, together=1, packed=False, min_workers=1, start_s=180.0)
TWO_A_NODE = replace(ALONE, per_node=2)
PACKED = Bounds(per_node=2, together=2, packed=True, min_workers=2, start_s=180.0)


def unit(key: int, stage: Stage = Stage.RUNNING, node: str = "", placement: int | None = None) -> Unit:
    own = key if placement is None else placement
    return Unit(key, own, stage, 0.0, f"w{key}" if stage is not Stage.ASKED else "", node)


def test_all_that_is_missing_is_asked_for_at_once_where_nothing_speaks_against_it() -> None:
    assert decide([unit(0)], Seen(want=3), ALONE, 0.0) == [AskAnew(()), AskAnew(())]


def test_where_a_node_may_have_only_so_many_one_is_asked_for_after_another_and_full_nodes_are_kept_out() -> None:
    units = [unit(0, node="a"), unit(1, node="a")]
    seen = Seen(want=4, excluded=("x",))
    assert decide(units, seen, TWO_A_NODE, 0.0) == [AskAnew(("a", "x"))]
    assert decide([*units, unit(2, Stage.ASKED)], seen, TWO_A_NODE, 0.0) == []


def test_rooms_of_several_places_are_asked_for_all_together() -> None:
    assert decide([], Seen(want=5), PACKED, 0.0) == [AskAnew((), 2), AskAnew((), 2), AskAnew((), 1)]
    beside = [unit(0, node="a", placement=7)]
    assert decide(beside, Seen(want=4), PACKED, 0.0) == [AskIn(7), AskAnew(("a",), 2)]
    gone = Seen(want=2, lost_placements=frozenset({7}))
    assert decide(beside, gone, PACKED, 0.0) == [AskAnew(("a",), 1)], "nobody goes where the node is gone"


def test_what_has_not_come_is_given_back_first_and_nobody_else() -> None:
    units = [unit(0), unit(1, Stage.STARTING), unit(2, Stage.ASKED), unit(3, Stage.ASKED)]
    assert decide(units, Seen(want=3), ALONE, 0.0) == [Withdraw(2)]
    assert decide(units, Seen(want=1), ALONE, 0.0) == [Withdraw(2), Withdraw(3)]
    assert decide(units, Seen(want=4, share=Share(ask=2)), ALONE, 0.0) == [Withdraw(2), Withdraw(3)]


def test_who_goes_is_replaced_before_it_has_gone() -> None:
    units = [unit(0, node="a"), unit(1, node="b")]
    assert decide(units, Seen(want=2, draining=frozenset({"a"})), ALONE, 0.0) == [AskAnew(())]
    assert decide(units, Seen(want=2, drained=frozenset({"w1"})), ALONE, 0.0) == [AskAnew(())]


def test_nothing_is_asked_for_while_it_would_be_in_vain() -> None:
    assert decide([], Seen(want=2, ask_after=5.0), ALONE, 4.9) == []
    assert decide([], Seen(want=2, ask_after=5.0), ALONE, 5.0) == [AskAnew(()), AskAnew(())]
    assert decide([unit(0)], Seen(want=3, had=1, pausing=True), ALONE, 0.0) == []
    assert decide([unit(0, Stage.OVER)], Seen(want=3), ALONE, 0.0) == [], "the run is ending"


def test_a_process_that_does_not_start_is_given_up_and_another_one_asked_for() -> None:
    slow = unit(0, Stage.STARTING)
    assert decide([slow], Seen(want=1), ALONE, 180.0) == []
    assert decide([slow], Seen(want=1), ALONE, 181.0) == [
        GiveUp(0, "the worker did not start within 180 s"),
        AskAnew(()),
    ]


@pytest.mark.parametrize(
    ("there", "excluded", "may"), [((), (), True), (("a",), (), True), (("a", "a"), (), False), ((), ("a",), False)]
)
def test_a_place_that_came_on_a_node_that_is_full_or_kept_out_is_not_taken(there, excluded, may) -> None:
    units = [unit(i, node=node) for i, node in enumerate(there)]
    new = unit(9, Stage.ASKED)
    assert may_be_there(new, "a", [*units, new], Seen(want=9, excluded=excluded), TWO_A_NODE) is may


def test_a_node_s_notice_is_passed_on_once_and_again_where_less_time_is_left() -> None:
    units = [unit(0, node="a"), unit(1, node="b")]
    assert notices({"a": 9_000, "x": 9_000}, {}, units, 4.0) == [("a", 5.0)]
    assert notices({"a": 9_000}, {"a": 9_000}, units, 4.0) == []
    assert notices({"a": 5_000}, {"a": 9_000}, units, 6.0) == [("a", 0.0)]
    assert notices({"b": 0}, {}, units, 6.0) == [("b", 30.0)]
    assert notices({"b": 0}, {"b": 0}, units, 6.0) == []


# ---- a cluster in which anything may happen --------------------------------------------------------------------------


class Cluster(RuleBasedStateMachine):
    """Ray gives places in any order on any node; processes start, end and die; nodes go away and are kept out; the
    run wants more or fewer workers, and other runs leave it some."""

    @initialize(bounds=st.sampled_from([ALONE, TWO_A_NODE, PACKED, replace(PACKED, per_node=1, together=1)]))
    def start(self, bounds: Bounds) -> None:
        self.bounds, self.seen, self.now = bounds, Seen(want=2), 0.0
        self.units: dict[int, Unit] = {}
        self.numbers, self.nodes = 0, [f"n{i}" for i in range(4)]
        self.placements: dict[int, str] = {}  # where a placement of several places came
        self.asked_in_vain = 0
        self.turn()

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    def drop(self, key: int, *, node_lost: bool = False) -> None:
        placement = self.units.pop(key).placement
        if not any(u.placement == placement for u in self.units.values()):
            self.placements.pop(placement, None)
            self.seen = replace(self.seen, lost_placements=self.seen.lost_placements - {placement})
        elif node_lost:
            self.seen = replace(self.seen, lost_placements=self.seen.lost_placements | {placement})

    @rule()
    def turn(self) -> None:
        """The controller's turn, carried out."""
        before = [u.key for u in self.units.values() if u.stage is not Stage.ASKED]
        for action in decide(list(self.units.values()), self.seen, self.bounds, self.now):
            match action:
                case GiveUp(key, _):
                    assert self.units[key].stage is Stage.STARTING
                    self.drop(key)
                    before.remove(key)
                case Withdraw(key):
                    assert self.units[key].stage is Stage.ASKED, "who is there is let go by the server"
                    self.drop(key)
                case AskIn(placement):
                    assert placement not in self.seen.lost_placements
                    self.ask(placement)
                case AskAnew(elsewhere, places):
                    assert 1 <= places <= self.bounds.together
                    assert set(self.seen.excluded) <= set(elsewhere)
                    placement = self.number()
                    for _ in range(places):
                        self.ask(placement)
        assert set(before) <= self.units.keys(), "survivors stay"

    def ask(self, placement: int) -> None:
        assert self.now >= self.seen.ask_after, "the last ones could not get ready"
        assert not any(u.stage is Stage.OVER for u in self.units.values()), "the run is ending"
        key = self.number()
        self.units[key] = Unit(key, placement, Stage.ASKED, self.now)
        assert sum(u.placement == placement for u in self.units.values()) <= self.bounds.together

    @rule(seconds=st.sampled_from([0.2, 5.0, 200.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: any(u.stage is Stage.ASKED for u in self.units.values()))
    @rule(data=st.data())
    def place(self, data: st.DataObject) -> None:
        """A place has come. All places of one placement are on one node."""
        asked = [u for u in self.units.values() if u.stage is Stage.ASKED]
        one = data.draw(st.sampled_from(asked))
        node = self.placements.setdefault(one.placement, data.draw(st.sampled_from(self.nodes)))
        if may_be_there(one, node, self.units.values(), self.seen, self.bounds):
            self.units[one.key] = replace(one, stage=Stage.STARTING, since=self.now, node=node, id=f"w{one.key}")
        else:
            self.drop(one.key, node_lost=True)

    @precondition(lambda self: any(u.stage is Stage.STARTING for u in self.units.values()))
    @rule(data=st.data())
    def run(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from([u for u in self.units.values() if u.stage is Stage.STARTING]))
        self.units[one.key] = replace(one, stage=Stage.RUNNING, since=self.now)

    @precondition(lambda self: any(u.stage is not Stage.ASKED for u in self.units.values()))
    @rule(data=st.data(), node_lost=st.booleans())
    def die(self, data: st.DataObject, node_lost: bool) -> None:
        one = data.draw(st.sampled_from([u for u in self.units.values() if u.stage is not Stage.ASKED]))
        self.drop(one.key, node_lost=node_lost)

    @rule(want=st.integers(1, 6), ask=st.none() | st.integers(0, 6), most=st.none() | st.integers(0, 6))
    def look(self, want: int, ask: int | None, most: int | None) -> None:
        """What the server and the other runs say."""
        have = sum(u.stage is not Stage.ASKED for u in staying_units(self.units.values(), self.seen))
        self.seen = replace(self.seen, want=want, share=Share(most=most, ask=ask), had=have)

    @rule(pausing=st.booleans(), back_off=st.booleans())
    def be_patient(self, pausing: bool, back_off: bool) -> None:
        self.seen = replace(self.seen, pausing=pausing, ask_after=self.now + 3.0 if back_off else self.seen.ask_after)

    @rule(draining=st.sets(st.sampled_from(["n0", "n1"])), excluded=st.sets(st.sampled_from(["n2"])))
    def watch(self, draining: set[str], excluded: set[str]) -> None:
        self.seen = replace(self.seen, draining=frozenset(draining), excluded=tuple(excluded))

    @invariant()
    def no_node_has_more_than_it_may(self) -> None:
        if self.bounds.per_node is not None:
            there = Counter(u.node for u in self.units.values() if u.node)
            assert all(count <= self.bounds.per_node for count in there.values()), there

    @invariant()
    def no_more_is_asked_for_than_is_wanted_once_it_was_looked_at(self) -> None:
        staying = staying_units(self.units.values(), self.seen)
        waiting = [u for u in staying if u.stage is Stage.ASKED]
        actions = decide(list(self.units.values()), self.seen, self.bounds, self.now)
        withdrawn = sum(isinstance(a, Withdraw) for a in actions)
        asked = sum(a.places if isinstance(a, AskAnew) else isinstance(a, AskIn) for a in actions)
        assert not (withdrawn and asked)
        more = len(waiting) - withdrawn + asked
        given_up = sum(isinstance(a, GiveUp) for a in actions)
        there = len(staying) - len(waiting) - given_up
        assert more == 0 or there + more <= max(self.seen.want, there)

    def teardown(self) -> None:
        """Where nothing happens any more, the run comes to have what it wants."""
        if not hasattr(self, "units"):
            return
        self.seen = Seen(want=self.seen.want, lost_placements=self.seen.lost_placements)
        self.now += 1000.0
        free = iter(f"new{i}" for i in range(1000))
        for _ in range(20):
            self.turn()
            for one in [u for u in self.units.values() if u.stage is Stage.ASKED]:
                node = self.placements.setdefault(one.placement, next(free))
                taken = replace(one, stage=Stage.RUNNING, since=self.now, node=node, id=f"w{one.key}")
                if may_be_there(one, node, self.units.values(), self.seen, self.bounds):
                    self.units[one.key] = taken
                else:
                    self.drop(one.key, node_lost=True)
            for one in [u for u in self.units.values() if u.stage is Stage.STARTING]:
                self.units[one.key] = replace(one, stage=Stage.RUNNING)
        assert len(self.units) >= self.seen.want
        assert not any(u.stage is Stage.ASKED for u in self.units.values())


TestCluster = Cluster.TestCase
