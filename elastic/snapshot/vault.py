"""A vault: parts of snapshots in the memory of one node, behind a small HTTP server. It outlives the node's workers.

    PUT  /parts/<snapshot>/<part>        store a part: its head (JSON) and its tensors' bytes, checked by their xxh3
    POST /adopt/<snapshot>/<part>        keep a part whose bytes are in the memory of a worker of this node; the body is
                                         its head
    POST /release                        drop the parts in that memory: the worker is about to write to it
    GET  /parts                          the complete parts: a list of [snapshot, part]
    GET  /parts/<snapshot>/<part>/head   a part's head
    POST /parts/<snapshot>/<part>        {"ranges": [[start, end], ...]}: bytes of its tensors, one after another
    POST /forget                         {"after": step, "before": snapshot}: older worlds' steps after it were undone
    GET  /memory                         bytes held here, bytes still available, and whether this process can map the
                                         memory of the worker that asks

Every request carries the run's bearer token. There are at most two generations of each part: when a part of a newer
snapshot arrives, memory of older ones is reused, but never that of the newest complete one, which the sender names.
Adopted memory is mapped, not copied, so it outlives the worker that made it.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import xxhash

from elastic import fault
from elastic.child import raise_descriptor_limit
from elastic.placement import Part
from elastic.snapshot.adopted import WorkerMemory
from elastic.snapshot.holdings import SnapshotId
from elastic.snapshot.memory import available_bytes
from elastic.snapshot.store import Kept, Key, Store

READ_BYTES = 8 << 20
STALLED_S = 60.0  # a sender or reader that moves no byte for so long is given up
MOST_STRANGERS = 64  # connections that have shown no token yet
STRANGER_S = 5.0  # from connecting to showing the token
MAX_REQUEST_BYTES = 64 << 20  # of all requests except those that store parts


class VaultServer:
    """Serves a store on a thread of its own.

    Args:
        host, port: address to listen on, which workers of other nodes must reach; port 0 takes a free one.
    """

    def __init__(self, token: str, host: str, port: int = 0):
        store = Store()
        handler = type("Handler", (_Handler,), {"store": store, "token": token})
        self._server = _Server((host, port), handler)
        self.url = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="vault", daemon=True)

    def start(self) -> str:
        """Start serving; returns the URL."""
        raise_descriptor_limit()
        self._thread.start()
        return self.url

    def stop(self) -> None:
        """Stop serving. The parts are lost."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, *arguments: Any):
        self._strangers: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        """If too many connections have shown no token yet, end the oldest of them."""
        with self._lock:
            self._strangers[request] = time.monotonic() + STRANGER_S
            if len(self._strangers) > MOST_STRANGERS:
                self._turn_away(next(iter(self._strangers)))
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Called again and again by the server loop: end connections that have shown no token in time."""
        with self._lock:
            for stranger, until in list(self._strangers.items()):
                if until < time.monotonic():
                    self._turn_away(stranger)

    def known(self, request: socket.socket) -> None:
        """The client of this connection has shown a token: the connection may stay."""
        with self._lock:
            self._strangers.pop(request, None)

    def shutdown_request(self, request: Any) -> None:
        self.known(request)
        super().shutdown_request(request)

    def _turn_away(self, stranger: socket.socket) -> None:
        del self._strangers[stranger]
        with contextlib.suppress(OSError):  # the client has closed it already
            stranger.shutdown(socket.SHUT_RDWR)  # which ends its thread

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A broken connection only means that the sender is gone; its part is dropped, and nothing is printed."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = STALLED_S
    disable_nagle_algorithm = True
    store: Store
    token: str

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: no one would read it."""

    def do_PUT(self) -> None:
        self._answer(self._put)

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, respond: Any) -> None:
        header = self.headers.get("Authorization", "").encode(errors="replace")
        if "Origin" in self.headers or not hmac.compare_digest(header, f"Bearer {self.token}".encode()):
            self.close_connection = True  # an unread body may follow
            self._send(401, {"error": "wrong or missing token, or a web page"})
            return
        assert isinstance(self.server, _Server)
        self.server.known(self.connection)
        try:
            respond()
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            self.close_connection = True
            self._send(400, {"error": f"no such request: {type(error).__name__}: {error}"})

    def _put(self) -> None:
        key = self._key()
        query = parse_qs(urlsplit(self.path).query)
        keep = SnapshotId.parse(query["keep"][0]) if "keep" in query else None
        head_bytes = int(query["head"][0])
        size = int(self.headers["Content-Length"]) - head_bytes
        fault.point("vault.begin", -1, key[0].step)
        head = self.rfile.read(head_bytes)
        try:
            kept = self.store.begin(key, head, size, keep)
        except (MemoryError, OSError) as error:
            self._discard(size)
            self._send(507, {"error": str(error)})
            return
        whole = False
        try:
            whole = self._receive(kept, key[0].step) == query["xxh3"][0]
        finally:
            self.store.end(key, kept, whole=whole)
        fault.point("vault.whole", -1, key[0].step)
        self._send(200, {}) if whole else self._send(400, {"error": "the bytes that came are not those that were sent"})

    def _receive(self, kept: Kept, step: int) -> str:
        digest, view = xxhash.xxh3_64(kept.head), memoryview(kept.memory)
        for start in range(0, kept.size, READ_BYTES):
            piece = view[start : min(kept.size, start + READ_BYTES)]
            if self.rfile.readinto(piece) != len(piece):
                raise ConnectionError("the sender is gone")
            digest.update(piece)
            fault.point("vault.receiving", -1, step)
        return digest.hexdigest()

    def _discard(self, size: int) -> None:
        """Read the rest of the body, so that the sender comes to read the answer."""
        while size > 0 and (count := len(self.rfile.read(min(size, READ_BYTES)))):
            size -= count

    def _adopt(self, head: bytes) -> None:
        key, query = self._key(), parse_qs(urlsplit(self.path).query)
        keep = SnapshotId.parse(query["keep"][0]) if "keep" in query else None
        fault.point("vault.begin", -1, key[0].step)
        try:
            self.store.adopt(key, head, WorkerMemory.parse(query["memory"][0]), keep)
        except OSError as error:
            self._send(507, {"error": str(error)})
            return
        fault.point("vault.whole", -1, key[0].step)
        self._send(200, {})

    def _get(self) -> None:
        path = urlsplit(self.path).path
        if path == "/parts":
            self._send(200, self.store.whole())
        elif path == "/memory":
            named = parse_qs(urlsplit(self.path).query).get("memory")
            maps = named is not None and WorkerMemory.parse(named[0]).is_here()
            self._send(200, {"held": self.store.held_bytes(), "available": available_bytes(), "maps": int(maps)})
        else:
            self._read_part(None)

    def _read_part(self, ranges: list[list[int]] | None) -> None:
        """Send these bytes of a part's tensors, or with None its head."""
        id, part = key = self._key()
        kept = self.store.open(key)
        if kept is None:
            self._send(404, {"error": f"{part} of snapshot {id} is not here"})
            return
        try:
            if ranges is None:
                self._send_bytes(200, memoryview(kept.head))
            else:
                view = memoryview(kept.memory)
                self._send_bytes(200, *(view[start:end] for start, end in ranges))
        finally:
            self.store.close(kept)

    def _post(self) -> None:
        length = int(self.headers["Content-Length"])
        if not 0 <= length <= MAX_REQUEST_BYTES:
            raise ValueError(f"{length} bytes")
        path, read = urlsplit(self.path).path, self.rfile.read(length)
        if path.startswith("/adopt/"):
            self._adopt(read)
            return
        body = json.loads(read)
        if path == "/forget":
            self.store.forget(body["after"], SnapshotId.parse(body["before"]))
            self._send(200, {})
        elif path == "/release":
            free = self.store.release(WorkerMemory.parse(body["memory"]))
            self._send(200, {}) if free else self._send(409, {"error": "somebody reads a part in that memory"})
        else:
            self._read_part(body["ranges"])

    def _key(self) -> Key:
        _, _, id, part, *_ = urlsplit(self.path).path.split("/")
        return SnapshotId.parse(id), Part.parse(part)

    def _send(self, status: int, value: Any) -> None:
        self._send_bytes(status, memoryview(json.dumps(value).encode()))

    def _send_bytes(self, status: int, *pieces: memoryview) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(sum(map(len, pieces))))
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)
