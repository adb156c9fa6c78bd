"""The course of a run that is driven: when its workers are started, replaced and ended, and how the run ends. Pure.

The workers of a run have one keeper: on Ray the controller, in plain processes the driver itself. When a controller
ends, its workers end with it, and another one may replace it. The driver describes what it sees, and carries out what
is decided.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from elastic.membership.protocol import Close, Note, Request, Wish

MOST_STARTS = 3
END_S = 30.0  # from the end of the workers until the run must have ended
SAVE_S = 60.0  # for a checkpoint before workers are ended


@dataclass(frozen=True)
class Over:
    """All workers have ended.

    Args:
        why: the reason, for people; empty if they were done.
        again: other workers may be started.
    """

    why: str = ""
    again: bool = False


@dataclass(frozen=True)
class Seen:
    """What the driver sees.

    Args:
        ended: the host has reported how the run ended, or is gone for good.
        signals: how many came so far; `signal` is the name of the newest.
        worlds: formed since the driver began.
        commits: checkpoints committed since the driver began.
        silent: why the keeper of the workers counts as hung; empty if it does not.
        over: how the workers that were started last have ended, None while they live.
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
    """What was decided so far.

    Args:
        run: name of the run.
        resume: options that make the same command resume the run.
        handled: signals that were acted on.
        starts: how often in a row workers were started that formed no world, without the present ones.
        worlds: how many had been formed when the present workers were started.
        closing: the host was asked to end the run.
        saving: when the workers were asked for a checkpoint before they are ended, and the commits until then.
        over_at: when the workers ended for good.
    """

    run: str
    resume: str
    handled: int = 0
    starts: int = 0
    worlds: int = 0
    closing: bool = False
    saving: tuple[float, int] | None = None
    over_at: float | None = None


# ---- what is to be done ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """Send a request to the host."""

    request: Request


@dataclass(frozen=True)
class Print:
    """Print a line on the console."""

    text: str


@dataclass(frozen=True)
class Start:
    """Start workers again."""


@dataclass(frozen=True)
class End:
    """End the workers and their keeper."""


@dataclass(frozen=True)
class GiveUp:
    """Fail: the host does not end the run."""

    message: str


Action = Ask | Print | Start | End | GiveUp


def decide(course: Course, seen: Seen, now: float) -> tuple[Course, list[Action]]:
    """Decide one turn of a driver. `now` is in monotonic seconds."""
    if seen.ended:
        return course, []
    course, actions = _handle_signals(course, seen)
    if seen.over is not None:
        course, more = _after(seen.over, course, seen, now)
    elif seen.silent:
        course, more = _end_workers_of_silent_keeper(course, seen, now)
    else:
        more = []
    return course, actions + more


def _handle_signals(course: Course, seen: Seen) -> tuple[Course, list[Action]]:
    """The first signal saves and ends the run. A signal before the first step, or a second one, ends it at once."""
    if seen.signals == course.handled:
        return course, []
    course = replace(course, handled=seen.signals)
    if seen.signals > 1:
        return _close(course, Close("stopped", "interrupted twice, nothing saved since the newest checkpoint"))
    if not seen.worlds:
        return _close(course, Close("stopped", f"interrupted by {seen.signal} before the first step"))
    stop = Wish("stop", f"interrupted by {seen.signal}")
    return course, [Ask(stop), Print(f"{seen.signal}: saving and ending; once more ends at once")]


def _close(course: Course, request: Close) -> tuple[Course, list[Action]]:
    return replace(course, closing=True), [Ask(request)]


def _after(over: Over, course: Course, seen: Seen, now: float) -> tuple[Course, list[Action]]:
    """The workers have ended: start others if that may help, or wait for the end of the run."""
    if course.over_at is not None:
        late = now - course.over_at > END_S
        why = over.why or f"the workers of run {course.run} ended, but no result came"
        return course, [GiveUp(why)] if late else []
    if over.again and not course.closing:
        if course.handled:
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


def _end_workers_of_silent_keeper(course: Course, seen: Seen, now: float) -> tuple[Course, list[Action]]:
    """Workers train on without their keeper, but end with it: have them save a checkpoint before it is ended."""
    if seen.worlds == course.worlds:
        return course, [End()]
    if course.saving is None:
        return replace(course, saving=(now, seen.commits)), [Ask(Wish("save", seen.silent))]
    since, commits = course.saving
    return course, [End()] if seen.commits > commits or now - since > SAVE_S else []
