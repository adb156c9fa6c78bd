"""The membership server: a small aiohttp server that hosts the state machine and relays to the keeper of the run.

    GET  /worker   WebSocket of a worker: join, beat, done, and whatever the keeper understands
    GET  /follow   WebSocket of a driver: rows and events as they are recorded
    POST /wish     {"kind": "stop"|"save", "detail": ...}: acted on at a step boundary
    POST /close    {"status": ..., "message": ...}: the driver knows that no worker will go on
    GET  /status   the keeper's view of the run, as JSON
    GET  /group    who is in, who waits, who is gone: what the controller of the workers goes by
    POST /lost     {"ids": [...], "ended": bool}: workers that are gone; whether their processes are known to have ended
    POST /event    {"kind": ..., "detail": ...}: for the ledger
    POST /notice   {"node": ..., "remaining_s": ...}: a node goes away
    POST /expected {"ids": [...]}: after a restart, the workers that exist

Every request carries the run's bearer token. The server runs on a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from aiohttp import WSMsgType, web

from elastic.membership.state import (
    Acknowledged,
    Break,
    Command,
    Done,
    Event,
    Expected,
    Fail,
    Failure,
    Form,
    Generation,
    GiveUp,
    HandOver,
    Joined,
    Leave,
    LeftOut,
    Lost,
    Member,
    Notice,
    Park,
    Phase,
    Refuse,
    Registered,
    SaveNow,
    State,
    Suspect,
    Tick,
    Unfit,
    World,
    advance,
    describe,
)
from elastic.membership.watch import Progress, excuse, hung, p95, silent

BEAT_S = 1.0
SILENT_S = 5.0
STACKS_S = 1.0
MAX_MESSAGE_BYTES = 256 << 20


class Keeper(Protocol):
    """What the server relays to. Called on the server's thread: must not block."""

    def event(self, kind: str, **fields: Any) -> None: ...

    def world_formed(self, world: World) -> None: ...

    def world_broken(self, world: World, lost: Member | None, reason: str) -> None: ...

    def receive(self, member: Member, generation: Generation, message: dict[str, Any]) -> None: ...

    def restore_point(self) -> dict[str, Any]: ...

    def last_step(self) -> int: ...

    def claim_step(self) -> int: ...

    def save_stacks(self, member: Member, text: str) -> None: ...

    def close_run(self, status: str, message: str) -> None: ...

    def set_status(self, status: str) -> None: ...

    def giving_up(self, message: str) -> None: ...

    def status(self) -> dict[str, Any]: ...


