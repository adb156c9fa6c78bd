"""`elastic page`: a small server on the loopback address. Static files, JSON and server-sent events.

GET  /                  the page and its files, without a token, because they contain nothing of any run
GET  /api/runs          the list of runs
GET  /api/run?run=      everything that is shown of one run (`looking.Onlooker`)
GET  /api/stream?run=   server-sent events: `runs` every few seconds, `run` whenever the run has changed
GET  /api/logs?run=&worker=  the newest lines that a worker printed
POST /api/VERB          stop, checkpoint, scale, drain (`asking`): lines of JSON that report the progress

A refused request is answered by an HTTP status and {"error": one sentence}.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from aiohttp import web

from elastic.errors import ConfigError, ElasticError, one_line
from elastic.observe.ledger import finite
from elastic.redact import redact
from elastic.run.folder import CONFIG, STATUS
from elastic.storage import Storage
from elastic.tools.live import NotLive, connect
from elastic.tools.looking import LOGS, Onlooker
from elastic.tools.page.access import HEADERS, refusal
from elastic.tools.page.asking import MAX_BYTES, VERBS, carry_out, read
from elastic.tools.registry import list_runs
from elastic.tools.target import list_names, open_run

LOOK_S = 1.0  # between two reads of a run that somebody watches
LIST_S = 5.0
MOST_LOOK_S = 30.0  # after this time the page reports that the storage does not answer
LOG_BYTES = 64 << 10  # of a worker's log, the newest that are shown
KEPT = 16  # the most runs that are kept in memory after somebody looked at them
_STATIC = {
    "": ("index.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    "page.js": ("page.js", "text/javascript"),
    "charts.js": ("charts.js", "text/javascript"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}


class Runs:
    """The runs of a folder, which may also be a single run. Its methods read storage, so they are called on threads."""

    def __init__(self, url: str):
        self.storage = Storage(url, option="URL", read_only=True)
        self.alone = bool({CONFIG, STATUS} & set(list_names(self.storage)))
        self.place = redact(self.storage.url)
        self._name = self.storage.url.rstrip("/").rsplit("/", 1)[-1]
        self._lock = threading.Lock()
        self._looks: dict[str, tuple[threading.Lock, Onlooker]] = {}
        self._newest: dict[str, tuple[float, dict[str, Any]]] = {}

    def list(self) -> dict[str, Any]:
        """Return the list of runs for the page."""
        if self.alone:
            runs = [{"name": self._name, "status": "", "step": 0, "total_steps": None, "problem": ""}]
        else:
            runs = [asdict(run) for run in list_runs(self.storage.url)]
        return {"place": self.place, "alone": self.alone, "runs": runs}

    def url_of(self, name: str) -> str:
        """Return the URL of a run.

        Raises:
            ConfigError: `name` cannot be the name of a run in this folder.
        """
        if self.alone and name == self._name:
            return self.storage.url
        if not name or len(name) > 255 or name.startswith(".") or not name.isprintable() or {"/", "\\"} & set(name):
            raise ConfigError(f"there is no run {name[:100]!r}")
        return f"{self.storage.url}/{name}"

    def look(self, name: str) -> dict[str, Any]:
        """Return what is shown of a run, at most LOOK_S seconds old. A run is read once, however many watch it."""
        url = self.url_of(name)
        with self._lock:
            if name not in self._looks:
                if len(self._looks) >= KEPT:
                    oldest = min(self._looks, key=lambda n: self._newest.get(n, (0.0, {}))[0])
                    del self._looks[oldest]
                    self._newest.pop(oldest, None)
                self._looks[name] = (threading.Lock(), Onlooker(open_run(url, read_only=True)))
            lock, onlooker = self._looks[name]
        with lock:
            at, found = self._newest.get(name, (float("-inf"), {}))
            if time.monotonic() - at >= 0.9 * LOOK_S:
                found = {**onlooker.look(), "name_in_list": name}
                self._newest[name] = (time.monotonic(), found)
            return found

    def log(self, name: str, worker: str) -> dict[str, Any]:
        """The end of what a worker printed.

        Raises:
            ConfigError: there is no such worker, or it printed nothing.
        """
        storage = open_run(self.url_of(name), read_only=True).storage
        if f"{worker}.txt" not in storage.names(LOGS):  # so it is no path either
            raise ConfigError(f"there is no log of a worker {worker[:100]!r}")
        file = f"{LOGS}/{worker}.txt"
        size = storage.size(file)
        lines = storage.read(file, max(0, size - LOG_BYTES), size).decode(errors="replace").split("\n")
        return {"text": redact("\n".join(lines[1:] if size > LOG_BYTES else lines))}


class Page:
    """The server. Everyone who has `token` may do what the user who started the server may do."""

    def __init__(self, url: str, token: str | None = None):
        self.runs = Runs(url)
        self.token = token or secrets.token_urlsafe(24)
        self.port = 0

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=MAX_BYTES)
        app.router.add_get("/api/runs", self._runs)
        app.router.add_get("/api/run", self._run)
        app.router.add_get("/api/stream", self._stream)
        app.router.add_get("/api/logs", self._logs)
        for verb in VERBS:
            app.router.add_post(f"/api/{verb}", self._act)
        for name in _STATIC:
            app.router.add_get(f"/{name}", self._static)
        return app

    @property
    def link(self) -> str:
        return f"http://127.0.0.1:{self.port}/#token={self.token}"

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        refused = refusal(request.method, request.path, request.headers, self.port, self.token)
        if refused is not None:
            return _error(*refused)
        try:
            answer: web.StreamResponse = await handler(request)
        except web.HTTPException as error:
            return _error(error.status, error.reason)
        except NotLive as error:
            return _error(409, redact(str(error)))
        except ElasticError as error:
            return _error(400, redact(str(error)))
        except OSError as error:  # from storage
            return _error(502, redact(one_line(error)))
        return answer

    async def _static(self, request: web.Request) -> web.Response:
        name, kind = _STATIC[request.path[1:]]
        data = (files("elastic.tools.page") / "static" / name).read_bytes()
        return web.Response(body=data, content_type=kind, charset="utf-8", headers=HEADERS)

    async def _runs(self, _: web.Request) -> web.Response:
        return _json(await _aside(self.runs.list))

    async def _run(self, request: web.Request) -> web.Response:
        return _json(await _aside(self.runs.look, request.query.get("run", "")))

    async def _logs(self, request: web.Request) -> web.Response:
        return _json(await _aside(self.runs.log, request.query.get("run", ""), request.query.get("worker", "")))

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        name = request.query.get("run", "")
        if name:
            self.runs.url_of(name)
        answer = web.StreamResponse(headers={**HEADERS, "Content-Type": "text/event-stream"})
        await answer.prepare(request)
        listed_at, sent = float("-inf"), ""
        while request.transport is not None and not request.transport.is_closing():
            if time.monotonic() - listed_at >= LIST_S:
                listed_at = time.monotonic()
                await self._send(answer, "runs", self.runs.list)
            if name:
                began = time.monotonic()
                sent = await self._send(answer, "run", lambda: self.runs.look(name), sent)
                await asyncio.sleep(max(LOOK_S, 3 * (time.monotonic() - began)))
            else:
                await asyncio.sleep(LIST_S)
        return answer

    async def _send(self, answer: web.StreamResponse, kind: str, find: Callable[[], Any], sent: str = "") -> str:
        """Send an event with what `find` returns, unless it equals `sent`, the result of the call before.

        Returns:
            the text by which the next call decides whether something changed; the run's age is not in it.
        """
        try:
            found = await _aside(find)
        except (ElasticError, OSError) as error:
            kind, found = "problem", {"error": redact(one_line(error))}
        text = json.dumps(finite(found), allow_nan=False)
        news = text if kind != "run" else json.dumps(finite({**found, "age_s": None}), allow_nan=False)
        if news == sent:
            await answer.write(b": nothing new\n\n")  # this fails if the browser has gone
        else:
            await answer.write(f"event: {kind}\ndata: {text}\n\n".encode())
        return news

    async def _act(self, request: web.Request) -> web.StreamResponse:
        verb = request.path.rpartition("/")[2]
        fields = read(verb, await request.read())
        run = await _aside(lambda: connect(open_run(self.runs.url_of(fields["run"])), verb))
        answer = web.StreamResponse(headers={**HEADERS, "Content-Type": "application/x-ndjson"})
        await answer.prepare(request)
        loop, lines = asyncio.get_running_loop(), asyncio.Queue[dict[str, str] | None]()

        def put(line: dict[str, str] | None) -> None:
            loop.call_soon_threadsafe(lines.put_nowait, line)

        def act() -> None:
            try:
                put({"done": carry_out(verb, run, fields, lambda text: put({"say": text}))})
            except (ElasticError, OSError) as error:
                put({"error": redact(one_line(error))})
            finally:
                put(None)

        threading.Thread(target=act, name=f"page-{verb}", daemon=True).start()
        while (line := await lines.get()) is not None:
            await answer.write((json.dumps(line) + "\n").encode())
        return answer


def _json(values: Any) -> web.Response:
    text = json.dumps({"format": 1, **finite(values)}, allow_nan=False)
    return web.Response(text=text, content_type="application/json", headers=HEADERS)


def _error(status: int, sentence: str) -> web.Response:
    return web.Response(
        status=status, text=json.dumps({"error": sentence}), content_type="application/json", headers=HEADERS
    )


async def _aside(find: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that reads storage on a thread.

    Raises:
        ElasticError: the call takes longer than MOST_LOOK_S.
    """
    try:
        return await asyncio.wait_for(asyncio.to_thread(find, *arguments), MOST_LOOK_S)
    except TimeoutError:
        raise ElasticError(f"the storage did not answer for {MOST_LOOK_S:g} s; it is asked again") from None


async def serve(page: Page, port: int, ready: Callable[[str], None], until: asyncio.Event | None = None) -> None:
    """Serve until the task is cancelled or `until` is set. `ready` is called with the link.

    Raises:
        ConfigError: the port cannot be used.
    """
    runner = web.AppRunner(page.application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", port)
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(f"--port is {port}, which cannot be used ({one_line(error)}); give another") from error
        page.port = runner.addresses[0][1]
        ready(page.link)
        await (until or asyncio.Event()).wait()
    finally:
        await runner.cleanup()
