"""Several runs on one cluster: who gets what, as a pure function, and a small cluster that follows it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.cluster.capacity import fits
from elastic.cluster.sharing import YIELD_AFTER_S, Patience, Share, Standing, Terms, share


def run(name: str, have: int, least: int = 2, *, asks: int = 0, priority: int = 0, since: float = 0.0,
        accelerator: str = "gpu", short_s: float = 60.0) -> Standing:  # fmt: skip
    return Standing(Terms(name, priority, since, accelerator, least, 600.0), have, asks, short_s if have < least else 0)


def share_of(me: Standing, *others: Standing, holds_state: bool = True) -> Share:
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
    assert share_of(new, old).ask == 1
    assert share_of(new, old, holds_state=False).ask == 0, "parts of what two need are of use to none"

    old, new = run("old", 2, asks=1, since=1.0), run("new", 2, asks=1, since=2.0)
    assert share_of(old, new).ask is None
    assert share_of(new, old).ask == 2
    assert share_of(new, run("old", 2, since=1.0)).ask is None, "the older one has paused, or has all that it wants"


def test_what_runs_say_of_themselves_survives_the_board() -> None:
    said = run("a", 1, priority=-3, since=1.5)

    assert Standing.from_bytes(said.to_bytes(7)) == said
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
    holds_state: bool = False

    def say(self) -> Standing:
        return Standing(self.terms, self.have, self.asks, self.short_s)


RUNS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=4
)


@given(RUNS, st.integers(1, 10), st.data())
def test_every_run_that_can_be_served_is_served_in_order_and_nothing_lies_idle(
    wanted: list[tuple[int, int, int, int]], slots: int, data: st.DataObject
) -> None:
    """Runs begin at different seconds. Slots that are free go to anyone who asks, as Ray's scheduler may choose."""
    runs = [
        Running(Terms(f"r{i}", priority, float(begin), "gpu", least, 600.0), least + more)
        for i, (priority, least, more, begin) in enumerate(wanted)
    ]
    for second in range(120):
        here = [r for r in runs if r.terms.since <= second]
        said = [r.say() for r in here]  # each reads what the others said a second ago
        for r in here:
            mine = share(r.say(), [s for s in said if s.terms != r.terms], holds_state=r.holds_state)
            if mine.ask == 0:
                r.have = 0
            if mine.most is not None:
                r.have = min(r.have, mine.most)
            limit = min(n for n in (r.most, mine.most, mine.ask) if n is not None)
            r.asks = max(0, limit - r.have)
        while (free := slots - sum(r.have for r in runs)) > 0 and (asking := [r for r in here if r.asks]):
            lucky = data.draw(st.sampled_from(asking)) if second < 40 else asking[0]
            lucky.have, lucky.asks = lucky.have + 1, lucky.asks - 1
            assert free > 0
        for r in here:
            r.holds_state = r.holds_state or r.have >= r.terms.min_workers
            r.short_s = r.short_s + 1 if r.have < r.terms.min_workers else 0.0

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
