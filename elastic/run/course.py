"""What becomes of a run that is driven: who starts and ends its workers, how often, and how the run ends. Pure.

The workers of a run have one keeper: on Ray the controller, in plain processes the driver itself. Where a controller
ends, its workers end with it, and another one may take its place. The driver says what it sees, and carries out what
is decided.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from elastic.membership.protocol import Close, Note, Request, Wish

MOST_STARTS = 3
END_S = 30.0  # from the end of the workers to that of the run
SAVE_S = 60.0  # for a save before workers are ended


@dataclass(frozen=True)
class Over:
    """The workers have ended, all of them.

    Args:
        why: how, for people; empty where their part was over.
        again: others may be started in their place.
    """

    why: str = ""
    again: bool = False


@dataclass(frozen=True)
class Seen:
    """What the driver sees.

    Args:
        ended: the host has said how the run ended, or is gone for good.
        signals: that came so far, with the name of the newest.
        worlds: formed since the driver began.
        commits: checkpoints committed since then.
        silent: in what way the keeper of the workers stands still, if it does.
        over: how the workers that were started last ended, if they have.
    """

    ended: bool = False
    signals: int = 0
    signal: str = ""
    worlds: int = 0
    commits: int = 0
    silent: str = ""
    over: Over | None = None


@dataclass(frozen=True)
class Course:
    """How far it has come.

    Args:
        run: its name.
        resume: what to give the same command, for the run to go on.
        heeded: signals that were acted on.
        starts: of workers that formed no world, one after the other, up to those before the present ones.
        worlds: that there had been when the present workers were started.
        closing: the host was told to end the run.
        saving: when the workers were asked to save before they are ended, and the checkpoints until then.
        over_at: when the workers had ended for good.
    """

    run: str
    resume: str
    heeded: int = 0
    starts: int = 0
    worlds: int = 0
    closing: bool = False
    saving: tuple[float, int] | None = None
    over_at: float | None = None


# ---- what is to be done ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """Tell the host."""

    request: Request


@dataclass(frozen=True)
class Say:
    """Tell whoever reads the console."""

    text: str


@dataclass(frozen=True)
class Start:
    """Start workers once more."""


@dataclass(frozen=True)
class End:
    """End the workers, and whoever keeps them."""


@dataclass(frozen=True)
class GiveUp:
    """The host does not end the run: fail."""

    message: str


Action = Ask | Say | Start | End | GiveUp


def decide(course: Course, seen: Seen, now: float) -> tuple[Course, list[Action]]:
    """One turn of a driver. `now` is in monotonic seconds."""
    if seen.ended:
        return course, []
    course, actions = _heed(course, seen)
    if seen.over is not None:
        course, more = _after(seen.over, course, seen, now)
    elif seen.silent:
        course, more = _end_those_of_silent(course, seen, now)
    else:
        more = []
    return course, actions + more


def _heed(course: Course, seen: Seen) -> tuple[Course, list[Action]]:
    """The first signal saves and ends the run; one before the first step, and a second one, end it at once."""
    if seen.signals == course.heeded:
        return course, []
    course = replace(course, heeded=seen.signals)
    if seen.signals > 1:
        return _close(course, Close("stopped", "interrupted twice, nothing saved since the newest checkpoint"))
    if not seen.worlds:
        return _close(course, Close("stopped", f"interrupted by {seen.signal} before the first step"))
    stop = Wish("stop", f"interrupted by {seen.signal}")
    return course, [Ask(stop), Say(f"{seen.signal}: saving and ending; once more ends at once")]


def _close(course: Course, request: Close) -> tuple[Course, list[Action]]:
    return replace(course, closing=True), [Ask(request)]


def _after(over: Over, course: Course, seen: Seen, now: float) -> tuple[Course, list[Action]]:
    """The workers have ended: start others where that may help, or wait for the end of the run."""
    if course.over_at is not None:
        late = now - course.over_at > END_S
        why = over.why or f"the workers of run {course.run} ended, but no result came"
        return course, [GiveUp(why)] if late else []
    if over.again and not course.closing:
        if course.heeded:
            course, actions = _close(course, Close("stopped", f"interrupted by {seen.signal}, and {over.why}"))
        else:
            return _replace(over.why, course, seen, now)
    elif over.why and not course.closing:
        course, actions = _close(course, Close("failed", over.why))
    else:
        actions = []
    return replace(course, over_at=now), actions


def _replace(why: str, course: Course, seen: Seen, now: float) -> tuple[Course, list[Action]]:
    starts = 0 if seen.worlds > course.worlds else course.starts + 1
    course = replace(course, starts=starts, worlds=seen.worlds, saving=None)
    if starts < MOST_STARTS:
        return course, [Ask(Note("controller_restarted", {"why": why})), Start()]
    often = f"{why}, {starts} times before a first step; give {course.resume} to go on from the newest checkpoint"
    course, actions = _close(course, Close("failed", often))
    return replace(course, over_at=now), actions


def _end_those_of_silent(course: Course, seen: Seen, now: float) -> tuple[Course, list[Action]]:
    """Workers train on without their keeper, but they end with it: they save what they have before."""
    if seen.worlds == course.worlds:
        return course, [End()]
    if course.saving is None:
        return replace(course, saving=(now, seen.commits)), [Ask(Wish("save", seen.silent))]
    since, commits = course.saving
    return course, [End()] if seen.commits > commits or now - since > SAVE_S else []
