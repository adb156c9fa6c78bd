"""Progress bars on the terminal, and contexts that delay or convert signals."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from elastic.redact import printable


@contextmanager
def progress(doing: str, total: int, *, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error if that is a terminal. Yields a function to call with each amount done."""
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts = [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]
    columns = [TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda amount: bar.advance(task, amount)


def redrawn(find: Callable[[], str], every_s: float = 2.0) -> None:
    """Show the text that `find` returns, again every `every_s` seconds, until Ctrl-C. The last text stays on the
    terminal."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    text = printable(find())
    with contextlib.suppress(KeyboardInterrupt), Live(console=Console(), screen=True, auto_refresh=False) as live:
        while True:
            live.update(Text(text, no_wrap=True), refresh=True)
            time.sleep(every_s)
            text = printable(find())
    print(text)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt as Ctrl-C does, so that unfinished work is cleaned up."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with _handling(signal.SIGTERM, interrupt):
        yield


@contextmanager
def held_back() -> Iterator[list[int]]:
    """Inside, Ctrl-C and SIGTERM are only noted. Yields the list of the signals that arrived, for the caller to handle
    afterwards."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    with _handling(signal.SIGINT, note), _handling(signal.SIGTERM, note):
        yield came


@contextmanager
def _handling(number: int, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
