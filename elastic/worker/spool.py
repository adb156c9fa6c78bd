"""What the worker processes of this machine print: they write to files of their driver's, which it reads.

A file takes whatever a process says, as long as it lives and while it dies, and holds up nobody: a pipe that the driver
does not read at once would. The files have no name, so nothing is left of them; what was read is cut off.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from typing import IO

CUT_BYTES = 4 << 20
_MOST_AT_ONCE = 1 << 20
OUT, ERR = "out", "err"


@dataclass
class _Stream:
    name: str
    file: IO[bytes]
    place: int = 0
    begun: bytes = b""

    def lines(self, *, ended: bool) -> list[str]:
        data = self.begun + self._new()
        whole, end, self.begun = data.rpartition(b"\n")
        if ended and self.begun:
            whole, end, self.begun = data, b"\n", b""
        return whole.decode(errors="replace").split("\n") if end else []

    def _new(self) -> bytes:
        number = self.file.fileno()
        size = os.fstat(number).st_size
        if size <= self.place:
            return b""
        begin = max(self.place, size - _MOST_AT_ONCE)
        found = os.pread(number, size - begin, begin)
        self.place = begin + len(found)
        if self.place > CUT_BYTES:
            os.ftruncate(number, 0)  # whoever writes appends
            self.place = 0
        return found


class Spool:
    """The files of all workers of a run. From one thread."""

    def __init__(self) -> None:
        self._streams: dict[str, list[_Stream]] = {}

    def open(self, worker: str) -> list[str]:
        """Make a worker's files; returns where that process finds them, for `take_output`."""
        self._streams[worker] = [_Stream(name, tempfile.TemporaryFile()) for name in (OUT, ERR)]  # noqa: SIM115
        return [f"/proc/{os.getpid()}/fd/{stream.file.fileno()}" for stream in self._streams[worker]]

    @property
    def workers(self) -> list[str]:
        return list(self._streams)

    def read(self, worker: str, *, ended: bool = False) -> list[tuple[str, str]]:
        """Lines that are new, each with the stream that it was written to.

        Args:
            ended: the process is gone: a line without an end is one, too.
        """
        streams = self._streams.get(worker, ())
        return [(stream.name, line) for stream in streams for line in stream.lines(ended=ended)]

    def close(self) -> None:
        for streams in self._streams.values():
            for stream in streams:
                stream.file.close()
        self._streams.clear()


def take_output(paths: list[str]) -> None:
    """Send everything that this process prints from now on to these files; if they cannot be opened, output stays as it
    is."""
    with contextlib.suppress(OSError):  # another user's, or no /proc
        for path, number in zip(paths, (1, 2)):
            file = os.open(path, os.O_WRONLY | os.O_APPEND)
            os.dup2(file, number)
            os.close(file)
