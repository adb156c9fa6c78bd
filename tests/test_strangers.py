"""Strangers on the network end nothing: no flood, no half-open connection, no garbage in a request."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from elastic import cli
from elastic.child import raise_descriptor_limit
from elastic.membership import door
from elastic.membership.driver import DriverLink
from elastic.membership.server import MembershipServer
from elastic.membership.state import Limits, State
from elastic.observe.ledger import gaps_and_doubles
from elastic.run.folder import RunFolder
from elastic.run.prepare import prepare
from elastic.snapshot import vault
from elastic.snapshot.client import VaultClient
from elastic.snapshot.vault import VaultServer
from elastic.storage import Storage
from jobs.bench.control_plane import Notes
from tests.forked import WAIT_S, B, Ran, Watch, configure, local_run, wait_until
from tests.tiny_jobs import Everything

# ---- a live run ----------------------------------------------------------------------------------------------------


HALVES = (b"GET /run HTT", b"", b"\x16\x03\x01\x02", b"POST /grant HTTP/1.1\r\nContent-Length: 99\r\n\r\n{")


class Flood:
    """Connections without a token that are opened again and again, and half of a request in each."""

    def __init__(self, url: str, count: int):
        parts = urlsplit(url)
        self._where, self._count = (parts.hostname, parts.port), count
        self._open: list[socket.socket] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._pour, daemon=True)
        self.made = 0

    def __enter__(self) -> Flood:
        self._thread.start()
        return self

    def _pour(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError):
                one = socket.create_connection(self._where, 5.0)
                self._open.append(one)
                self.made += 1
                one.send(HALVES[self.made % len(HALVES)])
            if len(self._open) > self._count:
                self._open.pop(0).close()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(WAIT_S)
        for one in self._open:
            one.close()


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_descriptor_limit()
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def ask(url: str, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, str]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=10)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server", "many_descriptors")
def test_a_run_goes_on_in_a_flood_of_strangers(tmp_path, capsys):
    watch = Watch()
    run = prepare(Everything(), configure(tmp_path, "run", run__duration="100000st", scaling__max_workers=2))
    with local_run(run, 2, on_record=watch, own_host={}) as local:
        watch.wait_for_step(1)
        host, token = local.hosting.process.pid, {"Authorization": f"Bearer {local.token}"}
        quiet = len(os.listdir(f"/proc/{host}/fd"))
        with Flood(local.url, 1500) as flood:
            wait_until(lambda: flood.made > 1500, "so many connections")
            # what is too large, no JSON or a web page's is refused before it is read
            large = b'{"id": ' + b"[" * (8 << 20)
            with contextlib.suppress(ConnectionError):  # it may be closed before all of it was sent
                assert ask(local.url, "POST", "/grant", large, {})[0] == 400
            for body in (b"", b"[]", b"\xff", b'{"id": 5}'):
                assert ask(local.url, "POST", "/grant", body, {})[0] == 400
            assert ask(local.url, "POST", "/grant", b"{}", {"Origin": "http://evil.example"})[0] == 403
            assert ask(local.url, "GET", "/status", None, {**token, "Origin": "null"})[0] == 403
            for path in ("wish", "allow", "close", "lost", "event", "notice", "yield", "expected", "scale", "drain"):
                for body in (b"", b"5", b'{"wish": "leave"}', b'{"max_workers": 2.5, "by": "x"}', b'{"ids": 5}'):
                    status, said = ask(local.url, "POST", f"/{path}", body, token)
                    assert (status, said.count("\n")) == (400, 0), path
            assert ask(local.url, "GET", "/worker", None, token)[0] == 400
            assert len(os.listdir(f"/proc/{host}/fd")) <= quiet + door.MOST_STRANGERS + 20
            # control commands come through, and steps go on
            assert cli.main(["status", str(tmp_path / "run"), "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["asked"]
            watch.wait_for_step(watch.records[-1].get("step", 0) + 50)
            assert cli.main(["stop", str(tmp_path / "run")]) == 0
            local.wait(WAIT_S)
        assert local.hosting.restarts == 0
    ran = Ran(run, None)
    assert ran.result["status"] == "stopped"
    assert not ran.events("member_lost")
    assert ran.events("world_formed")[-1]["detail"]["size"] == 2
    assert gaps_and_doubles(ran.rows, B) == []


def test_who_shows_no_token_is_turned_away_after_a_while(monkeypatch):
    monkeypatch.setattr(door, "MOST_STRANGERS", 2)
    turned: list[str] = []

    class Transport(door.asyncio.WriteTransport):
        def __init__(self, name: str):
            super().__init__()
            self.name = name

        def abort(self) -> None:
            turned.append(self.name)

    there = door.Door()
    first, second, third, fourth = map(Transport, ("first", "second", "third", "fourth"))
    there.came(first)
    there.known(first)
    there.came(second)
    there.came(third)
    there.came(fourth)
    assert turned == ["second"], "of too many who came first"
    there.look(time.monotonic())
    assert turned == ["second"]
    there.look(time.monotonic() + door.STRANGER_S + 1)
    assert turned == ["second", "third", "fourth"]


def test_who_calls_while_the_server_is_busy_waits_in_a_queue_and_is_not_sent_away(many_descriptors):
    """Where it is full, the kernel of who calls tries again after 1 s, 3 s, 7 s: so long took control commands."""
    state = State(epoch=1, limits=Limits(1, 2))
    server = MembershipServer(Notes(), state, "token", host="127.0.0.1", new_store=lambda: (0, lambda: None))
    server.start()
    busy, free = threading.Event(), threading.Event()

    def be_busy() -> None:
        busy.set()
        free.wait(WAIT_S)

    callers = [socket.socket() for _ in range(500)]
    try:
        server._loop.call_soon_threadsafe(be_busy)
        busy.wait(WAIT_S)
        for one in callers:
            one.settimeout(0.9)
            one.connect(("127.0.0.1", server.port))
    finally:
        free.set()
        for one in callers:
            one.close()
        server.stop()


def test_connections_come_at_a_pace_and_those_that_show_a_token_do_not_count() -> None:
    pace = door.Pace(10.0, now=0.0)
    assert [pace.take(0.0) for _ in range(10)] == [0.0] * 10
    assert [round(pace.take(0.0), 3) for _ in range(3)] == [0.1, 0.2, 0.3]
    assert round(pace.take(1.0), 3) == 0.0
    for _ in range(30):
        assert pace.take(1.0) <= 0.1
        pace.give_back()


# ---- vaults --------------------------------------------------------------------------------------------------------


def test_a_vault_serves_in_a_flood_of_strangers(monkeypatch, many_descriptors):
    monkeypatch.setattr(vault, "STRANGER_S", 0.5)
    server = VaultServer("token", "127.0.0.1")
    url = server.start()
    before = threading.active_count()
    token = {"Authorization": "Bearer token"}
    try:
        client = VaultClient(url, "token", 10.0)
        assert client.holdings() == []
        with Flood(url, 600) as flood:
            wait_until(lambda: flood.made > 700, "so many connections")
            assert threading.active_count() <= before + vault.MOST_STRANGERS + 20
            assert VaultClient(url, "token", 10.0).holdings() == []
            assert client.holdings() == [], "who was there before is not turned away"
            for header in ("Bearer x", "Bearer \xff", ""):
                assert ask(url, "GET", "/parts", None, {"Authorization": header})[0] == 401
            assert ask(url, "GET", "/parts", None, {**token, "Origin": "http://evil.example"})[0] == 401
            for method, path, body in (
                ("PUT", "/parts/x/y", b""),
                ("PUT", "/parts", b""),
                ("GET", "/parts/../..", None),
                ("POST", "/forget", b"[]"),
                ("POST", "/forget", b"{"),
                ("POST", "/parts/1-1-1/0", b'{"ranges": 5}'),
            ):
                assert ask(url, method, path, body, token)[0] in (400, 404), path
        wait_until(lambda: threading.active_count() <= before + 3, "strangers to be gone")
    finally:
        server.stop()


# ---- what commands follow ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address",
    [5, "file:///etc/passwd", "http://[::1", "ftp://127.0.0.1:1", "http://metadata.internal:80", "http://127.0.0.1"],
)
def test_no_command_follows_an_address_that_is_none(address, tmp_path, capsys):
    folder = RunFolder(Storage(str(tmp_path / "run")))
    folder.write_status(
        {
            "status": "running",
            "heartbeat": time.time(),
            "owner": "ann",
            "host": os.uname().nodename,
            "server": address,
            "step": 1,
            "total_steps": 2,
        }
    )
    folder.write_config({"job": {"name": "digits"}, "config": {}})
    assert cli.main(["stop", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert "as the address of its server, which is not an address" in said
    assert said.count("\n") == 1


class Liar:
    """A server that answers each request with this."""

    def __init__(self, answer: bytes, again: bytes = b""):
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.asked = b""
        self._answer, self._again = answer, again
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Liar:
        self._thread.start()
        return self

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                one, _ = self._listening.accept()
                with one:
                    self.asked += one.recv(65536)
                    one.sendall(self._answer)
                    while self._again:
                        one.sendall(self._again)

    def __exit__(self, *_: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(WAIT_S)


def test_an_answer_that_sends_on_or_has_no_end_is_not_followed():
    secret = secrets.token_hex(8)
    with Liar(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}") as other:
        with Liar(f"HTTP/1.1 302 Found\r\nLocation: {other.url}/x\r\nContent-Length: 0\r\n\r\n".encode()) as first:
            with pytest.raises(OSError, match="302"):
                DriverLink(first.url, secret).request("/run")
        assert other.asked == b""
    with Liar(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 4096) as endless:
        began = time.monotonic()
        with pytest.raises(OSError, match=r"larger than|not whole within"):
            DriverLink(endless.url, secret).request("/run", timeout_s=0.5)
        assert time.monotonic() - began < 5
