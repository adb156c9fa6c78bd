"""Who counts as silent: told from a server that hears nobody because it is cut off itself. And who hangs."""

from __future__ import annotations

from elastic.membership.watch import DATA, PATIENCE, Progress, excuse, hung, silent, slow_data

LIMIT_S, LEASE_S = 5.0, 30.0


class Watch:
    """A server's ticks: who is lost, given who was heard."""

    def __init__(self, *world: str, lease_s: float = LEASE_S):
        self.world, self.lease_s = world, lease_s
        self.heard, self.now, self.excused_until = dict.fromkeys(world, 0.0), 0.0, 0.0

    def until(self, seconds: float, *speaking: str) -> list[str]:
        """Who is lost by then, one after another, while these speak once a second."""
        lost: list[str] = []
        while self.now < seconds:
            self.now += 0.5
            if self.now % 1 == 0:
                self.heard |= dict.fromkeys(speaking, self.now)
            self.excused_until = excuse(self.excused_until, self.heard, self.now, LIMIT_S, self.world)
            found = silent(self.heard, self.now, LIMIT_S, self.world, self.lease_s, self.excused_until)
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


def test_who_waits_for_data_is_given_up_much_later_than_who_computes_and_not_twice_for_one_sample() -> None:
    limit_s = 4.0
    ahead = Progress((2, 9, 0), "step", 0.0)

    def behind(phase: str) -> dict[str, Progress]:
        return {"a": ahead, "b": Progress((2, 0, 0), phase, 0.0, "step 3, microbatch 0", (5,))}

    assert hung(behind("step"), limit_s + 1, 0.0, limit_s) == ["b"]
    assert slow_data(behind("step"), limit_s + 1, 0.0, limit_s) == []
    longest_s = limit_s * PATIENCE[DATA]
    assert hung(behind(DATA), longest_s, 0.0, limit_s) == []
    assert slow_data(behind(DATA), limit_s, 0.0, limit_s) == []
    assert slow_data(behind(DATA), limit_s + 1, 0.0, limit_s) == ["b"]
    assert hung(behind(DATA), longest_s + 1, 0.0, limit_s) == ["b"]
    assert hung(behind(DATA), longest_s + 1, 0.0, limit_s, {5}) == []
    assert hung(behind("step"), longest_s + 1, 0.0, limit_s, {5}) == ["b"]
