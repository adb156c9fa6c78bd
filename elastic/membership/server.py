"""The membership server: a small aiohttp server that hosts the state machine and relays to the keeper of the run.

    GET  /worker   WebSocket of a worker: join, beat, done, and whatever the keeper understands
    GET  /follow   WebSocket of a driver: rows and events as they are recorded
    POST /wish     {"kind": "stop"|"save", "detail": ...}: acted on at a step boundary
    POST /close    {"status": ..., "message": ...}: the driver knows that no worker will go on
    GET  /status   the keeper's view of the run, as JSON

Every request carries the run's bearer token. The server runs on a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from aiohttp import WSMsgType, web

from elastic.membership.state import (
    Break,
    Command,
    Done,
    Event,
    Form,
    Generation,
    Joined,
    Lost,
    Member,
    Refuse,
    State,
    Tick,
    World,
    advance,
)

BEAT_S = 1.0
MAX_MESSAGE_BYTES = 256 << 20


class Keeper(Protocol):
    """What the server relays to. Called on the server's thread: must not block."""

    def world_formed(self, world: World) -> None: ...

    def world_broken(self, world: World, lost: Member | None) -> None: ...

    def worker_joined(self, member: Member, message: dict[str, Any]) -> None: ...

    def receive(self, member: Member, generation: Generation, message: dict[str, Any]) -> None: ...

    def restore_point(self) -> dict[str, Any]: ...

    def close_run(self, status: str, message: str) -> None: ...

    def status(self) -> dict[str, Any]: ...


