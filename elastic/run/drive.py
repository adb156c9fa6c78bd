"""One drive of a run, on Ray or in plain processes: its records, its signals, its workers, and its end."""

from __future__ import annotations

import threading
import time
import urllib.error
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from elastic.errors import Interrupted, RunFailed
from elastic.membership.driver import DriverLink
from elastic.membership.protocol import Request
from elastic.run.course import Ask, Course, End, GiveUp, Over, Say, Seen, Start, decide
from elastic.run.prepare import PreparedRun

HOST_LOST_S = 60.0
FOLLOWER_END_S = 30.0
TURN_S = 0.05


class Launcher(Protocol):
    """Starts the workers of a run, and looks after them."""

    def start(self) -> None:
        """Start the workers; once more, where those before have ended."""

    def turn(self, worlds: int) -> None:
        """Look after them; called again and again while the run goes on, `worlds` of which were formed so far."""

    def silent(self) -> str:
        """In what way whoever keeps the workers stands still; empty where it does not."""

    def over(self) -> Over | None:
        """How the workers have ended, if all of them have."""

    def end(self) -> None:
        """End all workers and whoever keeps them, at once."""


class Drive:
    """Follows a run, carries out what is decided of its workers, and says how the run ended.

    Args:
        listeners: called with every row and event, on another thread.
        say: called with a line for the console.
    """

    def __init__(
        self,
        run: PreparedRun,
        listeners: Sequence[Callable[[dict[str, Any]], None]],
        say: Callable[[str], None],
    ):
        self._name, self._resume = run.name, run.again
        self._listeners, self._say = listeners, say
        self._signals: list[str] = []
        self._worlds = self._commits = 0
        self._end: dict[str, Any] | None = None
        self._ended = threading.Event()
        self._follower: threading.Thread | None = None

    # ---- what it hears ---------------------------------------------------------------------------------------------

    def follow(self, link: DriverLink) -> None:
        """Hear from the host of the run, from now on."""
        self._link = link
        self._follower = threading.Thread(target=self._follow, name="run-follower", daemon=True)
        self._follower.start()

    def _follow(self) -> None:
        if not self._link.follow_to_the_end(self._on_record, self._ended, HOST_LOST_S):
            self.fail("the host of the run is gone and did not come back")

    def _on_record(self, record: dict[str, Any]) -> None:
        kind = record.get("kind")
        self._worlds += kind == "world_formed"
        self._commits += kind == "checkpoint_committed"
        for listener in self._listeners:
            listener(record)
        if kind == "end":
            self._end = record
            self._ended.set()

    def hear(self, signal: str) -> None:
        """A signal of this name has come."""
        self._signals.append(signal)

    def fail(self, message: str) -> None:
        """The run is lost, and its host cannot say so."""
        self._end = {"status": "failed", "message": message}
        self._ended.set()

    @property
    def ended(self) -> bool:
        """Whether the run has."""
        return self._ended.is_set()

    # ---- what it does ----------------------------------------------------------------------------------------------

    def wait(self, launcher: Launcher, timeout_s: float = float("inf")) -> dict[str, Any]:
        """Look after the run, whose workers were started, until it ends; returns the contents of result.json.

        Raises:
            RunFailed: it failed, every worker ended, or it did not end within `timeout_s`.
            Interrupted: a signal stopped it.
        """
        course, deadline = Course(self._name, self._resume), time.monotonic() + timeout_s
        while not self._ended.wait(TURN_S):
            launcher.turn(self._worlds)
            course = self._turn(course, launcher)
            if time.monotonic() > deadline:
                raise RunFailed(f"run {self._name} did not end within {timeout_s:.0f} s")
        return self.result()

    def _turn(self, course: Course, launcher: Launcher) -> Course:
        signals = list(self._signals)
        newest = signals[-1] if signals else ""
        over, silent = launcher.over(), launcher.silent()
        seen = Seen(self.ended, len(signals), newest, self._worlds, self._commits, silent, over)
        course, actions = decide(course, seen, time.monotonic())
        for action in actions:
            match action:
                case Ask(request):
                    self.ask(request)
                case Say(text):
                    self._say(text)
                case Start():
                    launcher.start()
                case End():
                    launcher.end()
                case GiveUp(message):
                    raise RunFailed(message)
        return course

    def ask(self, request: Request) -> None:
        """Tell the host of the run."""
        try:
            self._link.request(request, patience_s=HOST_LOST_S)  # it may just be started again
        except urllib.error.HTTPError:
            raise
        except OSError as error:  # if it stays away, the follower says so
            self._say(f"the host of the run did not take {request.path}: {error}")

    def result(self, timeout_s: float = 0.0) -> dict[str, Any]:
        """The contents of result.json, once the run has ended; it is not looked after meanwhile. Raises what `wait`
        raises."""
        if not self._ended.wait(timeout_s):
            raise RunFailed(f"run {self._name} did not end within {timeout_s:.0f} s")
        assert self._end is not None
        status, message = self._end["status"], self._end["message"]
        if status not in ("finished", "stopped"):
            raise RunFailed(message)
        if self._signals and status == "stopped":
            raise Interrupted(f"run {self._name} was {message}; give {self._resume} to go on")
        return self._end["result"]

    def close(self) -> None:
        """Hear no more."""
        self._ended.set()
        if self._follower is not None:
            self._follower.join(FOLLOWER_END_S)
