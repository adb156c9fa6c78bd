"""Who counts as silent: told from a server that hears nobody because it is cut off itself. And who hangs."""

from __future__ import annotations

from typing import Any

import pytest

from elastic.membership.stage import Position, Stage
from elastic.membership.watch import (
    Progress,
    caught_up,
    excuse,
    hung,
    overdue,
    silent,
    slow,
    stalled_times,
)

LIMIT_S, LEASE_S = 5.0, 30.0


class Watch:
    """A server's ticks: who is lost, given who was heard."""

    def __init__(self, *world: str, lease_s: float = LEASE_S):
        self.world, self.lease_s, self.warming = world, lease_s, set()
        self.heard, self.now, self.excused_until = dict.fromkeys(world, 0.0), 0.0, 0.0

    def until(self, seconds: float, *speaking: str) -> list[str]:
        """Who is lost by then, one after another, while these speak once a second."""
        lost: list[str] = []
        while self.now < seconds:
            self.now += 0.5
            if self.now % 1 == 0:
                self.heard |= dict.fromkeys(speaking, self.now)
            self.excused_until = excuse(self.excused_until, self.heard, self.now, LIMIT_S, self.world)
            ready = self.heard.keys() - self.warming
            found = silent(self.heard, self.now, LIMIT_S, self.world, self.lease_s, self.excused_until, ready)
            self.heard = {m: at for m, at in self.heard.items() if m not in found}
            lost += found
        return lost


def test_one_of_a_world_that_is_silent_is_lost_at_the_limit() -> None:
    watch = Watch("a", "b", "c")
    assert watch.until(LIMIT_S, "a", "b") == []
    assert watch.until(LIMIT_S + 0.5, "a", "b") == ["c"]


def test_a_world_that_is_silent_as_a_whole_is_lost_at_its_lease() -> None:
    watch = Watch("a", "b")
    assert watch.until(LEASE_S) == []
    assert watch.until(LEASE_S + 0.5) == ["a", "b"]


def test_a_lease_shorter_than_the_limit_loses_nobody_before_the_limit() -> None:
    watch = Watch("a", "b", lease_s=1.0)
    assert watch.until(LIMIT_S) == []
    assert watch.until(LIMIT_S + 0.5) == ["a", "b"]


def test_after_a_common_silence_the_lines_may_come_back_one_by_one() -> None:
    watch = Watch("a", "b")
    assert watch.until(12) == []
    assert watch.until(23, "a") == []
    assert watch.until(60, "a", "b") == []
    assert watch.until(70, "a") == ["b"]  # and then all is as ever


def test_who_does_not_come_back_after_a_common_silence_is_lost() -> None:
    watch = Watch("a", "b")
    assert watch.until(12) == []
    assert watch.until(25, "a") == ["b"]


def test_who_waits_outside_the_world_is_lost_at_the_limit_whatever_the_world_does() -> None:
    watch = Watch("a", "b")
    watch.heard["waiting"] = 0.0
    assert watch.until(LIMIT_S + 0.5) == ["waiting"]


def test_for_who_is_not_ready_yet_only_the_lease_counts() -> None:
    watch = Watch("a", "b")
    watch.heard["warming"] = 0.0
    watch.warming.add("warming")
    assert watch.until(LEASE_S, "a", "b") == []
    assert watch.until(LEASE_S + 0.5, "a", "b") == ["warming"]


def at(step: int, stage: Stage, since: float = 0.0, *, first: bool = False, **more: Any) -> Progress:
    return Progress(Position(step, stage, first=first), since, **more)


def test_a_second_one_is_not_given_up_in_the_same_step() -> None:
    places = {"a": at(2, Stage.FENCE), "b": at(2, Stage.PASS)}
    assert hung(places, 11.0, 0.0, None) == ["b"]
    assert hung(places, 11.0, 0.0, None, steps_out={2}) == []
    assert hung(places, 11.0, 0.0, None, steps_out={1}) == ["b"]


@pytest.mark.parametrize(
    ("stage", "first", "doubted_in"),
    [
        (Stage.PASS, True, 2),
        (Stage.DATA, False, 2),
        (Stage.CONNECT, False, 2),
        (Stage.LOAD, False, 2),
        (Stage.PASS, False, 1),
        (Stage.EVALUATE, False, 1),
        (Stage.CHECKPOINT, False, 1),
    ],
)
def test_what_takes_long_is_over_where_others_are_in_a_later_step(stage: Stage, first: bool, doubted_in: int) -> None:
    """What comes after a fence, an evaluation or a checkpoint, may be under way where others are in the next step."""

    def known(step: int) -> Progress:
        return caught_up({"a": at(3, Stage.PASS), "b": at(step, stage, first=first)})["b"]

    assert [known(step).doubted for step in (1, 2, 3)] == [True, doubted_in == 2, False]
    assert (known(1).label, known(1).patience) == ("step", 1.0)
    assert caught_up({}) == {}


def test_nobody_moves() -> None:
    def times(now: float, *stages: Stage) -> float:
        return stalled_times({str(i): at(2, stage, i) for i, stage in enumerate(stages)}, now, 0.0, 4.0)

    assert times(9.0, Stage.PASS, Stage.FENCE) == 2.0
    assert times(81.0, Stage.PASS, Stage.EVALUATE) == 2.0
    assert times(401.0, Stage.PASS, Stage.LOAD) == 1.0, "loading is not told step by step"
    assert times(81.0, Stage.CONNECT, Stage.CONNECT) == 2.0, "nobody gets through, and nobody is behind"
    assert times(401.0, Stage.PASS, Stage.HELD) == 0.0
    assert stalled_times({}, 9.0, 0.0, 4.0) == 0.0


def test_who_is_to_come_back_from_a_broken_world_is_waited_for_longer_where_that_costs_nothing() -> None:
    places = {"a": at(2, Stage.PASS, 7.0)}
    assert overdue(places, {"a": 1.0, "b": 1.0}, 5.0, 11.5, 0.0, 4.0) == ["a"]
    assert overdue(places, {"a": 3.0, "b": 1.0}, 5.0, 11.5, 0.0, 4.0) == []


def test_who_waits_for_data_is_given_up_much_later_than_who_computes_and_not_twice_for_one_sample() -> None:
    limit_s = 4.0

    def behind(stage: Stage) -> dict[str, Progress]:
        return {"a": at(2, Stage.FENCE), "b": at(2, stage, where="step 3, microbatch 0", samples=(5,))}

    assert hung(behind(Stage.PASS), limit_s + 1, 0.0, limit_s) == ["b"]
    assert slow(behind(Stage.PASS), limit_s + 1, 0.0, limit_s, Stage.DATA) == []
    longest_s = limit_s * Stage.DATA.patience
    assert hung(behind(Stage.DATA), longest_s, 0.0, limit_s) == []
    assert slow(behind(Stage.DATA), limit_s, 0.0, limit_s, Stage.DATA) == []
    assert slow(behind(Stage.DATA), limit_s + 1, 0.0, limit_s, Stage.DATA) == ["b"]
    assert hung(behind(Stage.DATA), longest_s + 1, 0.0, limit_s) == ["b"]
    assert hung(behind(Stage.DATA), longest_s + 1, 0.0, limit_s, {5}) == []
    assert hung(behind(Stage.PASS), longest_s + 1, 0.0, limit_s, {5}) == ["b"]
