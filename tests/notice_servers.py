"""Real HTTP servers that speak the protocols of clouds' notice end-points, and misbehave as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN_HEADER = "X-aws-ec2-metadata-token"


class NoticeServer(ThreadingHTTPServer):
    """What a test changes of it.

    `answers`: path (without query) -> (status, body), else 404. `silent`: accept and say nothing. `drip`: a byte at a
    time. `tokens`: those that EC2's service takes; `token_lives`: uses of each. `asked`: (method, path) in order.
    """

    daemon_threads = True

    def __init__(self, flavor: str, address: tuple[str, int]):
        super().__init__(address, _Handler)
        self.flavor = flavor
        self.answers: dict[str, tuple[int, str]] = {}
        self.silent = self.drip = False
        self.token_lives = 1000
        self.tokens: dict[str, int] = {}
        self.asked: list[tuple[str, str]] = []
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """A client that hung up is what the test wants."""


class _Handler(BaseHTTPRequestHandler):
    server: NoticeServer

    def do_PUT(self) -> None:
        life = self.headers.get(f"{TOKEN_HEADER}-ttl-seconds", "")
        if self._asked() and self.server.flavor == "aws" and self.path == "/latest/api/token" and life.isdigit():
            token = f"token-{len(self.server.tokens)}"
            self.server.tokens[token] = self.server.token_lives
            self._send(200, token)
        else:
            self._send(400, "bad request")

    def do_GET(self) -> None:
        if not self._asked():
            return
        flavor, path = self.server.flavor, self.path.partition("?")[0]
        if flavor == "aws":
            left = self.server.tokens.get(self.headers.get(TOKEN_HEADER, ""), 0)
            if left <= 0:
                return self._send(401, "unauthorized")
            self.server.tokens[self.headers[TOKEN_HEADER]] = left - 1
        elif flavor == "gcp" and self.headers.get("Metadata-Flavor") != "Google":
            return self._send(403, "missing header")
        elif flavor == "azure" and (self.headers.get("Metadata") != "true" or "api-version=" not in self.path):
            return self._send(400, json.dumps({"error": "Bad request. Required metadata header or version missing"}))
        self._send(*self.server.answers.get(path, (404, "not found")))

    def _asked(self) -> bool:
        self.server.asked.append((self.command, self.path))
        if self.server.silent:
            self.server.over.wait(60)
            return False
        return True

    def _send(self, status: int, body: str) -> None:
        data = body.encode()
        self.send_response(status)
        if self.server.flavor == "gcp":
            self.send_header("Metadata-Flavor", "Google")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not self.server.drip:
            self.wfile.write(data)
            return
        for byte in data:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if self.server.over.wait(0.05):
                return

    def log_message(self, *_: Any) -> None:
        """Nothing: tests look at `asked`."""


@contextmanager
def notice_server(flavor: str, address: tuple[str, int] = ("127.0.0.1", 0)) -> Iterator[NoticeServer]:
    """A server of `aws`, `gcp` or `azure`, without a notice."""
    server = NoticeServer(flavor, address)
    server.answers = {
        "aws": {"/latest/meta-data/instance-id": (200, "i-1234567890abcdef0")},
        "gcp": {
            "/computeMetadata/v1/instance/id": (200, "4711"),
            "/computeMetadata/v1/instance/preempted": (200, "FALSE"),
            "/computeMetadata/v1/instance/maintenance-event": (200, "NONE"),
        },
        "azure": {
            "/metadata/instance/compute/name": (200, "machine_3"),
            "/metadata/scheduledevents": (200, json.dumps({"DocumentIncarnation": 1, "Events": []})),
        },
    }[flavor].copy()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def iso_in(seconds: float) -> str:
    """A time from now as EC2 writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
