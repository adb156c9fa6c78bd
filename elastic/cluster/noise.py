"""Filters Ray's own lines on a driver's console: those that the run's lines repeat, and those that help no user."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from elastic.compat.ray import TOKEN_LOGGER, worker_lines_chosen

#: A log line of Ray's own C++ code: debug, information, warning, error; not the lines with which a process aborts (C).
_CPP = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ [DIWE] \d+ \d+\] ")
_ENDED = "A worker died or was killed while executing a task by an unexpected system error."  # the ledger has it
#: Where the useful part of a message ends.
_TAIL = re.compile(r"\. (Last \d+ lines of the Raylet logs|This can happen when a|Possible reasons include)", re.S)


def _no_hint(record: logging.LogRecord) -> bool:
    return "Token authentication is enabled" not in record.getMessage()


def hide_token_hint() -> None:
    """Hide Ray's hint that a cluster asks for a token. Its warning that a cluster asks for none stays."""
    logging.getLogger(TOKEN_LOGGER).addFilter(_no_hint)


@contextmanager
def cpp_lines_hidden() -> Iterator[None]:
    """Inside, log lines of Ray's C++ code in this process are hidden. It writes to the descriptor of standard error,
    and no setting of Ray silences it before a driver is connected. All other output is shown when the context ends."""
    try:
        before = os.dup(2)
    except OSError:  # standard error is closed, so there is nothing to hide
        yield
        return
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            kept.seek(0)
            lines = kept.read().decode(errors="replace").splitlines(keepends=True)
            sys.stderr.write("".join(line for line in lines if not _CPP.match(line)))


def worth_showing(source: str, lines: Sequence[str]) -> list[str]:
    """The lines to show of those that Ray would print.

    Args:
        source: a process id, or `raylet`, `gcs_server`, `autoscaler`.
    """
    if source == "autoscaler":  # it repeats itself hundreds of times; the run reports what it waits for and what failed
        return []
    kept = [line for line in lines if not _CPP.match(line)]
    if source != "raylet":
        return kept
    return [_first_sentence(line) for line in kept if not line.startswith(_ENDED)]


def _first_sentence(message: str) -> str:
    found = _TAIL.search(message)
    return message[: found.start() + 1] if found else message


@contextmanager
def hidden() -> Iterator[None]:
    """Inside, a connected driver prints all output of workers, but of Ray's own lines only those worth showing. Without
    a terminal it prints no colours. With RAY_SCHEDULER_EVENTS in the environment the autoscaler's lines are shown."""

    def choose(source: str, lines: Sequence[str]) -> Sequence[str]:
        if source == "autoscaler" and "RAY_SCHEDULER_EVENTS" in os.environ:
            return lines
        return worth_showing(source, lines)

    hide_token_hint()
    coloured = os.environ.get("RAY_COLOR_PREFIX")
    if coloured is None and not sys.stdout.isatty():
        os.environ["RAY_COLOR_PREFIX"] = "0"
    try:
        with worker_lines_chosen(choose):
            yield
    finally:
        if coloured is None:
            os.environ.pop("RAY_COLOR_PREFIX", None)
