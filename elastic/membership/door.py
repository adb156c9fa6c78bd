"""Limits on connections that have not shown a token: how many there are, how long they stay, how fast they come."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import socket
import time
from collections import OrderedDict
from collections.abc import Callable

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

MOST_STRANGERS = 1024
#: Connections without a token that are accepted a second: a flood of them must leave the server time for the run.
PACE = 1000.0
#: Connections that the kernel queues until they are accepted, which takes at most a second. It drops more than these,
#: and their clients try again after 1 s, 3 s and 7 s.
QUEUE = 1024
NO_ROOM_S = 0.1  # pause before the next accept where no file descriptor is left
STRANGER_S = 10.0  # from connecting to showing the token; a grant is looked up in storage meanwhile
LINGER_S = 1.0  # for so long the rest of a refused request is read, so that its sender comes to read the answer


def _is_ours(record: logging.LogRecord) -> bool:
    """False for errors of connections that do not speak HTTP: strangers' errors do not belong on the run's console."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (HttpProcessingError, ConnectionError))


_LOG = logging.getLogger("elastic.membership")
_LOG.addFilter(_is_ours)


class Pace:
    """A rate limit: `most` a second, and as many at once after a pause. Pure."""

    def __init__(self, most: float, now: float):
        self._most, self._left, self._at = most, most, now

    def take(self, now: float) -> float:
        """Count one more; returns for how many seconds the next is to wait."""
        self._left = min(self._most, self._left + (now - self._at) * self._most) - 1
        self._at = now
        return max(0.0, -self._left / self._most)

    def give_back(self) -> None:
        """Do not count the last one."""
        self._left += 1


class Door:
    """The connections that have not shown a token yet. For use on the server's event loop only."""

    def __init__(self) -> None:
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = MOST_STRANGERS
        if descriptors != resource.RLIM_INFINITY:
            self._most = min(MOST_STRANGERS, descriptors // 2)
        self._pace = Pace(PACE, time.monotonic())
        self._strangers: OrderedDict[asyncio.BaseTransport, float] = OrderedDict()

    async def let_in(self, listening: socket.socket, caller: Callable[[], asyncio.Protocol]) -> None:
        """Accept connections, one after another, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED):
                    raise
                await asyncio.sleep(NO_ROOM_S)
                continue
            with contextlib.suppress(OSError):  # the client has closed it already
                await loop.connect_accepted_socket(caller, connection)
            await asyncio.sleep(self._pace.take(time.monotonic()))

    def came(self, transport: asyncio.BaseTransport) -> None:
        """A client connected; where there are too many without a token, the oldest of these connections is aborted."""
        self._strangers[transport] = time.monotonic() + STRANGER_S
        if len(self._strangers) > self._most:
            self._turn_away(next(iter(self._strangers)))

    def known(self, transport: asyncio.BaseTransport | None) -> None:
        """The client of this connection has shown a token: the connection may stay."""
        if transport is not None and self._strangers.pop(transport, None) is not None:
            self._pace.give_back()

    def left(self, transport: asyncio.BaseTransport | None) -> None:
        """This connection has ended."""
        if transport is not None:
            self._strangers.pop(transport, None)

    def look(self, now: float) -> None:
        """Abort connections that have shown no token in time. To be called again and again."""
        while self._strangers and (first := next(iter(self._strangers.items())))[1] < now:
            self._turn_away(first[0])

    def _turn_away(self, transport: asyncio.BaseTransport) -> None:
        del self._strangers[transport]
        assert isinstance(transport, asyncio.WriteTransport)
        transport.abort()


class Caller(web.RequestHandler):
    """A connection to a server with a `Door`."""

    __slots__ = ("_door",)

    def __init__(self, server: web.Server, loop: asyncio.AbstractEventLoop, door: Door):
        super().__init__(server, loop=loop, access_log=None, lingering_time=LINGER_S, logger=_LOG)  # type: ignore[arg-type]
        self._door = door

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._door.came(transport)

    def connection_lost(self, error: BaseException | None) -> None:
        self._door.left(self.transport)
        super().connection_lost(error)
