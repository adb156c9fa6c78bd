"""The membership decisions, checked against a model of a cluster in which anything may happen at any time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elastic.cluster.placement_groups import GroupPlan
from elastic.cluster.sharing import Terms
from elastic.membership.commands import (
    Break,
    Command,
    Dropped,
    Fail,
    Failed,
    Form,
    GiveUp,
    HandOver,
    Leave,
    LeftBehind,
    LeftOut,
    Park,
    Rebuilt,
    Refuse,
    SaveAlone,
    SaveNow,
    Welcome,
)
from elastic.membership.decisions import advance
from elastic.membership.events import (
    Acknowledged,
    Arrived,
    Done,
    Drained,
    Event,
    Expected,
    Joined,
    Lost,
    Notice,
    Quiet,
    Recorded,
    Registered,
    SavedAlone,
    Scaled,
    Slept,
    Stalled,
    Stopped,
    Stuck,
    Tick,
    Unable,
    Unfit,
    Yielded,
)
from elastic.membership.failure import Failure
from elastic.membership.forming import helpful_size, in_cells, present
from elastic.membership.state import Limits, Phase, State, ask_again_s, going, holds_state
from elastic.membership.world import Generation, Member, World
from elastic.parallel.layout import lay_out
from elastic.placement import pipelines
from elastic.worker.restore_plan import Standing, decide
from jobs.bench import forming
from tests.fresh import examples


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
    assert machine.wait(29) == []
    machine.join("b")
    assert machine.wait(1.9) == []
    assert formed(machine.wait(0.2)).size == 2


def test_a_first_world_that_lacks_workers_is_parked_after_a_while_and_given_up_in_the_end() -> None:
    machine = Machine(min_workers=2, max_workers=3, park_after_s=30.0, max_wait_s=100.0)
    machine.join("a")
    assert machine.wait(31) == [Park(1, 2)]
    machine.lose("a")
    assert machine.wait(60) == []
    (given_up,) = machine.wait(41)
    assert isinstance(given_up, GiveUp)
    assert given_up.saver is None
    assert "with 0 of at least 2 workers" in given_up.message


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


def test_who_acknowledges_is_awaited_and_who_does_not_is_taken_in_when_it_comes() -> None:
    machine = three(grace_s=0.3)
    machine.lose("b")
    machine.tell(Acknowledged("c", machine.now))
    machine.join("a", 7)
    assert machine.wait(10) == []  # c is deep in a long step, but lives

    machine = three(grace_s=0.3)
    machine.lose("b")
    machine.join("a", 7)
    assert machine.wait(0.2) == []
    form, behind = machine.wait(0.2)
    assert isinstance(form, Form)
    assert machine.members == ["a"]
    assert behind == LeftBehind(Member("c", "node-c"))
    assert register(machine, "c", 2, n=1) == [Welcome("c", Generation(1, 1), broken=True)]
    assert machine.join("c", 7) == []
    (leave,) = machine.wait(1.1)
    assert isinstance(leave, Leave)
    assert formed(machine.join("a", 9)).ids == {"a", "c"}


def test_nobody_goes_on_without_the_last_who_holds_the_state_or_too_few_or_a_part_of_the_model() -> None:
    machine = Machine(max_workers=4)
    back(machine, -1, *"abc")
    machine.wait(2.5)
    machine.join("new")
    machine.wait(1.1)
    back(machine, 7, *"abc")
    assert machine.members == ["a", "b", "c", "new"]
    machine.lose("b")
    machine.join("new", -1)
    assert machine.wait(4) == [], "a and c hold the state"
    machine.tell(Acknowledged("a", machine.now))
    machine.join("a", 7)
    assert formed(machine.wait(0.4)).ids == {"a", "new"}
    machine.lose("a", dead=True)
    assert machine.join("new", -1) == [], "c may still come"
    assert machine.wait(100) == []
    assert formed(machine.join("c", 7)).ids == {"c", "new"}

    for limits in ({"min_workers": 2}, {"cut": True}):
        machine = three(**limits)
        machine.lose("b")
        machine.join("a", 7)
        assert machine.wait(4) == []
        assert formed(machine.join("c", 7)).size == 2


def test_answers_that_still_come_are_waited_for() -> None:
    machine = Machine(max_workers=8)
    for i in range(8):
        machine.join(f"w{i}")
    machine.lose("w7")
    for i in range(6):
        assert machine.wait(0.25) == []
        machine.tell(Acknowledged(f"w{i}", machine.now))
        machine.join(f"w{i}", 5)
    assert formed(machine.wait(0.35)).size == 6


def test_a_server_that_was_away_gives_those_time_who_have_answered_meanwhile() -> None:
    machine = three()
    machine.lose("b")
    machine.join("a", 7)
    machine.now += 20
    machine.tell(Slept(machine.now))
    assert machine.wait(0.2) == []
    assert formed(machine.join("c", 7)).size == 2


def test_a_world_that_stands_still_is_made_anew_and_the_second_time_it_is_saved_and_ends() -> None:
    machine = three()
    machine.tell(Recorded(7))
    (broken,) = machine.tell(Stalled("nobody moves", machine.now))
    assert isinstance(broken, Break)
    assert formed(back(machine, 7, *"abc")).size == 3
    machine.tell(Stalled("nobody moves", machine.now, final=True))
    assert back(machine, 7, *"abc") == [Form(machine.state.world, "nobody moves")]

    machine = three()
    machine.tell(Stalled("nobody moves", machine.now))
    assert machine.tell(Stuck("a does not come back", machine.now)) == [Fail("a does not come back")]


def test_who_was_lost_for_its_silence_alone_comes_back_unless_others_went_on() -> None:
    machine = three(min_workers=2)
    for name in "abc":
        machine.lose(name, reason="silent", dead=True, silent=True)
    machine.wait(60)
    assert register(machine, "a", 0, n=1) == [Welcome("a", Generation(1, 1), broken=True)]
    machine.tell(Acknowledged("b", machine.now))
    machine.join("a", 7)
    assert formed(machine.join("b", 7)).ids == {"a", "b"}
    assert isinstance(machine.join("c", 7)[0], Refuse)

    machine = three()
    machine.lose("c", reason="silent", silent=True)
    machine.join("a", 7)
    *_, refused = machine.join("b", 7)
    assert refused == Refuse("c", "it was silent, and its world went on without it")
    assert isinstance(machine.join("c", 7)[0], Refuse)


def test_who_was_left_behind_and_dies_is_lost_but_breaks_nothing() -> None:
    machine = three()
    machine.lose("b")
    machine.join("a", 7)
    machine.wait(0.4)
    assert machine.lose("c", dead=True, died=True) == [Dropped(Member("c", "node-c"), "connection lost")]
    assert machine.state.phase is Phase.RUNNING


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


def quiet(machine: Machine, *names: str) -> list[Command]:
    return machine.tell(Quiet(frozenset(names), machine.now))


def test_a_spare_that_says_nothing_is_passed_over_and_taken_in_when_it_is_heard() -> None:
    machine = three(max_workers=3)
    machine.join("first")
    machine.join("second")
    assert quiet(machine, "first") == []
    machine.lose("b")
    machine.join("a", 7)
    assert formed(machine.join("c", 7)).ids == {"a", "c", "second"}
    machine.lose("second")
    machine.join("a", 8)
    assert formed(machine.join("c", 8)).ids == {"a", "c"}, "smaller, but nobody waits in vain"
    assert machine.wait(10) == []
    (leave,) = quiet(machine)
    assert isinstance(leave, Leave)
    machine.join("a", 9)
    assert formed(machine.join("c", 9)).ids == {"a", "c", "first"}


def test_a_survivor_that_is_stopped_once_it_is_back_is_left_behind_unless_it_is_the_last_with_the_state() -> None:
    machine = three()
    machine.join("spare")
    machine.lose("b")
    machine.tell(Acknowledged("c", machine.now))
    machine.join("a", 8)  # c has passed the fence, too, or has all in hand
    quiet(machine, "a")
    form, behind = machine.join("c", 7)
    assert isinstance(form, Form)
    assert machine.members == ["c", "spare"]
    assert behind == LeftBehind(Member("a", "node-a"))
    (leave,) = quiet(machine)
    assert isinstance(leave, Leave), "it is taken in with what it holds"

    machine = three()
    machine.join("spare")
    for name in "bc":
        machine.lose(name)
    machine.tell(Acknowledged("a", machine.now))
    quiet(machine, "spare")
    assert formed(machine.join("a", 7)).ids == {"a"}
    machine = three()
    for name in "bc":
        machine.lose(name)
    quiet(machine, "a")
    assert formed(machine.join("a", 7)).ids == {"a"}, "who joins is not quiet"
    machine.lose("a")
    machine.join("spare")
    machine.join("new")
    quiet(machine, "spare")
    assert formed(machine.wait(31)).ids == {"new"}


def test_the_last_with_the_state_is_waited_for_and_too_few_that_answer_are_parked() -> None:
    machine = three(min_workers=2)
    for name in "bc":
        machine.lose(name)
    machine.join("a", 7)
    quiet(machine, "a")
    assert formed(machine.join("new")).ids == {"a", "new"}

    machine = three(min_workers=3)
    machine.lose("c")
    machine.join("a", 7)
    machine.join("b", 7)
    quiet(machine, "a")
    assert machine.join("new") == []
    assert formed(quiet(machine)).ids == {"a", "b", "new"}


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
    (again,) = machine.lose("c")  # it died before it had saved
    assert isinstance(again, GiveUp)
    assert again.saver is not None
    assert again.saver.id == "a"
    (last,) = machine.lose("a")
    assert isinstance(last, GiveUp)
    assert last.saver is None


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
    (again,) = machine.wait(0.1)  # it has given it after a step, and there is no room for two
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
    assert commands[-1] == Form(machine.state.world, "boom"), "a last world, which saves"
    commands = machine.join("a", 5, failure=Failure("ValueError", 6, 3, "again"))
    assert commands[-1] == Fail("boom")


def error(step: int, microbatch: int, kind: str = "ValueError") -> Failure:
    return Failure(kind, step, microbatch, f"boom at {step}, {microbatch}")


def back(machine: Machine, applied: int, *names: str, **more: object) -> list[Command]:
    """These join again, one after another; what the last of them brought about."""
    for name in names:
        commands = machine.join(name, applied, **more)
    return commands


def test_a_worker_that_alone_fails_twice_is_left_out_and_the_run_goes_on_with_others() -> None:
    machine = three()
    machine.join("c", 5, failure=error(5, 4))
    assert formed(back(machine, 5, "a", "b")).size == 3, "it may pass"
    told = machine.join("c", 5, failure=error(5, 4, "OtherError"))
    reason = "it failed 2 times at one step, where another worker is to try"
    assert told[-1] == LeftOut(Member("c", "node-c"), reason)
    back(machine, 5, "a", "b")
    assert machine.members == ["a", "b"]
    machine.tell(Recorded(6))
    assert machine.wait(60) == []
    (leave,) = machine.join("d")
    assert isinstance(leave, Leave)
    back(machine, 9, "a", "b")
    assert machine.members == ["a", "b", "d"], "it has no part any more where others are enough"


def test_who_is_left_out_with_a_part_of_the_state_saves_it_with_the_others_first() -> None:
    machine = three(cut=True)
    for _ in range(2):
        machine.join("c", 5, failure=error(5, 4))
        told = back(machine, 5, "a", "b")
    reason = "it failed 2 times at one step, where another worker is to try"
    assert told == [Form(machine.state.world, parting=True), LeftOut(Member("c", "node-c"), reason)]
    assert machine.members == ["a", "b", "c"]
    assert formed(back(machine, 5, "a", "c", "b")).size == 2
    assert machine.members == ["a", "b"]


def test_an_error_that_another_worker_meets_at_the_same_microbatch_is_the_jobs() -> None:
    machine = three()
    for _ in range(2):
        machine.join("c", 5, failure=error(5, 4))
        back(machine, 5, "a", "b")
    assert machine.members == ["a", "b"]
    machine.join("b", 5, failure=error(5, 4))
    last = machine.join("a", 5)
    assert last == [Form(machine.state.world, "boom at 5, 4")]
    assert machine.members == ["a", "b"]


def test_who_cannot_be_spared_is_not_left_out_and_one_that_fails_there_comes_back_where_others_are_lost() -> None:
    machine = three(min_workers=3, max_failures=2)
    for _ in range(2):
        assert not any(isinstance(c, LeftOut) for c in machine.join("c", 5, failure=error(5, 4)))
        assert formed(back(machine, 5, "a", "b")).size == 3
    assert machine.join("c", 5, failure=error(5, 4))[-1] != Fail("boom at 5, 4")
    assert back(machine, 5, "a", "b") == [Form(machine.state.world, "boom at 5, 4")]

    machine = three(min_workers=2)
    for _ in range(2):
        machine.join("c", 5, failure=error(5, 4))
        back(machine, 5, "a", "b")
    machine.lose("b")
    assert formed(machine.join("a", 7)).size == 2
    assert machine.members == ["a", "c"]
    machine.join("d")
    (leave,) = machine.wait(1.5)
    assert isinstance(leave, Leave), "one that does not fail takes its place"


def test_a_world_that_breaks_again_and_again_while_all_live_ends_the_run_with_the_last_reason() -> None:
    machine = three()
    for _ in range(2):
        assert formed(back(machine, 5, "a", "b", "c", broke="step 6 failed: reset")).size == 3
    (last,) = back(machine, 5, "a", "b", "c", broke="step 6 failed: reset")
    text = "3 worlds in a row broke at step 6 although all their workers live; the last time: step 6 failed: reset"
    assert last == Form(machine.state.world, text)
    for _ in range(2):
        (last,) = back(machine, 5, "a", "b", "c", broke="saving failed")
        assert last == Form(machine.state.world, text)
    assert back(machine, 5, "a", "b", "c") == [GiveUp(Member("a", "node-a"), text, "failed")], "saved by one alone"


def test_worlds_that_break_without_a_loss_are_counted_over_steps_and_those_with_one_are_not() -> None:
    machine = Machine(max_workers=2)
    machine.join("a")
    machine.join("b")
    for step in range(4):
        for _ in range(2):
            assert formed(back(machine, step, "a", "b", broke="reset")).size == 2
    for i in range(9):  # a member says that the world broke before the other is known to be lost
        machine.join("a", 4, broke="reset")
        assert formed(machine.lose(machine.members[1])).size == 1
        machine.join(f"b{i}")
        machine.wait(1.5)
        assert formed(machine.join("a", 4)).size == 2
    assert machine.state.failing is None
    back(machine, 20, "a", "b8", broke="reset")
    assert machine.state.failing is None
    back(machine, 21, "a", "b8", broke="reset")
    assert machine.state.failing == (
        "10 worlds broke within 30 steps, the last at step 22 although all their workers live; the last time: reset"
    )


def test_processes_that_die_at_one_step_again_and_again_end_the_run() -> None:
    machine = Machine(max_workers=1, lease_s=1.0)
    for i in range(5):
        assert formed(machine.join(f"w{i}")).size == 1
        machine.tell(Recorded(8))
        commands = machine.lose(f"w{i}", dead=True, died=True, reason="process died: exit code 1")
    ending = commands[-1]
    assert isinstance(ending, GiveUp)
    assert ending.status == "failed"
    assert ending.message.startswith(
        "5 worlds one after another lost a worker at step 9, since its process ended, and no step was recorded in "
        "between (worker w0: process died: exit code 1; worker w1: "
    )


def test_deaths_with_steps_in_between_or_of_many_at_once_do_not_end_a_run() -> None:
    machine = Machine(max_workers=1, lease_s=1.0)
    for i in range(30):
        assert formed(machine.join(f"w{i}")).size == 1
        machine.tell(Recorded(i))
        machine.lose(f"w{i}", dead=True, died=True)
    machine = Machine(max_workers=8)
    for i in range(8):
        machine.join(f"w{i}")
    for i in range(7):
        machine.lose(f"w{i}", died=True)
    assert formed(machine.join("w7", 5)).size == 1


def test_who_cannot_get_ready_before_the_first_world_is_left_out_as_long_as_enough_can() -> None:
    machine = Machine(min_workers=2, max_workers=3, expects=3)
    for name in "abc":
        machine.tell(Arrived(name))
    assert machine.tell(Unfit("b", "no such file", machine.now)) == []
    machine.join("a")
    machine.join("c")
    assert formed(machine.wait(2.5)).size == 2

    machine = Machine(min_workers=2, max_workers=3, expects=3)
    machine.join("a")
    assert machine.tell(Unfit("b", "no such file", machine.now)) == [], "the third is on its way"
    assert machine.tell(Unfit("c", "no such disk", machine.now)) == [Fail("no such file")]


def test_how_a_process_ended_that_got_ready_is_waited_for_and_is_what_ends_the_run() -> None:
    def began() -> Machine:
        machine = Machine(max_workers=1, expects=1)
        machine.tell(Arrived("a"))
        assert machine.lose("a", died=True) == []
        assert machine.wait(1.0) == []
        return machine

    def ended(commands: list[Command], how: str) -> None:
        text = f"worker a was lost while it got ready: {how}; the output has what it printed"
        assert commands == [Dropped(Member("a", ""), f"while it got ready: {how}"), Fail(text)]

    ended(began().lose("a", died=True, dead=True, reason="process died: exit code 7"), "process died: exit code 7")
    ended(began().lose("a", reason="its node is gone"), "its node is gone")
    ended(began().wait(1.5), "connection lost")

    machine = began()
    machine.tell(Arrived("a"))
    assert machine.wait(5.0) == []
    assert formed(machine.join("a")).size == 1


def test_on_a_cluster_all_are_tried_twice_and_nobody_who_gets_ready_is_given_up() -> None:
    machine = Machine(max_workers=2)
    for i in range(2):
        assert machine.tell(Unfit(f"w{i}", "no such file", machine.now)) == []
    machine.tell(Arrived("slow"))
    for i in range(2, 9):
        assert machine.tell(Unfit(f"w{i}", "no such file", machine.now)) == []
    commands = machine.lose("slow", died=True, dead=True, reason="process died: exit code 1")
    assert commands == [
        Dropped(Member("slow", ""), "while it got ready: process died: exit code 1"),
        Fail("no such file"),
    ]

    machine = Machine(max_workers=1)
    assert machine.tell(Unfit("a", "no such file", machine.now)) == [Fail("no such file")]

    machine = Machine(min_workers=2, max_workers=2)
    machine.join("a")
    machine.join("b")
    machine.tell(Recorded(3))
    machine.lose("a")
    machine.join("b", 3)
    for i in range(9):
        assert machine.tell(Unfit(f"w{i}", "no such file", machine.now)) == [], "b holds the state, and is parked"


def test_what_a_newcomer_raises_before_its_first_step_is_its_own() -> None:
    def newcomer(*, fresh: bool = True, final: bool = True) -> tuple[Machine, list[Command]]:
        machine = Machine(max_workers=3)
        machine.join("a")
        machine.join("b")
        machine.wait(2.5)
        machine.join("c")
        machine.wait(1.5)
        back(machine, 5, "a", "b")
        assert machine.members == ["a", "b", "c"]
        return machine, machine.tell(Unable("c", "no such key\n...", fresh, final, machine.now))

    machine, (refused, broken) = newcomer()
    assert refused == Refuse("c", "it failed before its first step")
    assert isinstance(broken, Break)
    assert broken.reason == "left out, since it failed before its first step: no such key"
    assert formed(back(machine, 5, "a", "b")).size == 2
    assert ask_again_s(machine.state, machine.now) > 0
    assert newcomer(fresh=False)[1] == [Fail("no such key\n...")]

    machine = three()
    assert machine.tell(Unable("a", "no checkpoint", True, True, machine.now)) == [Fail("no checkpoint")]
    machine = three(expects=3)
    for name in "ab":
        assert machine.tell(Unable(name, "other data", True, False, machine.now))[0].member_id == name
    assert machine.tell(Unable("c", "other data", True, False, machine.now))[-1] == Fail("other data")


@given(st.data())
def test_a_run_in_which_no_step_is_done_ends_whatever_happens(data: st.DataObject) -> None:
    """Worlds break by errors anywhere, for no reason that is known, or since a process died and is replaced."""
    size, least = data.draw(st.integers(1, 4), "workers"), 1
    machine = Machine(min_workers=least, max_workers=size, lease_s=1.0, max_failures=data.draw(st.integers(0, 4)))
    count = size
    for i in range(size):
        machine.join(f"w{i}", 5)
    for _ in range(200):
        if machine.state.phase is Phase.GATHERING:
            machine.wait(3)
        if machine.state.phase is Phase.ENDED:
            return
        assert machine.state.world is not None
        what = data.draw(st.sampled_from(["error", "silent", "death"]), "what")
        members = machine.members
        one = members[data.draw(st.integers(0, len(members) - 1), "who")]
        if what == "error":
            machine.join(one, 5, failure=error(5, data.draw(st.integers(-1, 3), "microbatch")))
        elif what == "silent":
            machine.join(one, 5, broke="reset")
        else:
            machine.lose(one, dead=True, died=True)
            machine.join(f"w{count}")
            count += 1
        for name in members:
            if name != one and machine.state.phase is Phase.BROKEN:
                machine.join(name, 5)
        machine.wait(2)
    pytest.fail("it goes on for ever")


def test_an_error_of_all_ends_the_run_when_they_have_saved() -> None:
    machine = three(max_failures=0)
    for name in "abc":
        commands = machine.join(name, 5, failure=Failure("ValueError", 6, ord(name), f"boom in {name}"))
    assert commands[1:] == [Form(machine.state.world, "boom in a")]
    assert machine.members == ["a", "b", "c"]


def test_an_error_in_the_first_step_leaves_nothing_to_save() -> None:
    machine = Machine(max_workers=1, max_failures=0)
    machine.join("a")
    assert machine.join("a", 0, failure=Failure("ValueError", 0, 3, "boom"))[-1] == Fail("boom")


def test_what_all_hold_is_saved_by_all_before_an_error_ends_the_run_and_by_one_where_too_few_are_left() -> None:
    machine = three(min_workers=2, max_failures=0)
    machine.join("b", 5, failure=Failure("ValueError", 5, 3, "boom"))
    machine.join("a", 5)
    last = machine.join("c", 5)
    assert last == [Form(machine.state.world, "boom")]
    assert machine.members == ["a", "b", "c"]
    assert machine.join("d") == [], "nobody is taken in any more"

    machine.lose("a")
    machine.lose("b")
    machine.lose("d")
    (given_up,) = machine.join("c", 5)
    assert given_up == GiveUp(Member("c", "node-c"), "boom", "failed")


def test_a_successor_without_a_common_member_waits_out_the_lease_unless_all_are_known_dead() -> None:
    for dead in (False, True):
        machine = Machine(max_workers=1, lease_s=30.0)
        machine.join("a")
        machine.lose("a", dead=dead)
        commands = machine.join("b")
        assert any(isinstance(c, Form) for c in commands) == dead
        if not dead:
            assert formed(machine.wait(30.1)).size == 1


def test_no_worker_is_left_with_a_batch_cut_too_coarsely_to_give_its_state_to_another() -> None:
    machine = Machine(max_workers=1, microbatches=1)
    machine.join("old")
    machine.tell(Notice("node-old", machine.now + 60, machine.now))
    assert machine.join("new") == []  # a world of two would leave one without a microbatch
    (save,) = machine.wait(53)
    assert isinstance(save, SaveNow)
    machine.lose("old", dead=True)
    assert machine.members == ["new"]


def rebuilding(**limits: object) -> Machine:
    """A restarted server whose controller expects a, b and c."""
    machine = Machine(**limits)
    machine.state = replace(machine.state, phase=Phase.REBUILDING, n=1004)
    assert machine.tell(Expected(frozenset("abc"), machine.now)) == []
    return machine


def register(machine: Machine, name: str, rank: int, n: int = 4, size: int = 3) -> list[Command]:
    return machine.tell(Registered(Member(name, f"node-{name}"), Generation(1, n), rank, size, machine.now))


def test_a_restarted_server_goes_on_with_the_world_that_everyone_is_in() -> None:
    machine = rebuilding()
    assert register(machine, "c", 2) == register(machine, "a", 0) == []
    (rebuilt,) = register(machine, "b", 1)
    assert isinstance(rebuilt, Rebuilt)
    assert rebuilt.world.generation == Generation(1, 4)
    assert machine.members == ["a", "b", "c"]
    assert machine.state.phase is Phase.RUNNING


def test_a_restarted_server_breaks_a_world_that_lost_a_member_meanwhile() -> None:
    machine = rebuilding()
    register(machine, "a", 0)
    register(machine, "c", 2)
    rebuilt, broken = machine.lose("b", dead=True)
    assert isinstance(rebuilt, Rebuilt)
    assert isinstance(broken, Break)
    machine.join("a", 7)
    assert formed(machine.join("c", 7)).generation == Generation(1, 1005)


def test_a_restarted_server_waits_for_the_last_who_holds_the_state() -> None:
    machine = rebuilding()
    for rank, name in enumerate("abc"):
        register(machine, name, rank)
    for name in "bc":
        machine.lose(name, dead=True)
    assert machine.join("new") == []
    assert machine.wait(40) == [], "a is only slow to answer"
    assert formed(machine.join("a", 7)).ids == {"a", "new"}


def test_a_restarted_server_takes_in_who_had_left_its_broken_world_already() -> None:
    machine = rebuilding()
    machine.join("a", 7)
    machine.join("b", 7)
    *_, broken = register(machine, "c", 2)
    assert isinstance(broken, Break)
    assert formed(machine.join("c", 7)).size == 3


def test_a_restarted_server_refuses_who_is_in_an_older_world_or_unknown_to_the_controller() -> None:
    machine = rebuilding()
    register(machine, "zombie", 0, n=9)
    register(machine, "a", 0, size=2)
    register(machine, "b", 1, n=3)
    refused = register(machine, "c", 1, size=2)
    assert [c.member_id for c in refused if isinstance(c, Refuse)] == ["b", "zombie"]
    assert [c.member.id for c in refused if isinstance(c, Dropped)] == ["b", "zombie"]
    assert machine.members == ["a", "c"]
    assert machine.state.phase is Phase.RUNNING


def test_a_restarted_server_waits_out_the_lease_for_who_does_not_come_back() -> None:
    machine = rebuilding(lease_s=30.0)
    register(machine, "a", 0)
    register(machine, "b", 1)
    assert machine.wait(29) == []
    *_, broken = machine.wait(1.1)
    assert isinstance(broken, Break)
    assert isinstance(register(machine, "c", 2)[0], Refuse)


def test_a_member_that_only_lost_its_connection_is_welcome() -> None:
    machine = three()
    world = machine.state.world
    assert world is not None
    assert register(machine, "b", 1, n=1) == [Welcome("b", world.generation, broken=False)]
    machine.lose("c")
    assert register(machine, "b", 1, n=1) == [Welcome("b", world.generation, broken=True)]
    assert isinstance(register(machine, "c", 2, n=1)[0], Refuse)


# ---- what people ask for ------------------------------------------------------------------------------------------


def test_scaled_down_a_world_lets_go_at_a_boundary_and_who_is_too_many_ends() -> None:
    machine = three(max_workers=3, spares=1)
    machine.join("spare")
    first = machine.tell(Scaled(1, machine.now))
    assert isinstance(first[-1], Leave)
    machine.join("a", 7)
    machine.join("b", 7)
    commands = machine.join("c", 7)
    (kept,) = formed(commands).members
    handed = [c.member.id for c in first + commands if isinstance(c, HandOver)]
    assert len(handed) == 2, "of four, one is in the world and one is a spare"
    assert {kept.id, *handed, *machine.state.waiting} == {"a", "b", "c", "spare"}
    assert machine.wait(60) == []
    (leave,) = machine.tell(Scaled(2, machine.now))
    assert isinstance(leave, Leave), "it is taken in again when there is room"


def test_who_yields_keeps_no_spares_and_grows_again_to_what_it_was_given_meanwhile() -> None:
    machine = three(max_workers=3, spares=1)
    machine.join("spare")
    first = machine.tell(Yielded(1, machine.now))
    assert isinstance(first[-1], Leave)
    assert machine.tell(Scaled(2, machine.now)) == []
    machine.join("a", 7)
    machine.join("b", 7)
    commands = machine.join("c", 7)
    assert formed(commands).size == 1
    assert len([c for c in first + commands if isinstance(c, HandOver)]) == 3
    assert machine.join("e") == [HandOver(Member("e", "node-e"))]
    machine.tell(Yielded(None, machine.now))
    (leave,) = machine.join("f")
    assert isinstance(leave, Leave), "2 is the most that it was given"
    assert machine.state.limits.max_workers == 2


def test_who_is_parked_and_yields_all_saves_first_and_goes_on_with_others() -> None:
    machine = three(min_workers=3)
    machine.lose("b")
    machine.join("a", 7)
    machine.join("c", 8)
    assert machine.tell(Yielded(0, machine.now)) == [SaveAlone(Member("c", "node-c"))]
    assert machine.wait(5) == []
    _, again = machine.lose("c", dead=True)  # it died before it had saved
    assert again == SaveAlone(Member("a", "node-a"))
    assert machine.tell(SavedAlone(6, machine.now)) == [], "that is not what it holds: it could not be saved"
    assert machine.tell(SavedAlone(7, machine.now)) == [HandOver(Member("a", "node-a"))]
    assert not holds_state(machine.state)
    machine.tell(Yielded(None, machine.now))
    machine.join("d")
    machine.join("e")
    assert isinstance(machine.join("a", 7)[0], Refuse)
    assert machine.join("f") == [], "b may not know yet that its world went on without it"
    assert formed(machine.wait(30)).size == 3


def test_who_trains_does_not_yield_more_than_it_can_spare() -> None:
    machine = three(min_workers=2)
    (leave,) = machine.tell(Yielded(0, machine.now))
    assert isinstance(leave, Leave)
    machine.join("a", 7)
    machine.join("b", 7)
    assert formed(machine.join("c", 7)).size == 2

    machine = three(min_workers=3)
    assert machine.tell(Yielded(0, machine.now)) == []
    machine.lose("b", dead=True)
    machine.join("a", 7)
    machine.join("c", 7)
    (save,) = machine.wait(0.1)
    assert isinstance(save, SaveAlone)
    assert [c for c in machine.join("d") if isinstance(c, Form)], "enough are there again: what is saved is not needed"
    assert machine.tell(SavedAlone(7, machine.now)) == []


def test_scaled_down_whole_nodes_stay_whoever_comes_back_first() -> None:
    machine = Machine(max_workers=6)
    for i, node in enumerate(("x", "y", "y", "z", "z", "z")):
        machine.join(f"w{i}", node=node)
    machine.tell(Scaled(3, machine.now))
    for i in (0, 1, 3, 2, 4):
        machine.now += 0.1
        machine.join(f"w{i}", 7, node="xyyzzz"[i])
    formed(machine.join("w5", 7, node="z"))
    assert machine.members == ["w3", "w4", "w5"]


def test_scaled_up_a_world_takes_in_who_comes() -> None:
    machine = three(max_workers=3)
    assert machine.join("d") == []
    (leave,) = machine.tell(Scaled(4, machine.now))
    assert isinstance(leave, Leave)


def test_a_drained_worker_hands_over_at_once_or_when_another_came() -> None:
    machine = three()
    (leave,) = machine.tell(Drained("b", machine.now, machine.now))
    assert isinstance(leave, Leave)
    machine.join("a", 7)
    machine.join("b", 7)
    form, hand = machine.join("c", 7)
    assert {m.id for m in formed([form]).members} == {"a", "c"}
    assert hand == HandOver(Member("b", "node-b"))
    assert isinstance(machine.join("b", 7)[0], Refuse)

    machine = three()
    machine.tell(Scaled(3, machine.now))
    assert machine.tell(Drained("b", machine.now + 60, machine.now)) == []
    assert machine.wait(40) == []
    (leave,) = machine.join("d")
    assert isinstance(leave, Leave), "it is not one too many"


def test_a_drained_worker_that_cannot_be_spared_stays_until_another_came_and_a_spare_ends_at_once() -> None:
    machine = three(min_workers=3)
    (save,) = machine.tell(Drained("b", machine.now, machine.now))
    assert isinstance(save, SaveNow)
    assert machine.wait(60) == []
    (leave,) = machine.join("d")
    assert isinstance(leave, Leave)

    machine = three()
    machine.join("spare")
    assert machine.tell(Drained("spare", machine.now, machine.now)) == [HandOver(Member("spare", "node-spare"))]


def test_a_parked_run_is_stopped_by_its_newest_worker_and_one_without_a_world_at_once() -> None:
    machine = three(min_workers=3)
    machine.lose("b")
    machine.join("a", 7)
    machine.join("c", 8)
    assert machine.tell(Stopped("enough", machine.now)) == [GiveUp(Member("c", "node-c"), "enough", "stopped")]
    assert machine.lose("c") == [GiveUp(Member("a", "node-a"), "enough", "stopped")]

    machine = Machine(min_workers=2)
    machine.join("a")
    assert machine.tell(Stopped("enough", machine.now)) == [GiveUp(None, "enough", "stopped")]

    machine = three()
    assert machine.tell(Stopped("enough", machine.now)) == [], "who trains is told by the wish"


# ---- cells --------------------------------------------------------------------------------------------------------


def cells_of_two(**limits: object) -> Machine:
    """Two cells, on the nodes a and b."""
    machine = Machine(**{"max_workers": 4, "cell_size": 2, "cut": True, "microbatches": 8, **limits})
    for name in ("a1", "a2", "b1", "b2"):
        machine.join(name, node=name[0])
    assert machine.members == ["a1", "a2", "b1", "b2"]
    return machine


def test_a_world_forms_of_whole_cells_and_who_fills_none_waits() -> None:
    machine = Machine(max_workers=4, cell_size=2)
    for name, node in (("a1", "a"), ("b1", "b"), ("c1", "c"), ("b2", "b")):
        machine.join(name, node=node)
    assert formed(machine.wait(3)).ids == {"b1", "b2"}
    assert set(machine.state.waiting) == {"a1", "c1"}


def test_workers_that_fill_no_cell_are_too_few_for_a_world() -> None:
    machine = Machine(max_workers=4, cell_size=2)
    for node in "abc":
        machine.join(f"{node}1", node=node)
    assert machine.wait(31) == [Park(0, 1, 2)]
    assert machine.join("a2", node="a") == []
    assert formed(machine.wait(3)).ids == {"a1", "a2"}


def test_the_mate_of_a_lost_worker_stands_by_in_the_next_world_and_a_spare_of_its_node_makes_a_cell_with_it() -> None:
    machine = cells_of_two()
    machine.lose("b1")
    machine.join("a1", 5, node="a")
    machine.join("a2", 5, node="a")
    assert formed(machine.join("b2", 5, node="b")).ids == {"a1", "a2", "b2"}
    assert machine.join("c1", node="c") == [], "it fills no cell"
    assert any(isinstance(command, Leave) for command in [*machine.join("b3", node="b"), *machine.wait(1.1)])
    for name in ("a1", "a2", "b2"):
        machine.join(name, 6, node=name[0])
    assert set(machine.members) == {"a1", "a2", "b2", "b3"}
    assert set(machine.state.waiting) == {"c1"}


def test_a_world_that_is_scaled_down_lets_whole_cells_go() -> None:
    machine = cells_of_two()
    assert any(isinstance(command, Leave) for command in machine.tell(Scaled(2, machine.now)))
    for name in ("a1", "b1", "b2", "a2"):
        machine.join(name, 5, node=name[0])
    assert machine.members in (["a1", "a2"], ["b1", "b2"])


def test_a_mate_that_stands_by_is_let_go_where_the_run_is_scaled_down() -> None:
    machine = cells_of_two()
    machine.lose("b1")
    for name in ("a1", "a2", "b2"):
        machine.join(name, 5, node=name[0])
    assert machine.members == ["a1", "a2", "b2"]
    assert any(isinstance(command, Leave) for command in machine.tell(Scaled(2, machine.now)))
    for name in ("a1", "a2", "b2"):
        machine.join(name, 6, node=name[0])
    assert machine.members == ["a1", "a2"]


def test_a_cell_that_would_not_lower_the_rounds_waits() -> None:
    machine = cells_of_two(max_workers=8, microbatches=2)
    machine.join("c1", node="c")
    assert machine.join("c2", node="c") == machine.wait(5) == []


# ---- sizes --------------------------------------------------------------------------------------------------------


def rounds(microbatches: int, size: int) -> int:
    return -(-microbatches // size)


@given(st.integers(1, 200), st.integers(1, 200))
def test_the_helpful_size_has_the_fewest_rounds_and_no_worker_too_many(microbatches: int, most: int) -> None:
    size = helpful_size(microbatches, most)
    assert 1 <= size <= min(most, microbatches)
    assert rounds(microbatches, size) == rounds(microbatches, most)
    assert size == 1 or rounds(microbatches, size - 1) > rounds(microbatches, size)


@given(st.integers(1, 200), st.integers(1, 60), st.integers(1, 60), st.integers(1, 8))
def test_the_helpful_size_of_cells_is_that_of_workers_times_their_size(
    v: int, most: int, least: int, cell: int
) -> None:
    assert helpful_size(v, most * cell, least * cell, cell) == helpful_size(v, most, least) * cell
    assert helpful_size(v, most * cell + cell - 1, least * cell, cell) == helpful_size(v, most, least) * cell


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 6))
def test_the_helpful_size_of_pipelines_has_the_fewest_rounds_and_full_pipelines(v: int, most: int, stages: int) -> None:
    assume(v >= pipelines(most, stages)[0])
    size = helpful_size(v, most, stages=stages)
    count, each = pipelines(size, stages)
    assert size <= most
    assert rounds(v, count) == rounds(v, pipelines(most, stages)[0])
    assert count == 1 or rounds(v, count - 1) > rounds(v, count)
    assert size == count * each, "none is idle"


@given(st.data())
def test_the_fewest_that_a_run_trains_with_are_asked_for_and_awaited_even_if_the_last_does_not_help(
    data: st.DataObject,
) -> None:
    microbatches = data.draw(st.integers(1, 40), "V")
    most = data.draw(st.integers(1, microbatches), "max workers")
    least, spares = data.draw(st.integers(1, most), "min workers"), data.draw(st.integers(0, 3), "spares")
    plan = GroupPlan("", "", most, spares, microbatches, {}, "", Terms("run", 0, 0.0, "cpu", least, 1.0))
    workers = plan.want(most) - spares
    assert least <= workers <= most
    assert rounds(microbatches, workers) == rounds(microbatches, most)
    assert workers == least or rounds(microbatches, workers - 1) > rounds(microbatches, workers)

    machine = Machine(min_workers=least, max_workers=most, microbatches=microbatches, spares=spares)
    for i in range(workers - 1):
        assert machine.join(f"w{i:02}") == [], "neither formed with too few nor parked: the others are on their way"
    assert formed(machine.join("last")).size == workers
    machine.tell(Scaled(most, machine.now))
    assert machine.state.keep == plan.want(most)


@given(st.data())
def test_a_world_is_left_only_for_one_with_fewer_rounds(data: st.DataObject) -> None:
    microbatches = data.draw(st.integers(1, 40), "V")
    most = data.draw(st.integers(1, microbatches), "max workers")
    first, more = data.draw(st.integers(1, most), "first"), data.draw(st.integers(1, 12), "newcomers")
    machine = Machine(max_workers=most, microbatches=microbatches)
    for i in range(first):
        machine.join(f"a{i:02}")
    machine.wait(2.1)
    size = len(machine.members)
    for i in range(more):
        machine.join(f"b{i:02}")
    machine.wait(1.1)
    left = machine.state.phase is Phase.LEAVING
    assert left == (rounds(microbatches, min(first + more, most)) < rounds(microbatches, size))
    if left:
        for member in machine.members:
            machine.join(member, 5)
        assert rounds(microbatches, len(machine.members)) == rounds(microbatches, min(first + more, most))


def test_an_error_in_a_world_that_is_to_be_left_breaks_it_since_others_may_wait_for_that_worker() -> None:
    machine = Machine(max_workers=4)
    for name in "abc":
        machine.join(name)
    machine.wait(2.1)
    machine.join("d")
    machine.wait(1.1)
    assert machine.state.phase is Phase.LEAVING
    machine.join("a", 5)

    commands = machine.join("b", 5, failure=Failure("ValueError", 6, 3, "boom"))

    assert [type(c) for c in commands] == [Failed, Break]
    assert machine.state.phase is Phase.BROKEN
    assert formed(machine.join("c", 5)).size == 4


def test_survivors_stay_although_fewer_would_do_and_who_would_not_help_waits() -> None:
    machine = Machine(max_workers=16, microbatches=64)
    for i in range(16):
        machine.join(f"w{i:02}")
    machine.lose("w00")
    assert machine.state.phase is Phase.BROKEN
    for i in range(1, 16):
        machine.join(f"w{i:02}", 7)
    assert len(machine.members) == 15  # 13 would need as many rounds
    machine.lose("w01")
    for i in range(2, 16):
        machine.join(f"w{i:02}", 7)
    assert machine.join("new") == []  # 15 need as many rounds as 14
    assert machine.wait(60) == []
    (leave,) = machine.join("newer")
    assert isinstance(leave, Leave)


def test_who_cannot_get_ready_is_not_replaced_at_once_for_ever() -> None:
    machine = three()
    seconds = []
    for i in range(9):
        machine.tell(Unfit(f"broken{i}", "no such file", machine.now))
        seconds.append(ask_again_s(machine.state, machine.now))
    assert seconds == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert ask_again_s(machine.state, machine.now + 45) == 15
    machine.lose("c")
    machine.join("d")
    machine.join("a", 7)
    machine.join("b", 7)
    assert machine.members == ["a", "b", "d"]
    assert ask_again_s(machine.state, machine.now) == 0


def test_who_is_done_may_leave() -> None:
    machine = three()
    machine.tell(Done("b"))
    assert machine.lose("b") == []


@pytest.mark.parametrize("size", [8, 512, 4096])
def test_a_large_world_forms_in_under_a_second_of_its_time(size: int) -> None:
    for figure in forming.seconds(size):
        assert figure < 1.0


# ---- the model ----------------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """A worker as it really is. `lineage`: the generation in which each step of its state was applied."""

    member: Member
    claim: int = 1
    lineage: list[Generation] = field(default_factory=list)
    holds: bool = False
    world: World | None = None
    joining: bool = True  # it has left its world, or had none yet, and waits for one
    entered: bool = False  # it has entered the fence of its next step, and not passed it
    agreed: Generation = field(
        default_factory=lambda: Generation(0, 0)
    )  # the newest world that began with its state, or with one from which it came to it
    alive: bool = True
    told_to_go: bool = False
    fresh: bool = True  # it has done no step itself
    away_since: float | None = None  # the server was restarted, and it has not connected again

    @property
    def applied(self) -> int:
        return len(self.lineage) if self.holds else -1

    @property
    def standing(self) -> Standing:
        """What it brings into a world."""
        return Standing(self.applied, int(self.entered), self.agreed.epoch, self.agreed.n)


class Cluster(RuleBasedStateMachine):
    """Workers join, step, die, are cut off, hang, raise and drain in any order; the server is restarted, the run
    taken over."""

    @initialize(
        least=st.integers(1, 3),
        most=st.integers(1, 5),
        more=st.integers(0, 5),
        first=st.integers(0, 6),
        cell=st.sampled_from([1, 1, 2]),
    )
    def start(self, least: int, most: int, more: int, first: int, cell: int) -> None:
        """A run with workers that have trained already: what is hard begins there."""
        least = min(least, most)
        self.limits = Limits(
            min_workers=least * cell,
            max_workers=most * cell,
            microbatches=most + more,
            cell_size=cell,
            max_failures=10**6,
            cut=more % 2 == 1 or cell > 1,
        )
        self.wished, self.ceiling = self.limits.max_workers, None
        self.state, self.now = State(epoch=1, limits=self.limits), 0.0
        self.workers: dict[str, Worker] = {}
        self.worlds: dict[Generation, World] = {}
        self.recorded_gone: set[str] = set()
        self.saving: Worker | None = None
        self.count = 0
        for node in range(first):
            self.join(node % (4 // cell))
        self.tick(3.0)
        if self.trainable():
            self.train(0, 0, True)

    # -- what happens

    def tell(self, event: Event) -> None:
        before = self.state.world
        self.state, commands = advance(self.state, event)
        for command in commands:
            if isinstance(command, Form):
                self.check_quiet(command.world, before)
                self.form(command.world)
            elif isinstance(command, Refuse):
                self.workers[command.member_id].told_to_go = True
            elif isinstance(command, (HandOver, Dropped)):
                self.workers[command.member.id].told_to_go = True
                self.recorded_gone.add(command.member.id)
            elif isinstance(command, Break) and command.lost is not None:
                self.recorded_gone.add(command.lost.id)
            elif isinstance(command, SaveAlone):
                assert not self.in_world(self.workers[command.saver.id])
                self.saving = self.workers[command.saver.id]

    def form(self, world: World) -> None:
        assert world.generation not in self.worlds, "two worlds of one generation"
        assert all(world.generation > g for g in self.worlds), "generations only grow"
        assert self.limits.microbatches is not None
        cell = self.limits.cell_size
        working = in_cells(world.members, cell)
        most = (
            max(2, self.state.limits.max_workers) if cell == 1 else self.state.limits.max_workers + self.giving(world)
        )
        assert len(world.ids) == world.size
        assert working <= min(most, self.limits.microbatches * cell)
        assert working >= self.limits.min_workers
        nodes = [m.node for m in world.members]
        assert lay_out(nodes, "ddp", None, cell).size == working, "workers and server count the same cells"
        for m in world.members:  # who fills no cell gives or keeps a part of the state
            alone = nodes.count(m.node) < cell
            assert not alone or self.workers[m.id].applied >= 0, "a newcomer that fills no cell is in a world"
        self.worlds[world.generation] = world
        members = [self.workers[m.id] for m in world.members]
        assert all(w.joining for w in members), "a member is in two live worlds"
        assert not any(w.told_to_go for w in members), "who was given up comes back"
        plan = decide([w.standing for w in members], -1, fenced=self.limits.cut)
        for w, applies in zip(members, plan.applies, strict=True):  # roll forward what was prepared
            if applies:
                w.lineage.append(w.agreed)
        newest = max(w.applied for w in members)
        assert max(plan.held) == newest, "a step was lost"
        giver = next(w for w, step in zip(members, plan.held, strict=True) if step == newest)
        for w, step in zip(members, plan.held, strict=True):
            if step != newest or not w.holds:
                w.lineage, w.holds = list(giver.lineage), True
            assert w.lineage == giver.lineage, "members go on from different states"
            w.world, w.agreed, w.entered, w.joining = world, world.generation, False, False

    def giving(self, world: World) -> int:
        """How many of a world's members may be there only since nobody else holds the newest state."""
        newest = max(self.workers[m.id].applied for m in world.members)
        return sum(self.workers[m.id].applied == newest for m in world.members)

    def check_quiet(self, world: World, before: World | None) -> None:
        """Nobody waits for who is quiet, but to get from it what no other one has."""
        members = [self.workers[m.id] for m in world.members]
        newest = max((w.applied for w in members if w.member.id not in self.state.quiet), default=-1)
        for w in members:
            part = self.limits.cut and before is not None and w.member.id in before.ids
            assert w.member.id not in self.state.quiet or part or w.applied > newest

    def in_world(self, w: Worker) -> bool:
        return w.alive and not w.told_to_go and w.world is not None and not w.joining

    def choose(self, number: int, among: list[Worker]) -> Worker:
        return among[number % len(among)]

    def living(self) -> list[Worker]:
        return [w for w in self.workers.values() if w.alive and not w.told_to_go]

    def connected(self) -> list[Worker]:
        return [w for w in self.living() if w.away_since is None]

    def say_join(self, w: Worker, failure: Failure | None = None) -> None:
        w.joining = True
        if w.away_since is None:
            self.tell(Joined(w.member, self.now, w.applied, failure))

    @rule(node=st.integers(0, 3))
    @precondition(lambda self: len(self.workers) < 14)
    def join(self, node: int) -> None:
        self.count += 1
        member = Member(f"w{self.count:02}", f"n{node}", self.count)
        self.workers[member.id] = Worker(member, self.state.epoch)
        self.say_join(self.workers[member.id])

    def trainable(self) -> list[World]:
        """Worlds whose members all take part, whether or not the server still counts on them."""
        found = {w.world.generation: w.world for w in self.workers.values() if w.world is not None}
        return [
            world
            for world in found.values()
            if all(w.alive and not w.joining and w.world == world for w in self.members_of(world))
        ]

    def members_of(self, world: World) -> list[Worker]:
        return [self.workers[m.id] for m in world.members]

    @rule(number=st.integers(0, 99), passed=st.integers(0, 5), fence=st.booleans())
    @precondition(lambda self: bool(self.trainable()))
    def train(self, number: int, passed: int, fence: bool) -> None:
        """All members enter the fence of a step, and some of them have passed it already. Or there is none: all gave
        their gradients, and some of them have the sum of all, and have applied it."""
        among = self.trainable()
        members = self.members_of(among[number % len(among)])
        newest = max(w.applied for w in members)
        passing = [w for w in members if w.applied < newest]  # they pass it before another one begins
        if not passing:
            for w in members:
                w.entered = fence or self.limits.cut
            passing = members[: passed or len(members)]
        for w in passing:
            assert w.world is not None
            w.lineage.append(w.world.generation)
            w.entered, w.fresh = False, False
        if self.state.world == members[0].world:
            self.tell(Recorded(max(w.applied for w in members)))

    @rule(number=st.integers(0, 99), dead=st.booleans(), noticed=st.booleans())
    @precondition(lambda self: bool(self.living()))
    def kill(self, number: int, dead: bool, noticed: bool) -> None:
        w = self.choose(number, self.living())
        w.alive = False
        if noticed and w.away_since is None:
            self.tell(Lost(w.member.id, self.now, dead=dead, died=True))

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: any(not w.alive for w in self.workers.values()))
    def notice_death(self, number: int) -> None:
        w = self.choose(number, [w for w in self.workers.values() if not w.alive])
        self.tell(Lost(w.member.id, self.now, dead=True, died=True))

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: bool(self.connected()))
    def cut_off(self, number: int) -> None:
        """Its connection is lost, but it goes on: a zombie."""
        w = self.choose(number, self.connected())
        known = w.member.id in self.state.lost_silently
        self.tell(Lost(w.member.id, self.now, "silent", silent=True))
        assert w.told_to_go or known or w.member.id in self.state.lost_silently or w.member.id in self.state.gone
        w.told_to_go |= w.member.id not in self.state.lost_silently

    def must_leave(self, w: Worker) -> bool:
        """It was told so, or another member left, so that its collectives fail."""
        if not self.in_world(w):
            return False
        told = w.away_since is None and self.state.phase is not Phase.REBUILDING
        others = [self.workers[i] for i in w.world.ids] if w.world else []
        return (told and (self.state.world != w.world or self.state.phase is not Phase.RUNNING)) or any(
            not o.alive or o.joining or o.world != w.world for o in others
        )

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: any(map(self.must_leave, self.workers.values())))
    def join_again(self, number: int) -> None:
        self.say_join(self.choose(number, [w for w in self.workers.values() if self.must_leave(w)]))

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: any(map(self.in_world, self.workers.values())))
    def raise_error(self, number: int) -> None:
        w = self.choose(number, [w for w in self.workers.values() if self.in_world(w)])
        self.say_join(w, Failure("ValueError", w.applied, 0, "boom"))

    def newcomers(self) -> list[Worker]:
        """Of the world that the server knows, beside others that have trained: they may not be able to."""
        inside = [w for w in self.connected() if self.in_world(w) and w.world == self.state.world]
        return [w for w in inside if w.fresh] if self.state.veterans & {w.member.id for w in inside} else []

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: self.state.phase in (Phase.RUNNING, Phase.LEAVING) and bool(self.newcomers()))
    def fail_as_newcomer(self, number: int) -> None:
        w = self.choose(number, self.newcomers())
        others = self.state.veterans - {w.member.id} if self.state.failing is None else set()
        self.tell(Unable(w.member.id, "boom", True, True, self.now))
        assert w.told_to_go or not others & present(self.state), "the run goes on without it"

    @rule(some=st.sets(st.integers(1, 14), max_size=6))
    @precondition(lambda self: bool(self.state.waiting) or bool(self.state.quiet))
    def hear(self, some: set[int]) -> None:
        """Those were heard that are not among these."""
        ids = {i for i, w in self.state.waiting.items() if w.member.local_index in some}
        self.tell(Quiet(frozenset(ids), self.now))

    @rule()
    @precondition(lambda self: self.state.world is not None)
    def stand_still(self) -> None:
        self.tell(Stalled("nobody moves", self.now))

    @rule()
    def sleep(self) -> None:
        self.tell(Slept(self.now))

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: bool(self.connected()))
    def acknowledge(self, number: int) -> None:
        self.tell(Acknowledged(self.choose(number, self.connected()).member.id, self.now))

    @rule(node=st.integers(0, 3), seconds=st.floats(0, 60))
    @precondition(lambda self: not self.state.notices)
    def drain(self, node: int, seconds: float) -> None:
        self.tell(Notice(f"n{node}", self.now + seconds, self.now))

    @rule(number=st.integers(0, 99), seconds=st.floats(0, 60))
    @precondition(lambda self: bool(self.connected()) and len(self.state.drained) < 2)
    def drain_worker(self, number: int, seconds: float) -> None:
        worker = self.choose(number, self.connected()).member.id
        self.tell(Drained(worker, self.now + seconds, self.now))

    @rule(most=st.integers(1, 5))
    def scale(self, most: int) -> None:
        assert self.limits.microbatches is not None
        self.wished = min(max(most, self.limits.min_workers), self.limits.microbatches)
        self.limits = replace(self.limits, max_workers=min(self.wished, self.ceiling or self.wished))
        self.tell(Scaled(self.wished, self.now))

    @rule(to=st.sampled_from(["none", "least", "all"]))
    def yield_to_others(self, to: str) -> None:
        """All are yielded by who is parked; the controller may be late to see that it is not any more."""
        least = self.limits.min_workers
        self.ceiling = None if to == "none" else least
        self.limits = replace(self.limits, max_workers=min(self.wished, self.ceiling or self.wished))
        self.tell(Yielded(0 if to == "all" else self.ceiling, self.now))

    @rule()
    @precondition(lambda self: self.saving is not None and self.saving.alive)
    def save_alone(self) -> None:
        """Whoever is let go then holds nothing newer."""
        assert self.saving is not None
        saved, self.saving = self.saving, None
        staying = self.living()
        self.tell(SavedAlone(saved.applied, self.now))
        assert all(w.applied <= saved.applied for w in staying if w.told_to_go), "state is lost"

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.5, 3.0, 40.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds
        for w in self.living():
            if w.away_since is not None and self.now - w.away_since >= self.limits.lease_s:
                w.alive = False  # its own lease is over
        connected, rebuilding = self.connected(), self.state.phase is Phase.REBUILDING
        lost_silently = self.state.lost_silently
        staying = [w for w in connected if going(self.state, w.member) is None and w.member.id not in lost_silently]
        self.tell(Tick(self.now))
        if not rebuilding and self.state.keep is None and self.state.ceiling is None:
            assert not any(w.told_to_go for w in staying), "given up for nothing but time"

    @rule(tells=st.booleans(), back=st.sets(st.integers(1, 14), max_size=6))
    @precondition(lambda self: self.state.phase is not Phase.ENDED)
    def restart_server(self, tells: bool, back: set[int]) -> None:
        """The membership server is killed; another takes its place and knows what is in the ledger. Some are back
        before it hears from the controller."""
        newest = max((g.n for g in self.worlds if g.epoch == self.state.epoch), default=0)
        self.ceiling = None  # the controller says it again
        self.limits = replace(self.limits, max_workers=self.wished)
        self.state = State(
            epoch=self.state.epoch,
            limits=self.limits,
            phase=Phase.REBUILDING,
            n=newest + 1000,
            gone=frozenset(self.recorded_gone),
            broken_at=self.now,
        )
        for w in self.living():
            w.away_since = self.now if w.away_since is None else w.away_since
        for w in self.living():
            if w.member.local_index in back:
                self.say_hello(w)
        if tells and self.state.phase is Phase.REBUILDING:
            self.controller_tells()

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: any(w.away_since is not None for w in self.living()))
    def connect_again(self, number: int) -> None:
        self.say_hello(self.choose(number, [w for w in self.living() if w.away_since is not None]))

    def say_hello(self, w: Worker) -> None:
        w.away_since = None
        self.call(w)

    def call(self, w: Worker) -> None:
        if w.joining or w.world is None:
            self.tell(Joined(w.member, self.now, w.applied))
            return
        rank = w.world.rank_of(w.member.id)
        assert rank is not None
        self.tell(Registered(w.member, w.world.generation, rank, w.world.size, self.now))

    @rule()
    @precondition(lambda self: self.state.phase is Phase.REBUILDING)
    def controller_tells(self) -> None:
        self.tell(Expected(frozenset(w.member.id for w in self.living()), self.now))

    @rule()
    @precondition(lambda self: self.state.epoch < 3)
    def take_over(self) -> None:
        """Another driver claims the run: a new server, new workers, a higher epoch. The old ones are zombies."""
        for w in self.workers.values():
            w.told_to_go = True
        self.ceiling, self.limits = None, replace(self.limits, max_workers=self.wished)
        self.state = State(epoch=self.state.epoch + 1, limits=self.limits)

    @rule(number=st.integers(0, 99))
    @precondition(lambda self: any(w.told_to_go and w.alive for w in self.workers.values()))
    def zombie_calls(self, number: int) -> None:
        """Who was given up calls as if nothing had happened; it must not be let in."""
        w = self.choose(number, [w for w in self.workers.values() if w.told_to_go and w.alive])
        if w.claim != self.state.epoch and w.joining:
            return  # the new server does not know it, but neither does it know the new server
        self.call(w)

    # -- what must hold

    @invariant()
    def living_workers_agree_on_where_each_step_was_applied(self) -> None:
        if not hasattr(self, "workers"):
            return
        lineages = [w.lineage for w in self.living() if w.holds]
        longest = max(lineages, key=len, default=[])
        for lineage in lineages:  # without fences one who left may have applied a step that the others made again
            sure = len(lineage) if self.limits.cut else len(lineage) - 1
            assert lineage[:sure] == longest[:sure], "a step was applied in two worlds"

    @invariant()
    def no_member_is_in_two_live_worlds(self) -> None:
        if hasattr(self, "workers") and self.state.world is not None and self.state.phase is Phase.RUNNING:
            for member in self.state.world.members:
                assert member.id not in self.state.waiting

    def teardown(self) -> None:
        """When nothing more happens, every living worker that may stay is in the world, or would not help."""
        if not hasattr(self, "workers") or self.state.phase is Phase.ENDED or self.state.failing is not None:
            return
        for w in self.workers.values():
            if not w.alive or w.told_to_go:
                self.tell(Lost(w.member.id, self.now, dead=True))
        for w in self.living():
            if w.away_since is not None:
                self.say_hello(w)
        if self.state.phase is Phase.REBUILDING:
            self.controller_tells()
        self.tell(Quiet(frozenset(), self.now))
        for _ in range(12):
            for w in self.living():
                self.tell(Acknowledged(w.member.id, self.now))
                if self.must_leave(w):
                    self.say_join(w)
            self.tick(40.0)
        staying = [w for w in self.living() if going(self.state, w.member) is None]
        well = [w for w in staying if w.member.id not in self.state.faults.sick]
        cell = self.limits.cell_size

        def fill(some: list[Worker]) -> int:
            return in_cells([w.member for w in some], cell)

        staying = well if fill(well) >= self.limits.min_workers else staying
        if fill(staying) < self.limits.min_workers:
            return
        assert self.state.phase is Phase.RUNNING
        assert self.state.world is not None
        assert self.limits.microbatches is not None
        inside = self.state.world.ids & {w.member.id for w in staying}
        if not inside:  # a batch cut so coarsely leaves no second place, in which the state could be given
            assert self.limits.microbatches == 1
            return
        most = min(fill(staying), self.limits.max_workers) // cell
        working = fill([self.workers[i] for i in inside]) // cell
        assert rounds(self.limits.microbatches, working) == rounds(self.limits.microbatches, most)
        spares = [w for w in staying if w.member.id not in inside]
        assert all(w.member.id in self.state.waiting for w in spares)


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=examples(150, fresh=600), stateful_step_count=50, deadline=None)
