"""What a command does with SIGINT, SIGTERM and SIGHUP."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def heard_by(handler: Callable[[str], None]) -> Iterator[None]:
    """Inside, `handler` is called with the name of each SIGINT, SIGTERM and SIGHUP, which do nothing else.

    A SIGHUP that was ignored before, as `nohup` has it, stays so; one after another signal says nothing new, as a
    terminal that closes sends it, and its shell once more. Only the main thread can handle signals; in another one this
    does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    came = False

    def hear(number: int, _: FrameType | None) -> None:
        nonlocal came
        if not (came and number == signal.SIGHUP):
            came = True
            handler(signal.Signals(number).name)

    before = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def spared_from_hangups() -> Iterator[None]:
    """Processes that are started inside never hear of a SIGHUP: it is for this process, which saves and ends them. One
    that comes meanwhile is heard here afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
