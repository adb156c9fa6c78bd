"""Handling of SIGINT, SIGTERM and SIGHUP by a command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def handled_by(handler: Callable[[str], None]) -> Iterator[None]:
    """Inside, `handler` is called with the name of each SIGINT, SIGTERM and SIGHUP, which do nothing else.

    A SIGHUP that was ignored before, as with `nohup`, stays ignored. A SIGHUP after another signal is dropped: a
    terminal that closes sends one, and its shell a second one. Only the main thread can handle signals; in another
    thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    came = False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal came
        if not (came and number == signal.SIGHUP):
            came = True
            handler(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def spared_from_hangups() -> Iterator[None]:
    """Processes that are started inside never receive a SIGHUP: only this process acts on it, and saves and ends them.
    A SIGHUP that comes meanwhile is delivered to this process afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
