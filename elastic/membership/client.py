"""A worker's link to the membership server.

A watcher thread holds the WebSocket and keeps beating while the training thread computes; the two share a few
fields and a queue. Nothing the training thread calls here waits for the network, except `join`.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from elastic.errors import CheckpointError, FencedError, RunFailed, WorldBroken
from elastic.membership.server import BEAT_S, MAX_MESSAGE_BYTES
from elastic.membership.state import Generation


@dataclass(frozen=True)
class Assignment:
    """A world as one of its members sees it. `restore` says where state comes from for those who have none."""

    generation: Generation
    rank: int
    size: int
    store: tuple[str, int]
    restore: dict[str, Any]


class WorkerLink:
    """One worker's connection, from before its first world to its end.

    Args:
        url, token: of the membership server.
        worker_id: unique in the run.
        lease_s: longest silence of the server before `check` raises.
    """

    def __init__(self, url: str, token: str, worker_id: str, *, lease_s: float):
        self.worker_id = worker_id
        self._url, self._token, self._lease_s = url, token, lease_s
        self._outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()
        self._generation: Generation | None = None
        self._broken: set[str] = set()
        self._wish: dict[str, Any] | None = None
        self._fenced: str | None = None
        self._commits: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._heard = time.monotonic()
        self._progress: dict[str, Any] = {}
        self._loop = asyncio.new_event_loop()
        self._posted = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="membership-link", daemon=True)
        self._thread.start()

    # ---- the training thread -----------------------------------------------------------------------------------

    def join(self, message: dict[str, Any], timeout_s: float) -> Assignment:
        """Ask for a world and wait for it.

        Raises:
            FencedError: a newer group or claim owns the run.
            RunFailed: no world came within `timeout_s`, or the server is gone.
        """
        self._generation = None
        self._put({"kind": "join", **message})
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                answer = self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise RunFailed(
                    f"worker {self.worker_id} waited {timeout_s:.0f} s for a world; too few workers joined"
                ) from None
            if isinstance(answer, BaseException):
                raise RunFailed(f"lost the membership server at {self._url}: {answer}") from answer
            if answer["kind"] == "refused":
                raise FencedError(f"worker {self.worker_id} was refused: {answer['reason']}")
            host, port = answer["store"]
            self._generation = Generation.parse(answer["generation"])
            return Assignment(self._generation, answer["rank"], answer["size"], (host, port), answer["restore"])

    def post(self, message: dict[str, Any]) -> None:
        """Send a message under the present generation, without waiting."""
        assert self._generation is not None, "a worker outside a world has nothing to say"
        self._put({**message, "generation": str(self._generation)})

    def progress(self, step: int, phase: str) -> None:
        """What the next heartbeats say."""
        self._progress = {"step": step, "phase": phase}

    def wish(self) -> dict[str, Any] | None:
        """What the driver or a user asked for, to be agreed on at the next step boundary."""
        return self._wish

    def check(self) -> None:
        """Raise where training must not go on.

        Raises:
            FencedError: a newer claim owns the run.
            WorldBroken: the server said that this world is broken.
            RunFailed: the server was silent for longer than the lease.
        """
        if self._fenced is not None:
            raise FencedError(self._fenced)
        if str(self._generation) in self._broken:
            raise WorldBroken(f"world {self._generation} was declared broken")
        silent = time.monotonic() - self._heard
        if silent > self._lease_s:
            raise RunFailed(f"the membership server at {self._url} was silent for {silent:.0f} s, more than the lease")

    def await_commit(self, step: int, timeout_s: float) -> None:
        """Wait until the checkpoint of `step` is committed.

        Raises:
            CheckpointError: it could not be committed, or nothing was heard of it within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self.check()
            try:
                commit = self._commits.get(timeout=0.2)
            except queue.Empty:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"waited {timeout_s:.0f} s for the commit of the checkpoint of step {step}"
                    ) from None
                continue
            if commit["step"] == step:
                if commit["error"]:
                    raise CheckpointError(commit["error"])
                return

    def close(self) -> None:
        """Send what is still queued, then end the connection and its thread."""
        self._put(None)
        self._thread.join(10)

    # ---- the watcher thread ------------------------------------------------------------------------------------

    def _put(self, message: dict[str, Any] | None) -> None:
        self._outbox.put(message)
        if not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(self._posted.set)
            except RuntimeError:  # closed in between: the run is over for this worker
                return

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._hold())
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            self._inbox.put(error)
        finally:
            self._loop.close()

    async def _hold(self) -> None:
        headers = {"Authorization": f"Bearer {self._token}"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.ws_connect(f"{self._url}/worker?id={self.worker_id}", max_msg_size=MAX_MESSAGE_BYTES) as socket,
        ):
            reader = asyncio.create_task(self._read(socket))
            try:
                await self._write(socket, reader)
            finally:
                reader.cancel()

    async def _write(self, socket: aiohttp.ClientWebSocketResponse, reader: asyncio.Task[None]) -> None:
        while not reader.done():
            self._posted.clear()
            while not self._outbox.empty():
                message = self._outbox.get()
                if message is None:
                    return
                await socket.send_str(json.dumps(message))
            try:
                await asyncio.wait_for(self._posted.wait(), BEAT_S)
            except asyncio.TimeoutError:
                await socket.send_str(json.dumps({"kind": "beat", **self._progress}))
        raise ConnectionError("the server closed the connection")

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for raw in socket:
            if raw.type != aiohttp.WSMsgType.TEXT:
                continue
            self._heard = time.monotonic()
            message = json.loads(raw.data)
            if message["kind"] in ("world", "refused"):
                self._inbox.put(message)
            elif message["kind"] == "broken":
                self._broken.add(message["generation"])
            elif message["kind"] == "wish":
                self._wish = message
            elif message["kind"] == "commit":
                self._commits.put(message)
            elif message["kind"] == "fenced":
                self._fenced = message["reason"]
        self._posted.set()


class DriverLink:
    """A driver's or tool's requests to the membership server, and its stream of rows and events."""

    def __init__(self, url: str, token: str):
        self._url, self._headers = url, {"Authorization": f"Bearer {token}"}

    def request(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 10.0) -> dict[str, Any]:
        """GET `path`, or POST `body` to it.

        Raises:
            OSError: the server cannot be reached.
        """
        import urllib.request

        data = None if body is None else json.dumps(body).encode()
        headers = {**self._headers, "Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, data=data, headers=headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return json.loads(answer.read())

    async def follow(self, on_record: Any) -> None:
        """Call `on_record` with every row and event, until one of kind `end` came or the server is gone."""
        async with (
            aiohttp.ClientSession(headers=self._headers) as session,
            session.ws_connect(f"{self._url}/follow", max_msg_size=MAX_MESSAGE_BYTES) as socket,
        ):
            async for raw in socket:
                if raw.type == aiohttp.WSMsgType.TEXT:
                    record = json.loads(raw.data)
                    on_record(record)
                    if record.get("kind") == "end":
                        return
