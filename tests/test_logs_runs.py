"""A worker that dies of a fault in C: its log, its last words and its stack are where an operator looks, in plain
processes; and a live run says where its workers are."""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import threading
from dataclasses import dataclass
from typing import Any

import pytest

from elastic import cli
from elastic.run.prepare import prepare
from tests.forked import WAIT_S, Watch, configure, local_run, sample_at
from tests.tiny_jobs import Plain

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server"), pytest.mark.timeout(120)]


@dataclass
class Talkative(Plain):
    """Says something in each pass; at one sample, one process reads what is no memory."""

    samples: int = 400

    def loss(self, model, batch):
        print(f"looking at {int(batch[2][0])} with the key very-secret-value")
        print("a warning", file=sys.stderr)
        if (batch[2] == self.fault_at).any() and model.training and os.path.exists(self.fault_file):
            os.unlink(self.fault_file)
            ctypes.string_at(0)
        return super().loss(model, batch)


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    assert cli.main(list(map(str, arguments))) == code
    return capsys.readouterr().out


def test_what_a_dead_worker_said_and_where_it_was_is_in_its_log_the_ledger_the_status_and_the_console(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("SOME_SECRET", "very-secret-value")
    (tmp_path / "once").touch()
    job = Talkative(fault_at=sample_at(3), fault_file=str(tmp_path / "once"))
    run = prepare(job, configure(tmp_path, "run", run__duration="100000st", scaling__max_workers=2))
    watch, url, seen, shown = Watch(), tmp_path / "run", {}, []

    def show(worker: str, stream: str, line: str) -> None:
        shown.append((worker, stream, line))

    def script(local: Any) -> None:
        try:
            died = watch.wait_for(lambda r: r.get("kind") == "process_ended")
            watch.wait_for_step(5)
            seen["died"] = died
            seen["status"] = told(capsys, "status", url, "--last", 50)
            seen["stacks"] = json.loads(told(capsys, "stacks", url, "--json"))["stacks"]
        finally:
            local.stop("the test is over")

    with local_run(run, 2, on_record=watch, show=show) as local:
        script_thread = threading.Thread(target=script, args=(local,))
        script_thread.start()
        local.wait(WAIT_S)
        script_thread.join()

    died = seen["died"]
    how, *words = died["detail"].splitlines()
    assert how == "killed by SIGSEGV (a segmentation fault)"
    assert "  | a warning" in words or any("looking at" in line for line in words)
    assert "its stack:" in words
    assert any(re.search(r'File ".*test_logs_runs\.py", line \d+ in loss', line) for line in words)
    assert "killed by SIGSEGV" in seen["status"]
    assert "test_logs_runs.py" in seen["status"]
    (alive,) = {"w1-0", "w1-1"} - {died["member"]}
    assert list(seen["stacks"]) == [alive]
    assert "MainThread" in seen["stacks"][alive]

    log = told(capsys, "logs", url, died["member"][:4] if died["member"] == "w1-0" else died["member"])
    assert re.search(
        r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[rank [01], .+\] looking at \d+ with the key \*\*\*$", log, re.M
    )
    assert "Fatal Python error: Segmentation fault" in log
    both = told(capsys, "logs", url, "--last", 3).splitlines()
    assert {line.split()[0] for line in both} == {"w1-0", "w1-1"}
    assert len(both) == 6
    assert {(w, s) for w, s, _ in shown} == {(w, s) for w in ("w1-0", "w1-1") for s in ("out", "err")}
    assert not any("very-secret-value" in line for _, _, line in shown)
    for arguments, says in (
        (("logs", url, "w9"), "which is none of w1-0, w1-1"),
        (("logs", url, "w1"), "which is several of w1-0, w1-1"),
        (("logs", url, "--last", -1), "give 0 or more"),
        (("stacks", url), "there is nothing to ask for its stacks"),
    ):
        assert cli.main(list(map(str, arguments))) != 0
        assert says in capsys.readouterr().err