class MembershipServer:
    """Hosts one run's membership.

    Args:
        host: address to listen on; workers on other hosts must reach it.
        new_store: makes the rendezvous store of a new world; returns its port and a function that ends it.
    """

    def __init__(
        self, keeper: Keeper, state: State, token: str, *, host: str,
        new_store: Callable[[], tuple[int, Callable[[], None]]],
    ):  # fmt: skip
        self._keeper, self._state, self._token, self._host, self._new_store = keeper, state, token, host, new_store
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._members: dict[str, Member] = {}
        self._followers: dict[web.WebSocketResponse, asyncio.Queue[str]] = {}
        self._backlog: list[str] = []
        self._sending: set[asyncio.Future[None]] = set()
        self._wish: dict[str, Any] | None = None
        self._end_store: Callable[[], None] | None = None
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stopping = asyncio.Event()
        self._error: BaseException | None = None
        self.port = 0
        self._thread = threading.Thread(target=self._run, name="membership-server", daemon=True)

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self.port}"

    def start(self) -> None:
        """Listen; returns when the port is known."""
        self._thread.start()
        if not self._ready.wait(30):
            raise TimeoutError("the membership server did not start within 30 s")
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End the server and its thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(10)

    def publish(self, record: dict[str, Any], *, keep: bool) -> None:
        """Send a row or event to all followers; `keep` it for those who come later. From any thread."""
        text = json.dumps(record)
        self._loop.call_soon_threadsafe(self._publish, text, keep)

    def send_all(self, message: dict[str, Any]) -> None:
        """Send a message to all workers. From any thread."""
        self._loop.call_soon_threadsafe(self._broadcast, message)

    # ---- the server's own thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # the starter re-raises it
            self._error = error
            self._ready.set()
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        app = web.Application(middlewares=[self._authorise], client_max_size=MAX_MESSAGE_BYTES)
        app.router.add_get("/worker", self._on_worker)
        app.router.add_get("/follow", self._on_follow)
        app.router.add_post("/wish", self._on_wish)
        app.router.add_post("/close", self._on_close)
        app.router.add_get("/status", self._on_status)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, self._host, 0)
        await site.start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        ticker = asyncio.create_task(self._tick())
        await self._stopping.wait()
        ticker.cancel()
        for queue in self._followers.values():
            queue.put_nowait("")
        for socket in list(self._sockets.values()):
            await socket.close()
        with contextlib.suppress(asyncio.CancelledError):
            await ticker
        await runner.cleanup()
        if self._end_store:
            self._end_store()

    @web.middleware
    async def _authorise(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if not hmac.compare_digest(request.headers.get("Authorization", ""), f"Bearer {self._token}"):
            raise web.HTTPUnauthorized(text="wrong or missing token")
        return await handler(request)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            self._handle(Tick(time.monotonic()))

    def _handle(self, event: Event) -> None:
        self._state, commands = advance(self._state, event)
        for command in commands:
            self._execute(command)

    def _execute(self, command: Command) -> None:
        if isinstance(command, Refuse):
            self._send(command.member_id, {"kind": "refused", "reason": command.reason})
        elif isinstance(command, Break):
            self._keeper.world_broken(command.world, command.lost)
            message = {"kind": "broken", "generation": str(command.world.generation)}
            for member in command.world.members:
                self._send(member.id, message)
        elif isinstance(command, Form):
            self._form(command.world)

    def _form(self, world: World) -> None:
        if self._end_store:
            self._end_store()
        port, self._end_store = self._new_store()
        self._keeper.world_formed(world)
        restore = self._keeper.restore_point()
        for rank, member in enumerate(world.members):
            self._send(
                member.id,
                {
                    "kind": "world", "generation": str(world.generation), "rank": rank, "size": world.size,
                    "store": [self._host, port], "restore": restore,
                },
            )  # fmt: skip
        if self._wish:
            self._broadcast(self._wish)

    def _send(self, member_id: str, message: dict[str, Any]) -> None:
        socket = self._sockets.get(member_id)
        if socket is not None and not socket.closed:
            sending = asyncio.ensure_future(_send_quietly(socket, json.dumps(message)))
            self._sending.add(sending)  # the loop itself holds tasks only weakly
            sending.add_done_callback(self._sending.discard)

    def _broadcast(self, message: dict[str, Any]) -> None:
        for member_id in list(self._sockets):
            self._send(member_id, message)

    def _publish(self, text: str, keep: bool) -> None:
        if keep:
            self._backlog.append(text)
        for queue in self._followers.values():
            queue.put_nowait(text)

    # ---- routes ------------------------------------------------------------------------------------------------

    async def _on_worker(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(max_msg_size=MAX_MESSAGE_BYTES, heartbeat=None)
        await socket.prepare(request)
        member_id = request.query["id"]
        self._sockets[member_id] = socket
        try:
            async for raw in socket:
                if raw.type == WSMsgType.TEXT:
                    self._from_worker(member_id, json.loads(raw.data))
        finally:
            if self._sockets.get(member_id) is socket:
                del self._sockets[member_id]
                self._handle(Lost(member_id, time.monotonic()))
        return socket

    def _from_worker(self, member_id: str, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "beat":
            self._send(member_id, {"kind": "beat"})
        elif kind == "join":
            member = Member(
                member_id, message["group"], message["node"], message["local_index"], message["pid"], message["host"]
            )
            self._members[member_id] = member
            self._keeper.worker_joined(member, message)
            self._handle(Joined(member, message["group_size"], time.monotonic()))
        else:
            world = self._state.world
            generation = Generation.parse(message["generation"])
            if world is None or generation != world.generation or world.rank_of(member_id) is None:
                return  # fenced: whoever is not in the newest world has nothing to say about the run
            if kind == "done":
                self._handle(Done(member_id))
            self._keeper.receive(self._members[member_id], generation, message)

    async def _on_follow(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        queue: asyncio.Queue[str] = asyncio.Queue()
        for text in self._backlog:
            queue.put_nowait(text)
        self._followers[socket] = queue
        try:
            while text := await queue.get():
                await socket.send_str(text)
        except ConnectionError:
            return socket  # the follower went away
        finally:
            del self._followers[socket]
        await socket.close()
        return socket

    async def _on_wish(self, request: web.Request) -> web.Response:
        self._wish = {**await request.json(), "kind": "wish"}
        self._broadcast(self._wish)
        return web.json_response({"ok": True})

    async def _on_close(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._keeper.close_run(body["status"], body.get("message", ""))
        return web.json_response({"ok": True})

    async def _on_status(self, _: web.Request) -> web.Response:
        return web.json_response(self._keeper.status())


async def _send_quietly(socket: web.WebSocketResponse, text: str) -> None:
    with contextlib.suppress(ConnectionError):  # its reader notices, and reports the worker lost
        await socket.send_str(text)
