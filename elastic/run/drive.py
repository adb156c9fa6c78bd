"""One drive of a run, on Ray or in plain processes: its records, its signals, its workers, and its end."""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.error
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from elastic.errors import Interrupted, RunFailed
from elastic.membership.driver import DriverLink
from elastic.membership.protocol import Note, Request
from elastic.run.course import Ask, Course, End, GiveUp, Over, Print, Seen, Start, decide
from elastic.run.notifying import Notifier
from elastic.run.prepare import PreparedRun, started_with
from elastic.run.telling import Telling

HOST_LOST_S = 60.0
FOLLOWER_END_S = 30.0
TURN_S = 0.05


class Launcher(Protocol):
    """Starts the workers of a run, and supervises them."""

    def start(self) -> None:
        """Start the workers, or others after the last ones have ended."""

    def turn(self, worlds: int) -> None:
        """Supervise the workers; called repeatedly while the run goes on, with the number of `worlds` formed so far."""

    def silent(self) -> str:
        """Why the keeper of the workers counts as hung; empty if it does not."""

    def over(self) -> Over | None:
        """How all workers have ended; None while any lives."""

    def end(self) -> None:
        """End all workers and their keeper at once."""


class Drive:
    """Follows a run, carries out the decisions about its workers, and returns or raises how it ended.

    Args:
        listeners: called with every row and event, on another thread.
        print_line: called with a line for the console.
    """

    def __init__(
        self,
        run: PreparedRun,
        listeners: Sequence[Callable[[dict[str, Any]], None]],
        print_line: Callable[[str], None],
    ):
        self._name, self._resume = run.name, run.again
        self._print = print_line
        self._telling = Telling(run.callbacks, run.folder.storage, started_with(run), self._warn, print_line)
        self._listeners = [*listeners, self._telling.hear]
        to = run.config.observe.notify
        self._notifier = None if to is None else Notifier(run.name, to, print_line)
        self._signals: list[str] = []
        self._worlds = self._commits = 0
        self._end: dict[str, Any] | None = None
        self._ended = threading.Event()
        self._follower: threading.Thread | None = None

    # ---- what it receives ------------------------------------------------------------------------------------------

    def follow(self, link: DriverLink) -> None:
        """Begin to receive records from the host of the run."""
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
        if self._notifier is not None:
            self._notifier.hear(record)
        if kind == "end":
            self._end = record
            self._ended.set()

    def _warn(self, name: str, what: str) -> None:
        """A callback of the job's does not work. Called on its thread."""
        self._print(f"warning: callback {name} {what}")
        if not self.ended:
            with contextlib.suppress(OSError):  # the host is away, or has ended meanwhile
                self._link.request(Note("callback_failed", {"callback": name, "why": what}))

    def on_signal(self, signal: str) -> None:
        """A signal of this name came."""
        self._signals.append(signal)

    def fail(self, message: str) -> None:
        """The run is lost, and its host cannot report it."""
        self._end = {"kind": "end", "status": "failed", "message": message}
        self._telling.hear(self._end)
        if self._notifier is not None:
            self._notifier.hear(self._end)
        self._ended.set()

    @property
    def ended(self) -> bool:
        """Whether the run has ended."""
        return self._ended.is_set()

    # ---- what it does ----------------------------------------------------------------------------------------------

    def wait(self, launcher: Launcher, timeout_s: float = float("inf")) -> dict[str, Any]:
        """Supervise the run, whose workers were started, until it ends; returns the contents of result.json.

        Raises:
            RunFailed: it failed, every worker ended, or it did not end within `timeout_s`.
            Interrupted: a signal stopped it.
        """
        course, deadline = Course(self._name, self._resume), time.monotonic() + timeout_s
        while not self._ended.wait(TURN_S):
            launcher.turn(self._worlds)
            if self._notifier is not None:
                self._notifier.tick()
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
                case Print(text):
                    self._print(text)
                case Start():
                    launcher.start()
                case End():
                    launcher.end()
                case GiveUp(message):
                    raise RunFailed(message)
        return course

    def ask(self, request: Request) -> None:
        """Send a request to the host of the run."""
        try:
            self._link.request(request, patience_s=HOST_LOST_S)  # the host may be restarting
        except urllib.error.HTTPError:
            raise
        except OSError as error:  # if it stays away, the follower thread ends the run
            self._print(f"the host of the run did not take {request.path}: {error}")

    def result(self, timeout_s: float = 0.0) -> dict[str, Any]:
        """The contents of result.json once the run has ended; it is not supervised meanwhile. Raises what `wait`
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
        """Stop following the run, and wait for the job's callbacks."""
        self._ended.set()
        if self._follower is not None:
            self._follower.join(FOLLOWER_END_S)
        self._telling.close()
        if self._notifier is not None:
            self._notifier.close()
