"""The membership server: a small aiohttp server that hosts the decisions and relays messages to the run's keeper.

    GET  /worker   WebSocket of a worker: join, beat, done, and all messages that the keeper understands

and the routes of drivers, controllers and control commands (`routes`). Every request except a grant carries the run's
bearer token or a granted secret (`access`); connections without one are limited (`door`). The server runs on a thread
of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from aiohttp import WSMsgType, web

from elastic.child import raise_descriptor_limit
from elastic.membership import kernel
from elastic.membership import protocol as wire
from elastic.membership.access import Access
from elastic.membership.commands import Form, Rebuilt
from elastic.membership.connections import Connections
from elastic.membership.decisions import advance
from elastic.membership.door import QUEUE, Caller, Door
from elastic.membership.events import (
    Acknowledged,
    Arrived,
    Done,
    Event,
    Joined,
    Lost,
    Recorded,
    Registered,
    SavedAlone,
    Slept,
    Stalled,
    Stopped,
    Tick,
    Unable,
    Unfit,
)
from elastic.membership.eviction import Watchman
from elastic.membership.execution import Executor
from elastic.membership.keeper import Keeper
from elastic.membership.protocol import BEAT_S, MAX_MESSAGE_BYTES, SILENT_S
from elastic.membership.routes import Routes
from elastic.membership.state import Memory, State
from elastic.membership.watch import Progress
from elastic.membership.wire import Refused
from elastic.membership.world import Generation, Member

TICK_S = 0.05
_HERE = ("127.0.0.1", "::1")
MAX_REQUEST_BYTES = 4 << 20
MOST_REASON_BYTES = 120  # of the reason that a WebSocket is closed with
BEHIND_S = 0.1  # if a turn of the loop is late by this much, messages may have arrived that were not read yet


class MembershipServer:
    """Hosts one run's membership.

    Args:
        host, port: address to listen on; workers on other hosts must reach it.
        hang_s: fixed hang time-out in seconds, or None for one that is computed from the steps seen.
        new_store: makes the rendezvous store of a new world; returns its port and a function that ends it.
    """

    def __init__(
        self,
        keeper: Keeper,
        state: State,
        token: str,
        *,
        host: str,
        port: int = 0,
        hang_s: float | None = None,
        new_store: Callable[[], tuple[int, Callable[[], None]]],
    ):
        self._keeper, self._state, self._host = keeper, state, host
        self._access = Access(token)
        raise_descriptor_limit()
        self._connections, self._door = Connections(), Door()
        self._executor = Executor(keeper, self._connections, host, new_store)
        self._watchman = Watchman(keeper, self._connections, hang_s, self._give_up, self._handle)
        self._memory: dict[str, Memory] = {}
        self._routes = Routes(
            keeper,
            self._connections,
            self._executor,
            self._watchman,
            self._access,
            self._handle,
            lambda: self._state,
            self._memory,
        )
        self._members: dict[str, Member] = {}
        self._reported_done: frozenset[str] = frozenset()
        self._refused_reported: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stopping = asyncio.Event()
        self._error: BaseException | None = None
        self.port = port
        self._thread = threading.Thread(target=self._run, name="membership-server", daemon=True)

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self.port}"

    def start(self) -> None:
        """Begin to listen; returns when the port is known.

        Raises:
            TimeoutError: the server did not start within 30 s.
        """
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

    def gone(self) -> frozenset[str]:
        """Members that were lost before they reported that they are done. From any thread."""
        return self._state.gone - self._reported_done

    def publish(self, record: dict[str, Any], *, keep: bool) -> None:
        """Send a row or event to all followers; with `keep`, to later followers too. From any thread."""
        text = json.dumps(record)
        self._loop.call_soon_threadsafe(self._connections.publish, text, keep)

    def send_all(self, message: wire.HostMessage) -> None:
        """Send a message to all workers. From any thread."""
        self._loop.call_soon_threadsafe(self._connections.broadcast, message)

    def ask_to_stop(self, why: str) -> None:
        """Have the run saved and ended, as `elastic stop` does. From any thread."""
        self._loop.call_soon_threadsafe(self._stop_run, why)

    def _stop_run(self, why: str) -> None:
        self._executor.wish(wire.Wished("stop", why))
        self._handle(Stopped(why, time.monotonic()))

    def saved_alone(self, step: int) -> None:
        """A worker of a parked run saved; the newest committed checkpoint is of `step`. From any thread."""
        self._loop.call_soon_threadsafe(lambda: self._handle(SavedAlone(step, time.monotonic())))

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
        app = web.Application(middlewares=[self._authorise], client_max_size=MAX_REQUEST_BYTES)
        app.router.add_get("/worker", self._on_worker)
        self._routes.add_to(app.router)
        runner = web.AppRunner(app, shutdown_timeout=1.0)
        await runner.setup()
        server = runner.server
        assert server is not None
        listening = socket.create_server((self._host, self.port), backlog=QUEUE)
        listening.setblocking(False)
        self.port = listening.getsockname()[1]
        self._ready.set()
        letting_in = self._door.let_in(listening, lambda: Caller(server, self._loop, self._door))
        tasks = [asyncio.create_task(letting_in), asyncio.create_task(self._tick())]
        await self._stopping.wait()
        for task in tasks:
            task.cancel()
        await self._connections.close()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        listening.close()
        await runner.cleanup()
        self._executor.drop_store()

    @web.middleware
    async def _authorise(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if "Origin" in request.headers:
            raise web.HTTPForbidden(text="a web page may ask nothing of a run")
        if self._access.allows(request.headers.get("Authorization", ""), request.path):
            self._door.known(request.transport)
        elif request.path != "/grant" and not (request.path == "/metrics" and request.remote in _HERE):
            raise web.HTTPUnauthorized(text="wrong or missing token")
        try:
            if request.path != "/worker":
                wire.check_version(request.headers.get(wire.VERSION_HEADER), "the caller")
            return await handler(request)
        except Refused as error:
            raise web.HTTPBadRequest(text=str(error)) from None

    async def _tick(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            last, late_s = now, now - last - TICK_S
            if late_s > BEHIND_S:
                self._watchman.slept(late_s, now)
                self._handle(Slept(now))
            self._watchman.listen(self._state, now)
            self._handle(Tick(now))
            self._watchman.look(self._state, now)
            self._door.look(now)

    def _handle(self, event: Event) -> None:
        self._state, commands = advance(self._state, event)
        for command in commands:
            if isinstance(command, (Form, Rebuilt)):
                known = self._state.late.keys() | (command.world.ids if isinstance(command, Rebuilt) else set())
                self._watchman.new_world(known, time.monotonic())
            self._executor.execute(command)

    def _give_up(self, member_id: str, message: str, reason: str, dead: bool, silent: bool) -> None:
        if not silent:
            self._executor.refuse(member_id, message)
        self._handle(Lost(member_id, time.monotonic(), reason, dead=dead, silent=silent))

    # ---- workers -----------------------------------------------------------------------------------------------

    async def _on_worker(self, request: web.Request) -> web.StreamResponse:
        member_id = request.query.get("id")
        if not member_id:
            raise Refused("the worker gives no id; connect to /worker?id=...")
        socket = web.WebSocketResponse(max_msg_size=MAX_MESSAGE_BYTES, heartbeat=None)
        await socket.prepare(request)
        try:
            wire.check_version(request.query.get("protocol"), f"worker {member_id}")
            received = await self._next_message(socket, member_id, SILENT_S)
            if received is None:
                return socket
        except Refused as refused:  # it proved nothing yet: a worker with that id keeps its own connection
            await self._refuse(socket, member_id, refused)
            return socket
        self._admit(member_id, socket)
        try:
            while received is not None:
                self._watchman.received(member_id, time.monotonic())
                self._from_worker(member_id, *received)
                received = await self._next_message(socket, member_id)
        except Refused as refused:
            await self._refuse(socket, member_id, refused)
        finally:
            if self._connections.remove(member_id, socket):
                self._watchman.forget(member_id)
                self._handle(Lost(member_id, time.monotonic(), died=True))
        return socket

    async def _next_message(
        self, socket: web.WebSocketResponse, member_id: str, timeout_s: float | None = None
    ) -> tuple[wire.WorkerMessage | wire.MemberMessage, Generation | None] | None:
        """The worker's next message; None if its connection ended, or if none came within `timeout_s`.

        Raises:
            Refused: it is no valid message, or is sent in the name of another worker.
        """
        try:
            raw = await socket.receive(timeout_s)
        except TimeoutError:
            return None
        if raw.type is not WSMsgType.TEXT:
            return None
        message, generation = wire.from_worker(raw.data)
        if isinstance(message, (wire.Join, wire.Hello)) and message.member.id != member_id:
            raise Refused(f"member.id is {message.member.id!r}; give {member_id!r}, whose connection this is")
        return message, generation

    def _admit(self, member_id: str, socket: web.WebSocketResponse) -> None:
        """Use this connection for the worker from now on."""
        self._connections.add(member_id, socket)
        self._executor.welcome(member_id)
        self._handle(Arrived(member_id))
        connection = socket.get_extra_info("socket")
        probed_s = kernel.watch(connection, self._state.limits.lease_s) if connection is not None else BEAT_S
        self._watchman.connected(member_id, time.monotonic(), probed_s)
        ended = self._keeper.ended()
        if ended is not None:
            self._connections.send(member_id, wire.Over(ended))

    async def _refuse(self, socket: web.WebSocketResponse, member_id: str, refused: Refused) -> None:
        """Close the connection of a worker whose message is invalid, with the reason. The worker ends then."""
        if member_id not in self._refused_reported:
            self._refused_reported.add(member_id)
            self._keeper.event("message_refused", member=member_id, detail=str(refused))
        reason = str(refused).encode()[:MOST_REASON_BYTES]
        with contextlib.suppress(ConnectionError):  # the worker has gone already
            await socket.close(code=wire.REFUSED_CODE, message=reason)

    def _from_worker(
        self,
        member_id: str,
        message: wire.WorkerMessage | wire.MemberMessage,
        generation: Generation | None,
    ) -> None:
        now = time.monotonic()
        match message:
            case wire.Beat():
                self._connections.send(member_id, wire.BeatHeard(message.sent, self._watchman.beat_s))
                self._memory[member_id] = Memory(message.memory_bytes, message.device_memory)
                if message.at is not None:
                    self._note_progress(member_id, message.at, now)
            case wire.Join():
                member = _interned(message.member)
                if member_id not in self._members:
                    self._announce(member, message)
                self._members[member_id] = member
                failure, left = message.failure, (message.why, message.broke)
                self._handle(Joined(member, now, message.applied, failure, *left))
            case wire.Hello():
                self._members[member_id] = member = _interned(message.member)
                self._handle(Registered(member, message.at.generation, message.rank, message.size, now))
                self._note_progress(member_id, message.at, now)
            case wire.Unfit():
                self._keeper.event("member_lost", member=member_id, detail=message.message)
                self._handle(Unfit(member_id, message.message, now))
            case wire.Acknowledge():
                if self._state.world is not None and message.generation == self._state.world.generation:
                    self._handle(Acknowledged(member_id, now))
            case wire.Stacks():
                self._watchman.stacks(member_id, message.text)
            case wire.Report():
                self._keeper.save_stacks(self._members[member_id], message.text, of="connections")
            case _:
                assert generation is not None
                self._from_member(member_id, message, generation)

    def _announce(self, member: Member, join: wire.Join) -> None:
        self._keeper.event(
            "worker_warm",
            member=member.id,
            node=member.node,
            pid=member.pid,
            host=member.host or None,
            seconds=join.warm_s,
            detail={"device": member.device, **join.warm_parts},
        )

    def _note_progress(self, member_id: str, at: wire.Whereabouts, now: float) -> None:
        """Note the position of a member of the newest world, or of a worker that registers after a restart."""
        inside = self._state.world or self._state.registered.get(member_id)
        if inside is not None and at.generation == inside.generation:
            self._watchman.progress(member_id, Progress(at.position, now, at.where, tuple(at.samples)))

    def _from_member(self, member_id: str, message: wire.MemberMessage, generation: Generation) -> None:
        if not self._may_speak(member_id, generation):
            return
        match message:
            case wire.Done():
                self._reported_done |= {member_id}
                self._handle(Done(member_id))
            case wire.Failed():
                now = time.monotonic()
                self._handle(Unable(member_id, message.message, message.fresh, message.final, now))
                return
            case wire.Disconnected():
                self._handle(Stalled(f"worker {member_id}: {message.message}", time.monotonic()))
                return
            case wire.Rows() if message.rows:
                self._watchman.steps_took(r["step_s"] for r in message.rows if "step_s" in r)
                self._handle(Recorded(max(r["step"] for r in message.rows)))
        self._keeper.receive(self._members[member_id], generation, message)

    def _may_speak(self, member_id: str, generation: Generation) -> bool:
        """Whether the worker may send messages about the run: members of the newest world, and a worker that saves
        alone while the run is parked."""
        state = self._state
        if state.giving_up is not None and state.giving_up.saver is not None:
            return member_id == state.giving_up.saver.id
        if state.saver is not None and member_id == state.saver.id:
            return True
        known = state.world is not None and generation == state.world.generation and member_id in state.world.ids
        return known and member_id not in state.gone


def _interned(member: Member) -> Member:
    """The descriptions of most workers are equal texts: one copy is kept, which makes comparing them fast."""
    return replace(member, device=sys.intern(member.device), says=sys.intern(member.says))
