"""Standard output and error that may break: a terminal that closes, a pipe that nobody reads, a full disk.

A run outlives the people who watch it. So what cannot be written is dropped, and neither raises nor blocks the thread
that prints.
"""

from __future__ import annotations

import atexit
import errno
import faulthandler
import io
import os
import select
import socket
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

PATIENCE_S = 5.0  # seconds for a terminal that takes nothing, such as that of a laptop that sleeps
_PIECE = 4096
_LOOK_S = 0.1  # seconds; a terminal may say that it has room and take nothing


class Sturdy(io.TextIOBase):
    """A text stream whose writes never raise.

    If its reader takes nothing for `patience_s`, nobody waits for it any more: text that it does not take at once is
    dropped, until it takes something again. A reader that is gone, and a full disk, are not tried again.

    Args:
        patience_s: None waits for as long as it takes.
        on_break: called once with the reason, when writing failed.
    """

    def __init__(
        self,
        stream: TextIO | None,
        patience_s: float | None = PATIENCE_S,
        on_break: Callable[[OSError], None] | None = None,
    ):
        self._on_break = on_break
        # None: the process was started without this stream
        self._stream = stream = stream or open(os.devnull, "w")  # noqa: SIM115
        self._lock = threading.RLock()  # a signal handler may print while its own thread is printing
        self._line = ""
        self._write = _writer(stream, self)
        self._patience_s = float("inf") if patience_s is None else patience_s
        self._stuck = False
        self.broken: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        with suppress(ValueError):  # it was closed
            return self._stream.isatty()
        return False

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            self._line += text
            if "\n" in text or "\r" in text:
                self.flush()
        return len(text)

    def flush(self) -> None:
        with self._lock:
            line, self._line = self._line, ""
            if line and self.broken is None:
                self._put(line)

    def _put(self, text: str) -> None:
        try:
            self._stuck = not self._write(text, 0.0 if self._stuck else self._patience_s)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.broken = error if isinstance(error, OSError) else OSError(errno.EBADF, str(error))
            if self._on_break is not None:
                self._on_break(self.broken)


def _writer(stream: TextIO, owner: Sturdy) -> Callable[[str, float], bool]:
    """Return a function that writes text within so many seconds, as long as some of it is taken, and returns whether
    all was."""
    encoding, errors = getattr(stream, "encoding", None) or "utf-8", "backslashreplace"
    if not _has_descriptor(stream):  # such as a notebook's stream, which takes everything

        def write_through(text: str, _: float) -> bool:
            try:
                stream.write(text)
            except UnicodeEncodeError:
                stream.write(text.encode(encoding, errors).decode(encoding))
            stream.flush()
            return True

        return write_through

    put: Callable[[bytes], int] | None = None
    owned = weakref.ref(owner)

    def write_now(text: str, patience_s: float) -> bool:
        nonlocal put
        put = put or _without_waiting(stream.fileno(), owned())
        data, until = memoryview(text.encode(encoding, errors)), time.monotonic() + patience_s
        while data:
            try:
                data, until = data[put(bytes(data[:_PIECE])) :], time.monotonic() + patience_s
            except BlockingIOError:
                left = until - time.monotonic()
                if left <= 0:
                    return False
                room = select.poll()
                room.register(stream.fileno(), select.POLLOUT)
                room.poll(min(left, _LOOK_S) * 1000)
        return True

    return write_now


def _has_descriptor(stream: TextIO) -> bool:
    """Whether what is written to this stream goes to its descriptor and nowhere else."""
    with suppress(OSError, ValueError):
        return type(stream) is io.TextIOWrapper and stream.fileno() >= 0
    return False


def _without_waiting(descriptor: int, owner: object) -> Callable[[bytes], int]:
    """Return a function that writes what can be written at once, and returns how many bytes that was.

    The descriptor itself stays blocking: other processes share it and expect that.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode):
        connection = socket.socket(fileno=os.dup(descriptor))
        weakref.finalize(owner, connection.close)
        return lambda data: connection.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with suppress(OSError):  # it belongs to another container, or nobody reads it any more: writing will tell
            own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            weakref.finalize(owner, os.close, own)
            return lambda data: os.write(own, data)
    return lambda data: os.write(descriptor, data)


def _to_nowhere(descriptor: int) -> None:
    """Send to /dev/null whatever is still written to a descriptor, also at the end of the process, so that it cannot
    fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _sturdy(patience_s: float | None) -> tuple[Sturdy, Sturdy]:
    """Replace standard output and error of this process, and return both."""

    def sturdy(stream: TextIO | None, name: str) -> Sturdy:
        def warn(error: OSError) -> None:
            if stream is not None and _has_descriptor(stream):
                _to_nowhere(stream.fileno())
            if not isinstance(error, BrokenPipeError) and name == "output":
                print(f"warning: standard output cannot be written and is left alone: {error}", file=sys.stderr)

        return Sturdy(stream, patience_s, warn)

    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # it is broken already: the first line will tell
            stream.flush()
    return sturdy(sys.stdout, "output"), sturdy(sys.stderr, "error")


def keep_output_sturdy() -> None:
    """From now on, what the job prints cannot fail. It goes where the driver's output goes."""
    sys.stdout, sys.stderr = both = _sturdy(PATIENCE_S)
    for stream in both:
        atexit.register(stream.flush)  # a line that has no end yet


def _fall_silent() -> None:
    """Drop what libraries print at the end of the process, after the command's last line."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()
    for number in (1, 2):
        with suppress(OSError):
            _to_nowhere(number)


@contextmanager
def sturdy_output(patience_s: float | None = PATIENCE_S) -> Iterator[Sturdy]:
    """While this context is open, standard output and error cannot break the command. Yields the output.

    The command must be this whole process. What is printed after the process has begun to end is not shown.
    """
    if not faulthandler.is_enabled():
        faulthandler.enable(file=2)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err = _sturdy(patience_s)
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
        atexit.unregister(_fall_silent)
        atexit.register(_fall_silent)  # functions run in reverse order, so this one before those registered so far
