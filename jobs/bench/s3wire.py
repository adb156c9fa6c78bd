"""HTTP/1.1 on raw non-blocking sockets, as little of it as a proxy in front of an object store needs.

asyncio's streams copy every byte several times through small buffers; here bodies go through one buffer of 256 KiB a
connection, so that one core carries some GB/s (`jobs.bench.s3front --measure` says how much on this machine).
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

PIECE_BYTES = 256 << 10
MAX_HEAD_BYTES = 64 << 10
SLACK_S = 0.004  # a timer wakes later than asked; bodies may run ahead of their pace by this much

Meter = Callable[[int], Awaitable[None]]
"""Told of every piece of a body that passed; may wait (a pace) or raise `Cut`."""


class Cut(Exception):
    """This connection is to be broken now, as a test asked."""


@dataclass
class Head:
    """The first lines of a request or an answer. Header names are in lower case."""

    raw: bytes
    first: list[str]
    headers: dict[str, str]

    @property
    def method(self) -> str:
        return self.first[0]

    @property
    def status(self) -> int:
        return int(self.first[1])

    @property
    def path(self) -> str:
        """`/bucket/key`, unquoted."""
        return unquote(urlsplit(self.first[1]).path)

    @property
    def query(self) -> dict[str, str]:
        found = parse_qs(urlsplit(self.first[1]).query, keep_blank_values=True)
        return {name: values[0] for name, values in found.items()}

    @property
    def length(self) -> int | None:
        """Bytes of the body, or None where it comes in chunks or there is none."""
        text = self.headers.get("content-length")
        return None if text is None else int(text)

    @property
    def chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "")

    @property
    def closes(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"


class Wire:
    """A connection: heads are read through a buffer, bodies go past it."""

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self._loop = connection, asyncio.get_running_loop()
        self._ahead = b""  # read, but not yet asked for
        self._piece = memoryview(bytearray(PIECE_BYTES))

    @classmethod
    async def connect(cls, host: str, port: int) -> Wire:
        """A new connection."""
        connection = socket.socket()
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, (host, port))
        except OSError:
            connection.close()
            raise
        return cls(connection)

    def stale(self, port: int) -> bool:
        """Whether the other side closed this idle connection, or is another than the one at `port`."""
        try:
            return self.socket.getpeername()[1] != port or self.socket.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    async def head(self) -> Head | None:
        """The next head, or None where the other side closed instead.

        Raises:
            ConnectionError: it closed in the middle, or what came is no HTTP.
        """
        while (end := self._ahead.find(b"\r\n\r\n")) < 0:
            more = await self._loop.sock_recv(self.socket, PIECE_BYTES)
            if not more:
                if self._ahead:
                    raise ConnectionError("closed in the middle of a head")
                return None
            self._ahead += more
            if len(self._ahead) > MAX_HEAD_BYTES + PIECE_BYTES:
                raise ConnectionError("a head without end")
        raw, self._ahead = self._ahead[: end + 4], self._ahead[end + 4 :]
        first, *lines = raw[:end].decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return Head(raw, re.split(" ", first, maxsplit=2), headers)

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        await self._loop.sock_sendall(self.socket, data)

    async def _some(self, into: memoryview) -> int:
        if self._ahead:
            n = min(len(into), len(self._ahead))
            into[:n], self._ahead = self._ahead[:n], self._ahead[n:]
            return n
        n = await self._loop.sock_recv_into(self.socket, into)
        if not n:
            raise ConnectionError("closed in the middle of a body")
        return n

    async def read_into(self, into: memoryview, meter: Meter) -> None:
        """Fill a buffer with a body."""
        done = 0
        while done < len(into):
            n = await self._some(into[done : done + PIECE_BYTES])
            done += n
            await meter(n)

    async def write_from(self, data: memoryview, meter: Meter) -> None:
        """Send a body from a buffer."""
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            await self.send(piece)
            await meter(len(piece))

    async def pump(self, to: Wire, count: int, meter: Meter) -> None:
        """Pass on `count` bytes of a body."""
        while count:
            n = await self._some(self._piece[:count])
            await to.send(self._piece[:n])
            count -= n
            await meter(n)

    async def pump_chunked(self, to: Wire, meter: Meter) -> None:
        """Pass on a body in chunks, chunk by chunk, with its trailer."""
        size = -1
        while size != 0:
            line = await self._line()
            await to.send(line)
            size = int(line.split(b";")[0], 16)
            if size:
                await self.pump(to, size, meter)
                await to.send(await self._line())
        while (line := await self._line()) != b"\r\n":
            await to.send(line)
        await to.send(line)

    async def pump_rest(self, to: Wire, meter: Meter) -> None:
        """Pass on all that comes until the other side closes."""
        while True:
            try:
                n = await self._some(self._piece)
            except ConnectionError:
                return
            await to.send(self._piece[:n])
            await meter(n)

    async def _line(self) -> bytes:
        while (end := self._ahead.find(b"\r\n")) < 0:
            more = await self._loop.sock_recv(self.socket, PIECE_BYTES)
            if not more:
                raise ConnectionError("closed in the middle of a chunked body")
            self._ahead += more
        line, self._ahead = self._ahead[: end + 2], self._ahead[end + 2 :]
        return line

    def break_off(self) -> None:
        """Close so that the other side sees a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self.socket.close()


class Pace:
    """A meter that lets a body pass at `rate` bytes a second; 0 is no limit."""

    def __init__(self, rate: float):
        self._rate, self._due = rate, time.monotonic()

    async def __call__(self, count: int) -> None:
        if not self._rate:
            return
        self._due += count / self._rate
        ahead_s = self._due - time.monotonic()
        if ahead_s > SLACK_S:
            await asyncio.sleep(ahead_s)
