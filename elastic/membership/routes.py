"""The membership server's HTTP routes for drivers and controllers.

GET  /follow   WebSocket of a driver: rows and events as they are recorded
POST /wish     {"kind": "stop"|"save", "detail": ...}: acted on at a step boundary
POST /close    {"status": ..., "message": ...}: the driver knows that no worker will go on
GET  /status   the keeper's view of the run, as JSON
GET  /group    who is in, who waits, who is gone: what the controller of the workers goes by
POST /lost     {"ids": [...], "ended": bool}: workers that are gone; whether their processes are known to have ended
POST /event    {"kind": ..., "detail": ...}: for the ledger
POST /notice   {"node": ..., "remaining_s": ...}: a node goes away
POST /expected {"ids": [...]}: after a restart, the workers that exist
"""

from __future__ import annotations

import time
from collections.abc import Callable

from aiohttp import web

from elastic.membership.connections import Connections
from elastic.membership.execution import Executor
from elastic.membership.messages import Event, Expected, Lost, Notice
from elastic.membership.protocol import Keeper
from elastic.membership.state import State, describe


class Routes:
    """Turns requests into events for the decisions, and into calls of the keeper.

    Args:
        handle: takes an event.
        state: returns the present state.
    """

    def __init__(
        self, keeper: Keeper, connections: Connections, executor: Executor, handle: Callable[[Event], None],
        state: Callable[[], State],
    ):  # fmt: skip
        self._keeper, self._connections, self._executor = keeper, connections, executor
        self._handle, self._state = handle, state

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Register all of them."""
        router.add_get("/follow", self._follow)
        router.add_post("/wish", self._wish)
        router.add_post("/close", self._close)
        router.add_get("/status", self._status)
        router.add_get("/group", self._group)
        router.add_post("/lost", self._lost)
        router.add_post("/event", self._event)
        router.add_post("/notice", self._notice)
        router.add_post("/expected", self._expected)

    async def _follow(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await self._connections.follow(socket)
        return socket

    async def _wish(self, request: web.Request) -> web.Response:
        self._executor.wish(await request.json())
        return web.json_response({"ok": True})

    async def _close(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._keeper.close_run(body["status"], body.get("message", ""))
        return web.json_response({"ok": True})

    async def _status(self, _: web.Request) -> web.Response:
        return web.json_response(self._keeper.status())

    async def _group(self, _: web.Request) -> web.Response:
        seen = describe(self._state(), time.monotonic())
        return web.json_response({**seen, "condemned": sorted(self._executor.given_up)})

    async def _lost(self, request: web.Request) -> web.Response:
        body = await request.json()
        reason = "process died" if body["ended"] else "its node is gone, or it was given up"
        for member_id in body["ids"]:
            self._handle(Lost(member_id, time.monotonic(), reason, dead=body["ended"]))
        return web.json_response({"ok": True})

    async def _event(self, request: web.Request) -> web.Response:
        body = await request.json()
        self._keeper.event(body["kind"], detail=body["detail"])
        return web.json_response({"ok": True})

    async def _notice(self, request: web.Request) -> web.Response:
        body, now = await request.json(), time.monotonic()
        if body["node"] not in self._state().notices:
            self._keeper.event("notice", node=body["node"], seconds=round(body["remaining_s"], 1), detail="goes away")
        self._handle(Notice(body["node"], now + body["remaining_s"], now))
        return web.json_response({"ok": True})

    async def _expected(self, request: web.Request) -> web.Response:
        self._handle(Expected(frozenset((await request.json())["ids"]), time.monotonic()))
        return web.json_response({"ok": True})
