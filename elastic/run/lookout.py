"""Checks that a process which a run depends on still answers. Ray itself notices a process that died, but not one that
hangs."""

from __future__ import annotations

import threading
import time
import traceback
import urllib.error
from collections.abc import Callable

from elastic.membership.driver import DriverLink

LOOKS = 5  # that must fail in a row before a living process counts as hung
POLL_S = 0.05


class Lookout:
    """Looks again and again, on a thread of its own. Failed looks are counted rather than timed, since this process may
    have been stopped itself.

    Args:
        what: name of the process, for texts.
        look_s: seconds that an answer may take, and from one look to the next.
        answers: waits for an answer for at most the given seconds; returns False after all of them without one.
        lost: called with the reason, after LOOKS failed looks; it replaces the process, and counting starts again.
        ended: returns how the process ended, if it did and nothing else replaces it.
    """

    def __init__(
        self,
        what: str,
        look_s: float,
        answers: Callable[[float], bool],
        lost: Callable[[str], None],
        ended: Callable[[], str | None] = lambda: None,
    ):
        self._what, self._look_s, self._answers, self._lost, self._ended = what, look_s, answers, lost, ended
        self.stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lookout", daemon=True)

    def __enter__(self) -> Lookout:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        missed, due = 0, time.monotonic() + self._look_s
        while not self.stopping.wait(0.0 if missed else POLL_S):
            try:
                how = self._ended()
                if how is None and (missed or time.monotonic() >= due):
                    missed = 0 if self._answers(self._look_s) else missed + 1
                    due = time.monotonic() + self._look_s
                    if missed == LOOKS:
                        how = f"did not answer for {LOOKS * self._look_s:.0f} s and was ended"
                if how is not None and not self.stopping.is_set():
                    self._lost(f"{self._what} {how}")
                    missed, due = 0, time.monotonic() + self._look_s
            except Exception:  # such as a machine out of some resource: it is printed, and looking goes on
                traceback.print_exc()
                missed, due = 0, time.monotonic() + self._look_s


def host_answers(link: DriverLink, wait_s: float) -> bool:
    """False if the run's host is there but does not answer. If it is not there, Ray starts it again."""
    try:
        link.request("/group", timeout_s=wait_s)
    except TimeoutError:
        return False
    except urllib.error.URLError as error:
        return not isinstance(error.reason, TimeoutError)
    except OSError:
        return True
    return True
