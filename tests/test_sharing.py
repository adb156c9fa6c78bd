"""Several runs on one cluster: who gets what, as a pure function, and a small cluster that follows it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.cluster.capacity import fits
from elastic.cluster.sharing import GIVE_UP_AFTER_S, YIELD_AFTER_S, Demand, Patience, Share, Terms, share


def run(
    name: str,
    have: int,
    least: int = 2,
    *,
    asks: int = 0,
    priority: int = 0,
    since: float = 0.0,
    accelerator: str = "gpu",
    short_s: float = 60.0,
    steady_s: float = 60.0,
) -> Demand:
    terms = Terms(name, priority, since, accelerator, least, 600.0)
    return Demand(terms, have, asks, short_s if have < least else 0, steady_s)


def share_of(me: Demand, *others: Demand, holds_state: bool = True) -> Share:
    return share(me, others, holds_state=holds_state)


def test_alone_a_run_may_have_what_it_wants() -> None:
    assert share_of(run("a", 0)) == Share()
    assert share_of(run("a", 5)) == Share()


def test_lower_runs_shrink_to_theirs_while_a_higher_one_lacks_its_least() -> None:
    low, high = run("low", 5, 2), run("high", 1, 3, priority=1)

    assert share_of(low, high) == Share(most=2, to=("high",), ask=5)
    assert share_of(high, low) == Share()
    assert share_of(low, run("high", 3, 3, priority=1)) == Share()
    assert share_of(low, run("equal", 1, 3)).most is None
    assert share_of(low, run("other", 1, 3, priority=1, accelerator="cpu")) == Share()


def test_who_has_only_begun_to_ask_makes_nobody_shrink() -> None:
    assert share_of(run("low", 5), run("high", 0, priority=1, short_s=YIELD_AFTER_S - 0.1)).most is None
    assert share_of(run("low", 5), run("high", 0, priority=1, short_s=YIELD_AFTER_S)).most == 2


def test_the_least_of_all_comes_before_more_for_any() -> None:
    assert share_of(run("old", 2, 2, asks=3, since=1.0), run("new", 0, since=2.0)).ask == 2
    assert share_of(run("high", 2, 2, asks=3, priority=9), run("low", 0)).ask == 2
    assert share_of(run("new", 0, since=2.0), run("old", 2, 2, asks=3, since=1.0)).ask is None


def test_equals_are_served_oldest_first() -> None:
    old, new = run("old", 1, since=1.0), run("new", 1, since=2.0)
    assert share_of(old, new).ask == 2
    assert share_of(new, run("old", 1, since=1.0, short_s=1.0)).ask == 1
    assert share_of(new, old, holds_state=False).ask == 0, "parts of what two need are of use to none"

    old, new = run("old", 2, asks=1, since=1.0), run("new", 2, asks=1, since=2.0)
    assert share_of(old, new).ask is None
    assert share_of(new, old).ask == 2
    assert share_of(new, run("old", 2, since=1.0)).ask is None, "the older one has paused, or has all that it wants"


def test_of_two_parked_runs_that_each_hold_a_part_the_later_gives_up_its_part() -> None:
    old, new = run("old", 1, since=1.0), run("new", 1, since=2.0)
    assert share_of(new, old) == Share(most=0, to=("old",), ask=1)
    assert share_of(old, new) == Share(ask=2)
    high, low = run("high", 1, since=2.0, priority=1), run("low", 1, since=1.0)
    assert share_of(low, high) == Share(most=0, to=("high",), ask=1)
    assert share_of(high, low) == Share(ask=2)

    for before in (
        run("old", 1, since=1.0, short_s=GIVE_UP_AFTER_S - 0.1),  # it may get its workers yet
        run("old", 1, since=1.0, steady_s=YIELD_AFTER_S - 0.1),  # or more of them are just coming
        run("old", 1, 3, since=1.0),  # one more is not enough for it
        run("old", 2, since=1.0),
    ):
        assert share_of(new, before).most is None
    assert share_of(run("new", 1, since=2.0, short_s=GIVE_UP_AFTER_S - 0.1), old).most is None
    assert share_of(new, old, holds_state=False) == Share(ask=0), "it has nothing to save"


def test_no_more_give_up_their_part_than_are_needed_the_last_first() -> None:
    first, second, third = (run(f"{i}", 1, 2, since=float(i)) for i in range(3))
    assert share_of(third, first, second).most == 0
    assert share_of(second, first, third).most is None
    larger = run("0", 1, 3)
    assert share_of(third, larger, second).most == share_of(second, larger, third).most == 0

    gave = run("2", 0, 2, since=2.0, steady_s=1.0)
    assert share_of(second, first, gave).most is None, "what it gave is on its way"
    assert share_of(second, first, run("2", 0, 2, since=2.0)).most == 0


def test_what_runs_say_of_themselves_survives_the_board() -> None:
    said = run("a", 1, priority=-3, since=1.5)

    assert Demand.from_bytes(said.to_bytes(7)) == said
    assert said.to_bytes(7) != said.to_bytes(8)


# ---- a cluster that follows it -------------------------------------------------------------------------------------


@dataclass
class Running:
    """A run as it really is; `most` is what it could use."""

    terms: Terms
    most: int
    have: int = 0
    asks: int = 0
    short_s: float = 0.0
    steady_s: float = 0.0
    holds_state: bool = False
    saving_s: int = 0
    gave: int = 0

    def say(self) -> Demand:
        return Demand(self.terms, self.have, self.asks, self.short_s, self.steady_s)

    def follow(self, others: list[Demand], saving_s: int) -> None:
        """One second: what a controller does with its share. Saving takes a parked run `saving_s`."""
        mine = share(self.say(), others, holds_state=self.holds_state)
        if mine.ask == 0:
            self.have = 0
        if mine.most == 0:
            self.saving_s += 1
            if self.saving_s > saving_s:
                self.have, self.holds_state, self.saving_s, self.gave = 0, False, 0, self.gave + 1
        elif mine.most is not None:
            self.have = min(self.have, mine.most)
        limit = min(n for n in (self.most, mine.most, mine.ask) if n is not None)
        self.asks = max(0, limit - self.have)

    def count_second(self, had: int) -> None:
        short = self.have < self.terms.min_workers
        self.holds_state = self.holds_state or not short
        self.short_s = self.short_s + 1 if short else 0.0
        self.steady_s = self.steady_s + 1 if self.have == had else 0.0


def a_second_passes(runs: list[Running], slots: int, saving_s: int, pick: st.DataObject | None) -> None:
    """Slots that are free go to anyone who asks, as Ray's scheduler may choose."""
    said, had = [r.say() for r in runs], [r.have for r in runs]  # each reads what the others said a second ago
    for r in runs:
        r.follow([s for s in said if s.terms != r.terms], saving_s)
    while slots > sum(r.have for r in runs) and (asking := [r for r in runs if r.asks]):
        lucky = pick.draw(st.sampled_from(asking)) if pick is not None else asking[0]
        lucky.have, lucky.asks = lucky.have + 1, lucky.asks - 1
    for r, before in zip(runs, had, strict=True):
        r.count_second(before)


