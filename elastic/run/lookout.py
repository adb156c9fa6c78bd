"""Whether a process that holds a run together still lives and answers. Ray itself sees one that died, not one that
stands still."""

from __future__ import annotations

import threading
import time
import traceback
import urllib.error
from collections.abc import Callable

from elastic.membership.driver import DriverLink

LOOKS = 5  # that must fail, one after the other, before a process that lives is said to stand still
POLL_S = 0.05


class Lookout:
    """Looks again and again, on a thread of its own. Looks are counted, not timed: this process may have been stopped
    itself.

    Args:
        what: it is, for people.
        look_s: seconds that an answer may take, and between two looks.
        answers: waits for an answer for at most so many seconds, and for all of them where none comes.
        lost: called with how it was lost, after LOOKS looks in vain; it ends and replaces it, and counting begins anew.
        ended: how the process ended, if it did and nobody else replaces it.
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
            except Exception:  # of a machine that is short of something, say: it is told, and looked at again
                traceback.print_exc()
                missed, due = 0, time.monotonic() + self._look_s


def host_answers(link: DriverLink, wait_s: float) -> bool:
    """False where the host of a run is there and says nothing. Where it is not there, Ray starts it again."""
    try:
        link.request("/group", timeout_s=wait_s)
    except TimeoutError:
        return False
    except urllib.error.URLError as error:
        return not isinstance(error.reason, TimeoutError)
    except OSError:
        return True
    return True
