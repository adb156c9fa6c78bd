"""Whether a process that holds a run together on Ray still answers. Ray itself sees one that died, not one that stands
still."""

from __future__ import annotations

import threading
import urllib.error
from collections.abc import Callable

from elastic.membership.driver import DriverLink
from elastic.worker.hosting import LOOKS


class Lookout:
    """Asks again and again, on a thread of its own. Looks are counted, not timed: this process may have been stopped
    itself.

    Args:
        answers: waits for an answer for at most so many seconds, and for all of them where none comes.
        look_s: seconds that an answer may take, and between two looks.
        still: called with the seconds without an answer, after LOOKS looks in vain; then counting begins anew.
    """

    def __init__(self, name: str, look_s: float, answers: Callable[[float], bool], still: Callable[[float], None]):
        self._look_s, self._answers, self._still = look_s, answers, still
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)

    def __enter__(self) -> Lookout:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _watch(self) -> None:
        missed = 0
        while not self._stopping.wait(0.0 if missed else self._look_s):
            missed = 0 if self._answers(self._look_s) else missed + 1
            if missed == LOOKS and not self._stopping.is_set():
                self._still(LOOKS * self._look_s)
                missed = 0


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
