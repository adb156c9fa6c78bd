"""The membership server's HTTP routes for drivers, controllers and control commands.

GET  /follow   WebSocket of a driver: rows and events as they are recorded
POST /wish     {"wish": "stop"|"save", "detail": ...}: acted on at a step boundary
POST /allow    {"step": ...}: a run that holds after its evaluations may go up to this step
POST /close    {"status": ..., "message": ...}: no worker will go on, as the driver knows: end the run
GET  /status   the keeper's view of the run, as JSON
GET  /group    the members, the waiting and the lost workers, which the controller of the workers uses
POST /lost     {"ids": [...], "ended": bool, "detail": ...}: these workers are lost; whether their processes are known
to
               have ended, and how
POST /event    {"kind": ..., "detail": ...}: for the ledger
POST /notice   {"node": ..., "remaining_s": ...}: a node goes away
POST /yield    {"max_workers": ... or null, "to": [...]}: keep at most so many, as other runs of the cluster need theirs
POST /expected {"ids": [...]}: after a restart, the workers that exist
POST /grant    {"id": ..., "secret": ...}: a secret whose hash is in the run's folder opens the routes below, and /wish
GET  /metrics  figures for Prometheus; open to programs of this machine
GET  /stacks   where each worker is now: the stacks of all its threads
GET  /run      status, group and workers, for the commands that show them
POST /scale    {"max_workers": ..., "by": ...}
POST /drain    {"worker": a worker's id or its beginning, "seconds": ..., "by": ...}: it hands over and ends
POST /prune    {"policy": {...}, "yes": bool}: the checkpoints that the run's retention, so changed, does not keep

A request that is invalid (`protocol`) or cannot be carried out is answered with 400 and one sentence.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from aiohttp import web

from elastic.errors import ElasticError
from elastic.membership import protocol as asked
from elastic.membership.access import Access
from elastic.membership.connections import Connections
from elastic.membership.events import Drained, Event, Expected, Lost, Notice, Scaled, Stopped, Yielded
from elastic.membership.eviction import Watchman
from elastic.membership.execution import Executor
from elastic.membership.keeper import Keeper
from elastic.membership.state import Memory, State, describe, people
from elastic.membership.wire import Refused

T = TypeVar("T")

MAX_GRANT_BYTES = 4096


class Routes:
    """Turns requests into events for the decisions, and into calls of the keeper.

    Args:
        handle: takes an event.
        state: returns the present state.
        memory: what workers last said of theirs, by id.
    """

    def __init__(
        self,
        keeper: Keeper,
        connections: Connections,
        executor: Executor,
        watchman: Watchman,
        access: Access,
        handle: Callable[[Event], None],
        state: Callable[[], State],
        memory: Mapping[str, Memory],
    ):
        self._keeper, self._connections, self._executor = keeper, connections, executor
        self._watchman, self._access = watchman, access
        self._handle, self._state, self._memory = handle, state, memory
        self._granting = asyncio.Lock()

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Register all routes."""
        router.add_get("/follow", self._follow)
        router.add_post(asked.Wish.path, self._wish)
        router.add_post(asked.Allow.path, self._allow)
        router.add_post(asked.Close.path, self._close)
        router.add_get("/status", self._status)
        router.add_get("/group", self._group)
        router.add_post(asked.Gone.path, self._lost)
        router.add_post(asked.Note.path, self._event)
        router.add_post(asked.Leaving.path, self._notice)
        router.add_post(asked.Yield.path, self._yield)
        router.add_post(asked.Existing.path, self._expected)
        router.add_post(asked.Grant.path, self._grant)
        router.add_get("/run", self._run)
        router.add_get("/stacks", self._stacks)
        router.add_get("/metrics", self._metrics)
        router.add_post(asked.Scale.path, self._scale)
        router.add_post(asked.Drain.path, self._drain)
        router.add_post(asked.Prune.path, self._prune)
        router.add_post(asked.Damaged.path, self._damaged)

    async def _follow(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await self._connections.follow(socket)
        return socket

    async def _wish(self, request: web.Request) -> web.Response:
        wish = await _read(asked.Wish, request)
        self._executor.wish(asked.Wished(wish.wish, wish.detail))
        if wish.wish == "stop":
            self._handle(Stopped(wish.detail, time.monotonic()))
        return web.json_response({"ok": True})

    async def _allow(self, request: web.Request) -> web.Response:
        self._executor.allow((await _read(asked.Allow, request)).step)
        return web.json_response({"ok": True})

    async def _close(self, request: web.Request) -> web.Response:
        close = await _read(asked.Close, request)
        self._keeper.close_run(close.status, close.message)
        return web.json_response({"ok": True})

    async def _status(self, _: web.Request) -> web.Response:
        return web.json_response(self._keeper.status())

    async def _grant(self, request: web.Request) -> web.Response:
        grant = asked.read(asked.Grant, await _read_little(request))
        async with self._granting:  # anyone may send this: one at a time, so that no caller keeps storage busy
            if not await asyncio.to_thread(self._keeper.admits, grant.id, grant.secret):
                raise web.HTTPUnauthorized(text="the run's folder has no such grant")
        self._access.grant(grant.secret)
        return web.json_response({"ok": True})

    async def _run(self, _: web.Request) -> web.Response:
        state = self._state()
        return web.json_response(
            {
                "status": self._keeper.status(),
                "rows": self._keeper.recent_rows(),
                "group": describe(state, time.monotonic()),
                "workers": people(state, self._watchman.phases(), self._memory),
            }
        )

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(text=self._keeper.metrics(), content_type="text/plain")

    async def _stacks(self, _: web.Request) -> web.Response:
        async with self._granting:
            return web.json_response({"stacks": await self._watchman.stacks_now()})

    async def _scale(self, request: web.Request) -> web.Response:
        scale, limits = await _read(asked.Scale, request), self._state().limits
        wanted, most = scale.max_workers, limits.most_cells
        if wanted < limits.min_workers:
            raise _refusal(
                f"--max-workers is {wanted}, fewer than the run's --scaling.min-workers {limits.min_workers}"
            )
        if wanted % limits.cell_size:
            raise _refusal(
                f"--max-workers is {wanted}, no multiple of the run's --parallel.tensor {limits.cell_size}, the "
                "workers of a cell"
            )
        if most is not None and wanted > most * limits.cell_size:
            sizes = ((limits.stages, "stages"), (limits.cell_size, "workers"))
            of = " x ".join(f"{size} {what}" for size, what in sizes if size > 1)
            of = of and f", for {'pipelines' if limits.stages > 1 else 'cells'} of {of}"
            raise _refusal(
                f"--max-workers is {wanted}, more than the run's --batch.microbatches {limits.microbatches}{of}"
            )
        self._keeper.event("scaled", detail={"max_workers": wanted, "was": limits.max_workers, "by": scale.by})
        self._handle(Scaled(wanted, time.monotonic()))
        return web.json_response({"was": limits.max_workers})

    async def _drain(self, request: web.Request) -> web.Response:
        drain, now = await _read(asked.Drain, request), time.monotonic()
        workers = people(self._state())
        found = [w for w in workers if w["id"] == drain.worker] or [
            w for w in workers if w["id"].startswith(drain.worker)
        ]
        if len(found) != 1:
            names = ", ".join(w["id"] for w in found or workers)
            raise _refusal(f"WORKER is {drain.worker!r}, which is {'several' if found else 'none'} of {names}")
        (worker,) = found
        self._keeper.event("notice", member=worker["id"], node=worker["node"], detail=f"drained by {drain.by}")
        self._handle(Drained(worker["id"], now + drain.seconds, now))
        return web.json_response(worker)

    async def _prune(self, request: web.Request) -> web.Response:
        prune = await _read(asked.Prune, request)
        try:
            removals = await asyncio.wrap_future(self._keeper.prune(prune.changes(), yes=prune.yes))
        except ElasticError as error:
            raise _refusal(str(error)) from None
        return web.json_response({"removals": removals})

    async def _damaged(self, request: web.Request) -> web.Response:
        damaged = await _read(asked.Damaged, request)
        self._keeper.found_damaged(damaged.step, damaged.attempt, damaged.problem)
        return web.json_response({"ok": True})

    async def _group(self, _: web.Request) -> web.Response:
        seen = describe(self._state(), time.monotonic())
        return web.json_response({**seen, "condemned": sorted(self._executor.given_up)})

    async def _lost(self, request: web.Request) -> web.Response:
        gone = await _read(asked.Gone, request)
        reason = "process died" if gone.ended else "its node is gone, or it was given up"
        died = f"{reason}: {gone.detail}" if gone.detail else reason
        for member_id in gone.ids:
            if gone.detail:
                words = f"{gone.detail}\n{gone.said}" if gone.said else gone.detail
                self._keeper.event("process_ended", member=member_id, detail=words)
            self._handle(Lost(member_id, time.monotonic(), died, dead=gone.ended, died=gone.ended))
        return web.json_response({"ok": True})

    async def _event(self, request: web.Request) -> web.Response:
        note = await _read(asked.Note, request)
        self._keeper.event(note.kind, detail=note.detail)
        return web.json_response({"ok": True})

    async def _notice(self, request: web.Request) -> web.Response:
        leaving, now = await _read(asked.Leaving, request), time.monotonic()
        if leaving.node not in self._state().notices:
            self._keeper.event("notice", node=leaving.node, seconds=round(leaving.remaining_s, 1), detail="goes away")
        self._handle(Notice(leaving.node, now + leaving.remaining_s, now))
        return web.json_response({"ok": True})

    async def _yield(self, request: web.Request) -> web.Response:
        yields = await _read(asked.Yield, request)
        if yields.max_workers != self._state().ceiling:
            self._keeper.event("yielded", detail={"max_workers": yields.max_workers, "to": yields.to})
        self._handle(Yielded(yields.max_workers, time.monotonic()))
        return web.json_response({"ok": True})

    async def _expected(self, request: web.Request) -> web.Response:
        self._handle(Expected(frozenset((await _read(asked.Existing, request)).ids), time.monotonic()))
        return web.json_response({"ok": True})


async def _read(kind: type[T], request: web.Request) -> T:
    return asked.read(kind, await request.read())


async def _read_little(request: web.Request) -> bytes:
    """The body of a request that needs no token.

    Raises:
        Refused: the body is larger than any grant.
    """
    body = b""
    while piece := await request.content.read(MAX_GRANT_BYTES + 1 - len(body)):
        body += piece
        if len(body) > MAX_GRANT_BYTES:
            raise Refused(f"the request is larger than {MAX_GRANT_BYTES} bytes; give an id and a secret")
    return body


def _refusal(sentence: str) -> web.HTTPException:
    return web.HTTPBadRequest(text=sentence)
