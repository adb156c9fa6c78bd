"""Telling somebody: what is worth a message, and that whoever does not take one costs a run nothing."""

from __future__ import annotations

import http.server
import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from elastic.errors import ConfigError
from elastic.observe.notify import PARKED_S, Attention
from elastic.redact import clean
from elastic.run import notifying
from elastic.run.notifying import Notifier, check_target

FINISHED = {
    "kind": "end",
    "status": "finished",
    "message": "",
    "result": {"steps": 9, "loss": float("nan"), "cost": 2.0},
}


def test_what_is_worth_a_message() -> None:
    attention, told = Attention("mine"), []

    def hear(at: float, kind: str, **record: Any) -> None:
        told.extend(m.text for m in [*attention.tick(at), *attention.hear({"kind": kind, **record}, at)])

    hear(0, "run_started", detail={"heartbeat_before": 1e9})
    hear(1, "world_formed")
    hear(2, "checkpoint_failed", detail="no space left")
    hear(3, "checkpoint_failed", detail="no space left")
    hear(4, "checkpoint_committed", step=7)
    hear(5, "parked", detail="1 workers, waiting for at least 2")
    hear(6, "world_formed")
    hear(10, "parked", detail="1 workers, waiting for at least 2")
    hear(10 + PARKED_S - 1, "notice")
    hear(10 + PARKED_S, "notice")
    hear(11 + PARKED_S, "notice")
    hear(12 + PARKED_S, "world_formed")
    hear(13 + PARKED_S, "node_quarantined", detail={"node": "n7", "why": "3 workers could not get ready"})
    hear(14 + PARKED_S, **FINISHED)

    assert told[0].startswith("run mine was lost (no heartbeat since 2001-09-")
    assert told[1:] == [
        "run mine cannot save: no space left",
        "run mine saves again: step 7",
        "run mine is parked for more than 10 minutes: 1 workers, waiting for at least 2",
        "run mine goes on after it was parked",
        "run mine takes no workers of node n7 any more: 3 workers could not get ready",
        "run mine finished after step 9",
    ]
    failed = {"kind": "end", "status": "failed", "message": "Traceback (most recent\n  File\nValueError: no"}
    (message,) = attention.hear(failed, 1.0)
    assert (message.kind, message.text) == ("failed", "run mine failed: ValueError: no")
    (paused,) = attention.hear({"kind": "end", "status": "stopped", "message": "asked", "result": {"steps": 3}}, 1.0)
    assert (paused.kind, paused.text) == ("paused", "run mine paused after step 3: asked")


@pytest.fixture
def service() -> Iterator[Any]:
    """A service that keeps what it is told, and is slow for a path /slow."""
    got: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if self.path == "/slow":
                time.sleep(0.5)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", got
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_address_is_written_nowhere() -> None:
    told = clean({"observe": {"notify": "https://hooks.example.com/services/T0/B0/hidden"}})
    assert told == {"observe": {"notify": "***"}}


def test_a_url_gets_json_that_chat_services_show(service) -> None:
    url, got = service
    said: list[str] = []
    notifier = Notifier("mine", f"{url}/services/T0/hidden", said.append)
    notifier.hear({"step": 1, "loss": 1.0})
    notifier.hear(FINISHED)
    notifier.close()

    (told,) = got
    assert told == {
        "format": 1,
        "text": "run mine finished after step 9",
        "kind": "finished",
        "run": "mine",
        "steps": 9,
        "loss": None,
        "cost": 2.0,
    }
    assert said == []


def test_a_command_gets_the_text_and_the_json(tmp_path) -> None:
    script = tmp_path / "tell.py"
    script.write_text(
        "import json, sys\nopen(sys.argv[1], 'w').write(sys.argv[2] + '|' + json.load(sys.stdin)['kind'])\n"
    )
    notifier = Notifier("mine", f"{sys.executable} {script} {tmp_path / 'out'}", pytest.fail)
    notifier.hear(FINISHED)
    notifier.close()

    assert (tmp_path / "out").read_text() == "run mine finished after step 9|finished"


def test_who_takes_nothing_is_said_once_and_holds_up_nobody(service, monkeypatch) -> None:
    url, _ = service
    monkeypatch.setattr(notifying.send, "__defaults__", (0.1,))
    for to, says in (
        (f"{url}/slow", "timed out"),
        ("http://127.0.0.1:9/T0/hidden", "refused"),
        ("false", "exit status 1"),
    ):
        said: list[str] = []
        notifier = Notifier("mine", to, said.append)
        began = time.monotonic()
        notifier.hear(FINISHED)
        notifier.hear(FINISHED)
        assert time.monotonic() - began < 0.1
        notifier.close()
        (warning,) = said
        assert warning.startswith("warning: --observe.notify could not be told of it (finished): ")
        assert says in warning
        assert "hidden" not in warning

    with pytest.raises(ConfigError, match="there is no program 'nosuchprogram'"):
        check_target("nosuchprogram --flag")