RUNS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=4
)


@given(RUNS, st.integers(1, 10), st.data())
def test_every_run_that_can_be_served_is_served_in_order_and_nothing_lies_idle(
    wanted: list[tuple[int, int, int, int]], slots: int, data: st.DataObject
) -> None:
    """Runs begin at different seconds."""
    runs = [
        Running(Terms(f"r{i}", priority, float(begin), "gpu", least, 600.0), least + more)
        for i, (priority, least, more, begin) in enumerate(wanted)
    ]
    for second in range(120):
        here = [r for r in runs if r.terms.since <= second]
        a_second_passes(here, slots, 1, pick=data if second < 40 else None)

    trained = [r for r in runs if r.have >= r.terms.min_workers]
    for late in runs:
        if late in trained or late.holds_state:
            continue
        assert late.have == 0 or late is min((r for r in runs if r not in trained), key=lambda r: r.say().order)
        lower = [r for r in trained if r.terms.priority < late.terms.priority]
        room = slots - sum(r.have for r in trained)
        first = late is min((r for r in runs if r not in trained), key=lambda r: r.say().order)
        assert not first or (room < late.terms.min_workers and all(r.have == r.terms.min_workers for r in lower))
    if len(trained) == len(runs):
        assert sum(r.have for r in runs) == min(slots, sum(r.most for r in runs))


LOSERS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(1, 4), st.integers(0, 1), st.integers(0, 3)), min_size=2, max_size=4
)


@given(LOSERS, st.integers(0, 2), st.integers(0, 3), st.data())
def test_of_runs_that_lost_workers_no_two_wait_for_each_other(
    losers: list[tuple[int, int, int, int]], free: int, saving_s: int, data: st.DataObject
) -> None:
    """All of them trained, and lost some workers; few nodes are free: whoever can be served is."""
    runs = []
    for i, (priority, least, more, lost) in enumerate(losers):
        terms = Terms(f"r{i}", priority, float(i), "gpu", least, 600.0)
        runs.append(Running(terms, least + more, have=max(0, least + more - lost), holds_state=True))
    slots = sum(r.have for r in runs) + free
    for second in range(150):
        a_second_passes(runs, slots, saving_s, pick=data if second < 10 else None)

    trained = [r for r in runs if r.have >= r.terms.min_workers]
    waiting = sorted((r for r in runs if r not in trained), key=lambda r: r.say().order)
    if waiting:
        lower = [r for r in trained if r.terms.priority < waiting[0].terms.priority]
        assert all(r.have == r.terms.min_workers for r in lower)
        assert slots - sum(r.have for r in trained) < waiting[0].terms.min_workers, "together they have enough for it"
    else:
        assert sum(r.have for r in runs) == min(slots, sum(r.most for r in runs))
    assert all(r.gave <= len(runs) for r in runs)


# ---- patience ------------------------------------------------------------------------------------------------------


def test_requests_for_more_are_withdrawn_after_a_while_and_made_again_after_pauses_that_double() -> None:
    patience, now, pauses = Patience(10.0), 0.0, []
    for _ in range(4):
        assert patience.after(now, waited_s=10.0, served=False, room=False) == patience
        patience = patience.after(now, waited_s=10.1, served=False, room=False)
        assert patience.pausing(now)
        assert patience.after(now, waited_s=0.0, served=False, room=False) == patience
        pauses.append(patience.until - now)
        now = patience.until
    assert pauses == [10.0, 20.0, 40.0, 80.0]
    assert not patience.pausing(now)


@pytest.mark.parametrize("why", ["served", "room"])
def test_a_pause_ends_when_there_is_room(why: str) -> None:
    pausing = Patience(10.0).after(0.0, waited_s=11.0, served=False, room=False)

    ended = pausing.after(3.0, waited_s=0.0, served=why == "served", room=why == "room")

    assert not ended.pausing(3.0)
    assert ended.refusals == (0 if why == "served" else 1)


def test_a_worker_fits_where_all_that_it_needs_is_free() -> None:
    assert fits({"GPU": 1.0, "CPU": 2.0}, {"GPU": 1.0, "CPU": 2.0, "memory": 5.0})
    assert not fits({"GPU": 1.0, "CPU": 2.0}, {"CPU": 8.0})
