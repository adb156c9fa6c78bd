"""The page: who may ask it what, and odd requests, which change nothing."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from elastic import cli
from elastic.tools.page.access import refusal
from elastic.tools.page.server import Page, serve
from tests.forked import WAIT_S

STORED = Path(__file__).parent / "stored_runs" / "format-3" / "exact"


@contextmanager
def page_of(url: Path | str) -> Iterator[Page]:
    """A page that is served."""
    page, loop, until = Page(str(url)), asyncio.new_event_loop(), asyncio.Event()
    ready = threading.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve(page, 0, lambda _: ready.set(), until)))
    thread.start()
    assert ready.wait(WAIT_S)
    try:
        yield page
    finally:
        loop.call_soon_threadsafe(until.set)
        thread.join(WAIT_S)
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


def request(page: Page, path: str, body: Any = None, method: str | None = None, **headers: str) -> tuple[int, Any]:
    """Status, and what was answered."""
    given = {"Authorization": f"Bearer {page.token}", "Content-Type": "application/json"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    asked = urllib.request.Request(f"http://127.0.0.1:{page.port}{path}", data, given, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=WAIT_S) as answer:
            text, status = answer.read().decode(), answer.status
    except urllib.error.HTTPError as error:
        text, status = error.read().decode(), error.code
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


# ---- who may ask what ----------------------------------------------------------------------------------------------


def test_only_this_machine_with_the_token_may_ask():
    good = {"Host": "127.0.0.1:8000", "Authorization": "Bearer secret", "Content-Type": "application/json"}

    def refused(method: str, path: str, **more: str | None) -> int | None:
        headers = {k: v for k, v in {**good, **more}.items() if v is not None}
        found = refusal(method, path, headers, 8000, "secret")
        return None if found is None else found[0]

    assert refused("POST", "/api/stop") is None
    assert refused("GET", "/api/run") is None
    assert refused("GET", "/", Authorization=None) is None
    assert refused("POST", "/", Authorization=None) == 405
    for token in (None, "", "Bearer", "Bearer secre", "Bearer secret ", "secret", "Bearer \udcff"):
        assert refused("GET", "/api/run", Authorization=token) == 401
    for host in (None, "", "evil.example:8000", "127.0.0.1", "127.0.0.1:8001", "127.0.0.1.evil.example:8000"):
        assert refused("GET", "/", Host=host) == 403
    for origin in ("null", "http://evil.example", "http://127.0.0.1:8001", "https://127.0.0.1:8000"):
        assert refused("POST", "/api/stop", Origin=origin) == 403
    assert refused("POST", "/api/stop", Origin="http://localhost:8000") is None
    for kind in (None, "text/plain", "application/x-www-form-urlencoded"):
        assert refused("POST", "/api/stop", **{"Content-Type": kind}) == 415


def test_odd_requests_are_answered_and_change_nothing(tmp_path: Path):
    shutil.copytree(STORED, tmp_path / "mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "status.json").write_text("[]")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with page_of(tmp_path) as page:
        status, found = request(page, "/api/runs")
        assert (status, found["format"]) == (200, 1)
        assert [(r["name"], r["status"]) for r in found["runs"]] == [("broken", "unreadable"), ("mine", "stopped")]
        status, found = request(page, "/api/run?run=mine")
        assert (status, found["step"], found["history"]["steps"]) == (200, 4, [1, 2, 3, 4])
        for name in ("", ".", "..", "../mine", "a/b", "%00", "nosuch", "broken", "x" * 300, "mine%2F..", "%5Cx"):
            status, found = request(page, f"/api/run?run={name}")
            assert (status, "error" in found) == (400, True), name
        odd = (b"", b"{", b"[]", b"null", b"[" * 2000, {}, {"run": "mine", "more": 1}, {"run": 5}, {"run": "nosuch"})
        for body in odd:
            for verb in ("stop", "checkpoint", "scale", "drain"):
                assert request(page, f"/api/{verb}", body)[0] == 400, body
        for more in ({"max_workers": "3"}, {"max_workers": True}, {"max_workers": 2.5}, {"max_workers": 0}):
            assert request(page, "/api/scale", {"run": "mine", **more})[0] == 400
        assert request(page, "/api/stop", b" " * 5000)[0] == 413
        status, found = request(page, "/api/stop", {"run": "mine"})
        assert (status, "is not live (stopped after step 4)" in found["error"]) == (409, True)
        assert request(page, "/api/stop", {"run": "mine"}, Authorization="Bearer wrong")[0] == 401
        assert request(page, "/api/stop")[0] == 405
        for path in ("/api/nosuch", "/../pyproject.toml", "/static/page.js", "/server.py"):
            assert request(page, path)[0] == 404
        assert request(page, "/", method="DELETE")[0] == 405
        status, text = request(page, "/", Authorization="")
        assert (status, "<title>Elastic" in text, page.token in text) == (200, True, False)

    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_end_of_a_log_is_shown_and_no_other_file(tmp_path: Path):
    shutil.copytree(STORED, tmp_path / "mine")
    (tmp_path / "mine" / "logs").mkdir()
    (tmp_path / "mine" / "logs" / "w1-0.txt").write_text("a long line\n" * 10_000 + "the last \N{SNOWMAN}\n")
    with page_of(tmp_path) as page:
        assert request(page, "/api/run?run=mine")[1]["logs"] == ["w1-0"]
        status, found = request(page, "/api/logs?run=mine&worker=w1-0")
        assert (status, found["text"].endswith("the last \N{SNOWMAN}\n")) == (200, True)
        assert 60_000 < len(found["text"]) <= 65_536
        assert found["text"].startswith("a long line\n")
        for worker in ("", "w1", "../status.json", "w1-0.txt", "nosuch"):
            assert request(page, f"/api/logs?run=mine&worker={worker}")[0] == 400


def test_a_page_of_nothing_or_at_no_port_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["page", str(tmp_path / "nosuch")]) == 2
    assert "which is no folder" in capsys.readouterr().err
    assert cli.main(["page", str(tmp_path), "--port", "70000"]) == 2
    with page_of(tmp_path) as page:
        assert cli.main(["page", str(tmp_path), "--port", str(page.port)]) == 2
    assert "which cannot be used" in capsys.readouterr().err


def test_a_page_of_one_run_shows_that_one_alone(tmp_path: Path):
    for name in ("mine", "other"):
        shutil.copytree(STORED, tmp_path / name)
    with page_of(tmp_path / "mine") as page:
        assert [r["name"] for r in request(page, "/api/runs")[1]["runs"]] == ["mine"]
        assert request(page, "/api/run?run=mine")[0] == 200
        assert request(page, "/api/run?run=other")[0] == 400
