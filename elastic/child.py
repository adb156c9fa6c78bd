"""What processes that a run starts beside itself have in common: they end with whoever started them, and only then."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1  # prctl(2)


def ignore_terminal() -> None:
    """Ctrl-C and the end of a terminal go to all processes there: they are for the one that drives the run, which saves
    and ends the others. What this process starts ignores them too."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def end_with_input() -> None:
    """End this process as soon as its standard input is closed: its other end is held by who started it, and by nobody
    else. Nothing more can be read from it."""
    life = os.dup(sys.stdin.fileno())
    sys.stdin = open(os.devnull)  # noqa: SIM115

    def watch() -> None:
        while os.read(life, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def die_with_starter() -> None:
    """Have the kernel end this process when the thread that started it ends. Linux."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
