"""Who stands at a server's door: connections that have shown no token yet are few, and do not stay."""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from collections import OrderedDict

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

MOST_STRANGERS = 1024
BACKLOG = 100  # connections accepted at a time: far fewer, or who comes in a flood would have to go before it was heard
STRANGER_S = 10.0  # from connecting to the token; a grant is looked up in storage meanwhile
LINGER_S = 1.0  # what a refused request still sends is read for so long, so that its sender comes to read the answer


def _is_ours(record: logging.LogRecord) -> bool:
    """What is no HTTP is a stranger's, and on the console of a run nobody's concern."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, (HttpProcessingError, ConnectionError))


_LOG = logging.getLogger("elastic.membership")
_LOG.addFilter(_is_ours)


class Door:
    """The connections of which nobody knows yet whose they are. To be used on the server's loop only."""

    def __init__(self) -> None:
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = MOST_STRANGERS
        if descriptors != resource.RLIM_INFINITY:
            self._most = min(MOST_STRANGERS, descriptors // 2)
        self._strangers: OrderedDict[asyncio.BaseTransport, float] = OrderedDict()

    def came(self, transport: asyncio.BaseTransport) -> None:
        """Somebody connected; where there are too many, who stood there longest has to go."""
        self._strangers[transport] = time.monotonic() + STRANGER_S
        if len(self._strangers) > self._most:
            self._turn_away(next(iter(self._strangers)))

    def known(self, transport: asyncio.BaseTransport | None) -> None:
        """This one has shown a token: it may stay."""
        if transport is not None:
            self._strangers.pop(transport, None)

    def look(self, now: float) -> None:
        """Turn away who stood there for too long. To be called again and again."""
        while self._strangers and (first := next(iter(self._strangers.items())))[1] < now:
            self._turn_away(first[0])

    def _turn_away(self, transport: asyncio.BaseTransport) -> None:
        del self._strangers[transport]
        assert isinstance(transport, asyncio.WriteTransport)
        transport.abort()


class Caller(web.RequestHandler):
    """A connection to a server with a door."""

    __slots__ = ("_door",)

    def __init__(self, server: web.Server, loop: asyncio.AbstractEventLoop, door: Door):
        super().__init__(server, loop=loop, access_log=None, lingering_time=LINGER_S, logger=_LOG)  # type: ignore[arg-type]
        self._door = door

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._door.came(transport)

    def connection_lost(self, error: BaseException | None) -> None:
        self._door.known(self.transport)
        super().connection_lost(error)
