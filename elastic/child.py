"""What the processes of a run have in common: they end with whoever started them, and only then."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1  # prctl(2)
_MOST_DESCRIPTORS = 1 << 20


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


def raise_descriptor_limit() -> None:
    """Let this process, and what it starts, have as many open files and connections as it may: most machines allow 1024
    at first, and a run's server has one for each worker and for whoever else connects."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
