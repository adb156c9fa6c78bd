"""What becomes of a run that is driven, against workers, hosts and people that do anything. Starts no process."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elastic.membership.protocol import Close, Note, Wish
from elastic.run.course import END_S, MOST_STARTS, SAVE_S, Ask, Course, End, GiveUp, Over, Print, Seen, Start, decide

NEW = Course("run", "--run.name run")
DIED = Over("the controller died", again=True)
STUCK = "the controller did not answer"


def test_another_controller_takes_the_place_of_one_that_is_lost() -> None:
    course, actions = decide(NEW, Seen(worlds=1, over=DIED), 0.0)
    assert actions == [Ask(Note("controller_restarted", {"why": "the controller died"})), Start()]
    assert decide(course, Seen(worlds=1), 1.0)[1] == []


def test_the_run_ends_after_three_controllers_without_a_world_and_one_with_a_world_begins_anew() -> None:
    course, seen = NEW, Seen(over=DIED)
    for _ in range(MOST_STARTS - 1):
        course, actions = decide(course, seen, 0.0)
        assert actions[1:] == [Start()]
    again, actions = decide(course, replace(seen, worlds=1), 0.0)
    assert actions[1:] == [Start()]
    assert again.starts == 0
    course, actions = decide(course, seen, 0.0)
    why = "the controller died, 3 times before a first step; give --run.name run to go on from the newest checkpoint"
    assert actions == [Ask(Close("failed", why))]
    assert decide(course, seen, END_S)[1] == []
    assert decide(course, seen, END_S + 1)[1] == [GiveUp("the controller died")]


def test_workers_whose_controller_stands_still_save_before_they_end_with_it() -> None:
    seen = Seen(worlds=1, commits=2, silent=STUCK)
    course, actions = decide(NEW, seen, 0.0)
    assert actions == [Ask(Wish("save", STUCK))]
    assert decide(course, seen, SAVE_S)[1] == []
    assert decide(course, seen, SAVE_S + 1)[1] == [End()]
    assert decide(course, replace(seen, commits=3), 1.0)[1] == [End()]
    _, actions = decide(replace(NEW, worlds=1), seen, 0.0)
    assert actions == [End()], "those that it started last are in no world yet: there is nothing to save"


def test_the_first_signal_saves_and_ends_and_the_second_ends_at_once() -> None:
    running = Seen(signals=1, signal="SIGINT", worlds=1)
    course, actions = decide(NEW, running, 0.0)
    assert actions == [
        Ask(Wish("stop", "interrupted by SIGINT")),
        Print("SIGINT: saving and ending; once more ends at once"),
    ]
    assert decide(course, running, 1.0)[1] == []
    _, actions = decide(course, replace(running, signals=2), 2.0)
    assert actions == [Ask(Close("stopped", "interrupted twice, nothing saved since the newest checkpoint"))]
    _, actions = decide(NEW, replace(running, worlds=0), 0.0)
    assert actions == [Ask(Close("stopped", "interrupted by SIGINT before the first step"))]


def test_nobody_is_started_once_the_run_was_told_to_end() -> None:
    interrupted = Seen(signals=1, signal="SIGINT", worlds=1)
    course, _ = decide(NEW, interrupted, 0.0)
    course, actions = decide(course, replace(interrupted, over=DIED), 1.0)
    assert actions == [Ask(Close("stopped", "interrupted by SIGINT, and the controller died"))]
    assert decide(course, replace(interrupted, over=DIED), 2.0 + END_S)[1] == [GiveUp("the controller died")]


def test_workers_that_have_ended_for_good_end_the_run_soon() -> None:
    course, actions = decide(NEW, Seen(over=Over()), 0.0)
    assert actions == []
    assert decide(course, Seen(over=Over()), END_S + 1)[1] == [
        GiveUp("the workers of run run ended, but no result came")
    ]
    _, actions = decide(NEW, Seen(over=Over("a worker failed")), 0.0)
    assert actions == [Ask(Close("failed", "a worker failed"))]
    assert decide(NEW, Seen(ended=True, signals=2, over=DIED), 0.0) == (NEW, [])


# ---- anything may happen ---------------------------------------------------------------------------------------------


class Driven(RuleBasedStateMachine):
    """Workers form worlds, save, end and fail; their controller dies or stands still; signals come; the host ends the
    run when it is told to, or does not."""

    @initialize(host_ends=st.booleans(), saves=st.booleans())
    def start(self, host_ends: bool, saves: bool) -> None:
        self.course, self.seen, self.now = NEW, Seen(), 0.0
        self.host_ends, self.saves = host_ends, saves
        self.starts = 1  # since the newest world
        self.asked: list[object] = []
        self.given_up = False

    def turn(self, seconds: float = 0.1) -> None:
        if self.over:
            return
        self.now += seconds
        self.course, actions = decide(self.course, self.seen, self.now)
        for action in actions:
            match action:
                case Ask(Wish("save")):
                    assert self.seen.silent
                    self.asked.append("save")
                    if self.saves:
                        self.seen = replace(self.seen, commits=self.seen.commits + 1)
                case Ask(request):
                    self.asked.append(request)
                    if self.host_ends and isinstance(request, (Close, Wish)):
                        self.seen = replace(self.seen, ended=True)
                case Start():
                    assert self.seen.over is not None
                    assert not any(isinstance(asked, (Close, Wish)) for asked in self.asked), "it was told to end"
                    self.starts += 1
                    assert self.starts <= MOST_STARTS
                    self.seen = replace(self.seen, over=None, silent="")
                case End():
                    assert self.seen.silent
                    self.seen = replace(self.seen, over=DIED)
                case GiveUp():
                    self.given_up = True

    @property
    def over(self) -> bool:
        return self.seen.ended or self.given_up

    @precondition(lambda self: not self.over and self.seen.over is None)
    @rule()
    def a_world_is_formed(self) -> None:
        self.seen = replace(self.seen, worlds=self.seen.worlds + 1)
        self.starts = 0
        self.turn()

    @precondition(lambda self: not self.over and self.seen.over is None)
    @rule(over=st.sampled_from([DIED, DIED, DIED, Over(), Over("a worker failed")]))
    def the_workers_end(self, over: Over) -> None:
        self.seen = replace(self.seen, over=over)
        self.turn()

    @precondition(lambda self: not self.over and self.seen.over is None)
    @rule()
    def the_controller_stands_still(self) -> None:
        self.seen = replace(self.seen, silent=STUCK)
        self.turn()

    @precondition(lambda self: not self.over)
    @rule()
    def a_signal_comes(self) -> None:
        self.seen = replace(self.seen, signals=self.seen.signals + 1, signal="SIGTERM")
        self.turn()
        told = [asked for asked in self.asked if isinstance(asked, (Close, Wish))]
        assert told, "who interrupts is heard at once"
        assert self.seen.signals < 2 or isinstance(told[-1], Close)

    @rule(seconds=st.sampled_from([0.1, 1.0, SAVE_S + 1]))
    def time_passes(self, seconds: float) -> None:
        self.turn(seconds)

    @invariant()
    def nothing_waits_for_ever(self) -> None:
        """Where nothing else happens any more, workers that have ended or stand still are replaced, or the run ends."""
        course, seen, now, waited = self.course, self.seen, self.now, 0.0
        longest = SAVE_S + END_S + 5  # a turn of a second in which each begins, and each is over
        while not seen.ended and (seen.over is not None or seen.silent) and waited < longest:
            waited, now = waited + 1.0, now + 1.0
            course, actions = decide(course, seen, now)
            if any(isinstance(action, (Start, GiveUp)) for action in actions):
                return
            if End() in actions:
                seen = replace(seen, over=DIED)
        assert seen.ended or (seen.over is None and not seen.silent)


TestDriven = Driven.TestCase
