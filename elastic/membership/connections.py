"""The server's open connections: a socket for each worker, a queue for each follower of the run."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Coroutine
from typing import Any

from aiohttp import web

from elastic.membership import kernel
from elastic.membership.protocol import HostMessage, dumps
from elastic.membership.world import World


class Connections:
    """Sends without waiting. For use on the server's event loop only."""

    def __init__(self) -> None:
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._followers: dict[web.WebSocketResponse, asyncio.Queue[str]] = {}
        self._backlog: list[str] = []
        self._tasks: set[asyncio.Future[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` as a task of its own."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)

    # ---- workers -----------------------------------------------------------------------------------------------

    def add(self, member_id: str, socket: web.WebSocketResponse) -> None:
        """Use this socket for the worker from now on."""
        self._sockets[member_id] = socket

    def silence_s(self, member_id: str) -> float:
        """Seconds since the worker's machine last answered any packet, infinite if unknown."""
        socket = self._sockets.get(member_id)
        connection = socket.get_extra_info("socket") if socket is not None else None
        return kernel.silence_s(connection) if connection is not None else math.inf

    def remove(self, member_id: str, socket: web.WebSocketResponse) -> bool:
        """Forget a closed socket; returns whether it was the worker's newest."""
        if self._sockets.get(member_id) is not socket:
            return False
        del self._sockets[member_id]
        return True

    def send(self, member_id: str, message: HostMessage) -> None:
        """Send to one worker, if it is connected."""
        socket = self._sockets.get(member_id)
        if socket is not None and not socket.closed:
            self.start(_send_quietly(socket, dumps(message)))

    def send_to_world(self, world: World, message: HostMessage) -> None:
        """Send to all members of a world."""
        for member in world.members:
            self.send(member.id, message)

    def broadcast(self, message: HostMessage) -> None:
        """Send to all workers."""
        for member_id in list(self._sockets):
            self.send(member_id, message)

    # ---- followers ---------------------------------------------------------------------------------------------

    def publish(self, text: str, keep: bool) -> None:
        """Send to all followers; `keep` it for those who come later."""
        if keep:
            self._backlog.append(text)
        for queue in self._followers.values():
            queue.put_nowait(text)

    async def follow(self, socket: web.WebSocketResponse) -> None:
        """Serve a follower until it or the server ends."""
        queue: asyncio.Queue[str] = asyncio.Queue()
        for text in self._backlog:
            queue.put_nowait(text)
        self._followers[socket] = queue
        try:
            while text := await queue.get():
                await socket.send_str(text)
            await socket.close()
        except ConnectionError:
            return  # the follower went away
        finally:
            del self._followers[socket]

    async def close(self) -> None:
        """End all connections."""
        for queue in self._followers.values():
            queue.put_nowait("")
        for socket in list(self._sockets.values()):
            await socket.close()


async def _send_quietly(socket: web.WebSocketResponse, text: str) -> None:
    with contextlib.suppress(ConnectionError):  # its reader notices, and reports the worker lost
        await socket.send_str(text)
