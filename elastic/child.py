"""What all processes of a run have in common: they end with the process that started them, and not before."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import resource
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1  # prctl(2)
_MOST_DESCRIPTORS = 1 << 20


def ignore_terminal() -> None:
    """Ignore Ctrl-C and the end of the terminal. The terminal sends both to all its processes, but only the run's
    driver
    is to act on them: it saves and ends the others. Processes that this one starts ignore them too."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def show_stack_at_death() -> None:
    """Have this process print its stacks to standard error when it dies of a signal in C."""
    if not faulthandler.is_enabled():
        faulthandler.enable(file=2)


def end_with_input() -> None:
    """End this process as soon as its standard input is closed: only the process that started it holds the other end.
    Nothing more can be read from standard input."""
    life = os.dup(sys.stdin.fileno())
    sys.stdin = open(os.devnull)  # noqa: SIM115

    def watch() -> None:
        while os.read(life, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def die_with_starter() -> None:
    """Have the kernel end this process when the thread that started it ends. Linux only."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def yield_to_training() -> None:
    """Have this process get less of a busy CPU than workers do, whose work its own can wait for."""
    os.nice(10)


def raise_descriptor_limit() -> None:
    """Raise the soft limit on open files of this process and its children to the hard limit: most machines begin with
    1024, and a run's server has a connection for each worker and each other client."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MOST_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