class MembershipServer:
    """Hosts one run's membership.

    Args:
        host, port: address to listen on; workers on other hosts must reach it.
        hang_s: fixed hang time-out, or None for one that goes by the steps seen.
        new_store: makes the rendezvous store of a new world; returns its port and a function that ends it.
    """

    def __init__(
        self, keeper: Keeper, state: State, token: str, *, host: str, port: int = 0, hang_s: float | None = None,
        new_store: Callable[[], tuple[int, Callable[[], None]]],
    ):  # fmt: skip
        self._keeper, self._state, self._token, self._host, self._new_store = keeper, state, token, host, new_store
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._members: dict[str, Member] = {}
        self._heard: dict[str, float] = {}
        self._excused_until = 0.0
        self._progress: dict[str, Progress] = {}
        self._stacks: dict[str, str] = {}
        self._condemned: set[str] = set()
        self._said_done: frozenset[str] = frozenset()
        self._given_up: set[str] = set()  # whose processes the controller is to end
        self._step_times: deque[float] = deque(maxlen=100)
        self._hang_s = hang_s
        self._followers: dict[web.WebSocketResponse, asyncio.Queue[str]] = {}
        self._backlog: list[str] = []
        self._tasks: set[asyncio.Future[None]] = set()
        self._wish: dict[str, Any] | None = None
        self._end_store: Callable[[], None] | None = None
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

    def gone(self) -> frozenset[str]:
        """Members that were lost before they said that they are done. From any thread."""
        return self._state.gone - self._said_done

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
        app.router.add_get("/group", self._on_group)
        app.router.add_post("/lost", self._on_lost)
        app.router.add_post("/event", self._on_event)
        app.router.add_post("/notice", self._on_notice)
        app.router.add_post("/expected", self._on_expected)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, self._host, self.port)
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
        self._drop_store()

    @web.middleware
    async def _authorise(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if not hmac.compare_digest(request.headers.get("Authorization", ""), f"Bearer {self._token}"):
            raise web.HTTPUnauthorized(text="wrong or missing token")
        return await handler(request)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.05)
            now = time.monotonic()
            self._handle(Tick(now))
            self._lose_silent(now)
            world = self._state.world
            if world is None or self._state.phase is not Phase.RUNNING:
                continue
            here = {m.id: self._progress[m.id] for m in world.members if m.id in self._progress}
            if len(here) == world.size:
                as_of = min(self._heard.get(m.id, 0.0) for m in world.members)  # silence is not standing still
                for member_id in hung(here, as_of, p95(self._step_times), self._hang_s):
                    if member_id not in self._condemned:
                        self._condemned.add(member_id)
                        self._start(self._evict(member_id, world))

    def _lose_silent(self, now: float) -> None:
        world, lease_s = self._state.world, self._state.limits.lease_s
        members = [m.id for m in world.members] if world else []
        self._excused_until = excuse(self._excused_until, self._heard, now, SILENT_S, members)
        for member_id in silent(self._heard, now, SILENT_S, members, lease_s, self._excused_until):
            silent_s = now - self._heard.pop(member_id)
            self._refuse(member_id, "it was silent, and its world went on without it")
            self._handle(Lost(member_id, now, f"silent for {silent_s:.0f} s", dead=silent_s > lease_s))

    async def _evict(self, member_id: str, world: World) -> None:
        """Name the member that everyone waits for, save all stacks, and go on without it."""
        where = self._progress[member_id]
        for member in world.members:
            self._send(member.id, {"kind": "dump"})
        await asyncio.sleep(STACKS_S)
        for member in world.members:
            text = self._stacks.pop(member.id, "no answer: the process is stopped, or its watcher is")
            self._keeper.save_stacks(member, text)
        lost = self._members[member_id]
        self._keeper.event(
            "member_evicted", generation=str(world.generation), member=lost.id, node=lost.node, pid=lost.pid,
            step=where.position[0] + 1, detail=f"hung in {where.phase}, microbatch {where.position[2]}",
        )  # fmt: skip
        self._refuse(member_id, "it hung, and its world went on without it")
        self._handle(Lost(member_id, time.monotonic(), f"hung in {where.phase}"))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)

    def _handle(self, event: Event) -> None:
        self._state, commands = advance(self._state, event)
        for command in commands:
            self._execute(command)

    def _execute(self, command: Command) -> None:
        keeper = self._keeper
        if isinstance(command, Form):
            self._form(command.world)
        elif isinstance(command, Break):
            self._drop_store()
            keeper.world_broken(command.world, command.lost, command.reason)
            self._tell(command.world, {"kind": "broken", "generation": str(command.world.generation)})
        elif isinstance(command, Leave):
            keeper.event("notice", generation=str(command.world.generation), detail=f"re-forming: {command.why}")
            self._tell(command.world, {"kind": "wish", "wish": "leave", "detail": command.why})
        elif isinstance(command, SaveNow):
            self._tell(command.world, {"kind": "wish", "wish": "save", "detail": "a node goes away"})
        elif isinstance(command, Suspect):
            keeper.event("member_suspected", member=command.member.id, node=command.member.node)
            self._refuse(command.member.id, "it did not acknowledge in time that its world was broken")
        elif isinstance(command, Refuse):
            self._refuse(command.member_id, command.reason)
        elif isinstance(command, LeftOut):
            keeper.event("notice", member=command.member.id, detail=f"left out: {command.reason}")
        elif isinstance(command, HandOver):
            keeper.event("handed_over", member=command.member.id, node=command.member.node)
            self._send(command.member.id, {"kind": "over", "status": "handed over"})
        elif isinstance(command, Park):
            keeper.set_status("parked")
            keeper.event(
                "parked",
                detail=f"{command.have} workers, waiting for at least {command.need}: add nodes, or stop the run",
            )
        elif isinstance(command, GiveUp):
            self._give_up(command)
        elif isinstance(command, Fail):
            keeper.close_run("failed", command.message)

    def _give_up(self, command: GiveUp) -> None:
        if command.saver is None:
            self._keeper.close_run("failed", command.message)
        else:
            self._keeper.giving_up(command.message)
            self._send(command.saver.id, {"kind": "save alone"})

    def _refuse(self, member_id: str, reason: str) -> None:
        self._given_up.add(member_id)
        self._send(member_id, {"kind": "refused", "reason": reason})

    def _tell(self, world: World, message: dict[str, Any]) -> None:
        for member in world.members:
            self._send(member.id, message)

    def _drop_store(self) -> None:
        """Dropping a store's server frees everyone who still waits in it."""
        if self._end_store:
            self._end_store()
            self._end_store = None

    def _form(self, world: World) -> None:
        self._drop_store()
        port, self._end_store = self._new_store()
        self._progress = {}
        self._condemned.clear()
        if self._keeper.status()["status"] == "parked":
            self._keeper.set_status("running")
            self._keeper.event("resumed", generation=str(world.generation))
        self._keeper.world_formed(world)
        message = {
            "kind": "world", "generation": str(world.generation), "size": world.size, "store": [self._host, port],
            "restore": self._keeper.restore_point(), "last_step": self._keeper.last_step(),
            "claim_step": self._keeper.claim_step(),
        }  # fmt: skip
        for rank, member in enumerate(world.members):
            self._send(member.id, {**message, "rank": rank})
        if self._wish:
            self._broadcast(self._wish)

    def _send(self, member_id: str, message: dict[str, Any]) -> None:
        socket = self._sockets.get(member_id)
        if socket is not None and not socket.closed:
            self._start(_send_quietly(socket, json.dumps(message)))

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
        self._heard[member_id] = time.monotonic()
        try:
            async for raw in socket:
                if raw.type == WSMsgType.TEXT:
                    self._heard[member_id] = time.monotonic()
                    self._from_worker(member_id, json.loads(raw.data))
        finally:
            if self._sockets.get(member_id) is socket:
                del self._sockets[member_id]
                self._heard.pop(member_id, None)
                self._handle(Lost(member_id, time.monotonic()))
        return socket

    def _from_worker(self, member_id: str, message: dict[str, Any]) -> None:
        kind, now = message["kind"], time.monotonic()
        if kind == "beat":
            self._send(member_id, {"kind": "beat", "sent": message["sent"]})
            if "position" in message:
                self._note_progress(member_id, message, now)
        elif kind == "join":
            failure = Failure(**message["failure"]) if message.get("failure") else None
            if member_id not in self._members:
                self._announce(message)
            self._members[member_id] = Member(**message["member"])
            self._handle(Joined(self._members[member_id], now, message["applied"], failure))
        elif kind == "hello":
            self._members[member_id] = member = Member(**message["member"])
            generation = Generation.parse(message["generation"])
            self._handle(Registered(member, generation, message["rank"], message["size"], now))
        elif kind == "unfit":
            self._keeper.event("member_lost", member=member_id, detail=message["message"])
            self._handle(Unfit(member_id, message["message"], now))
        elif kind == "ack":
            self._handle(Acknowledged(member_id, now))
        elif kind == "stacks":
            self._stacks[member_id] = message["text"]
        else:
            self._from_member(member_id, message)

    def _announce(self, message: dict[str, Any]) -> None:
        member = message["member"]
        self._keeper.event(
            "worker_warm", member=member["id"], node=member["node"], pid=member["pid"],
            seconds=message["warm_s"], detail={"device": member["device"], **message["warm_parts"]},
        )  # fmt: skip

    def _note_progress(self, member_id: str, message: dict[str, Any], now: float) -> None:
        world = self._state.world
        if world is None or message["generation"] != str(world.generation):
            return
        step, stage, microbatch = message["position"]
        position, known = (step, stage, microbatch), self._progress.get(member_id)
        if known is None or known.position != position or known.phase != message["phase"]:
            self._progress[member_id] = Progress(position, message["phase"], now)

    def _from_member(self, member_id: str, message: dict[str, Any]) -> None:
        world = self._state.world
        generation = Generation.parse(message["generation"])
        fenced = world is None or generation != world.generation or world.rank_of(member_id) is None
        if fenced or member_id in self._state.gone:
            return  # whoever is not in the newest world has nothing to say about the run
        if message["kind"] == "done":
            self._said_done |= {member_id}
            self._handle(Done(member_id))
        if message["kind"] == "rows":
            self._step_times.extend(r["step_s"] for r in message["rows"] if "step_s" in r)
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

    async def _on_group(self, _: web.Request) -> web.Response:
        return web.json_response({**describe(self._state), "condemned": sorted(self._given_up)})

    async def _on_lost(self, request: web.Request) -> web.Response:
        body = await request.json()
        reason = "process died" if body["ended"] else "its node is gone, or it was given up"
        for member_id in body["ids"]:
            self._handle(Lost(member_id, time.monotonic(), reason, dead=body["ended"]))
        return web.json_response({"ok": True})

    async def _on_event(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._keeper.event(body["kind"], detail=body["detail"])
        return web.json_response({"ok": True})

    async def _on_notice(self, request: web.Request) -> web.Response:
        body, now = await request.json(), time.monotonic()
        if body["node"] not in self._state.notices:
            self._keeper.event("notice", node=body["node"], seconds=round(body["remaining_s"], 1), detail="goes away")
        self._handle(Notice(body["node"], now + body["remaining_s"], now))
        return web.json_response({"ok": True})

    async def _on_expected(self, request: web.Request) -> web.Response:
        self._handle(Expected(frozenset((await request.json())["ids"]), time.monotonic()))
        return web.json_response({"ok": True})

    async def _on_status(self, _: web.Request) -> web.Response:
        return web.json_response(self._keeper.status())


async def _send_quietly(socket: web.WebSocketResponse, text: str) -> None:
    with contextlib.suppress(ConnectionError):  # its reader notices, and reports the worker lost
        await socket.send_str(text)
