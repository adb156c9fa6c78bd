"""Workers that live but do not answer: they hold the interpreter's lock, are stopped and continued, or take long."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from elastic.run.prepare import PreparedRun, prepare
from tests.forked import WAIT_S, Ran, Watch, configure, fault, local_run, plan, wait_until
from tests.test_bits import assert_same_training
from tests.tiny_jobs import Everything

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]


def prepared(tmp_path: Path, most: int, **options: Any) -> PreparedRun:
    return prepare(Everything(), configure(tmp_path, "run", scaling__max_workers=most, **options))


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_survivors_that_do_not_answer_are_taken_in_when_they_do(undisturbed, tmp_path, gate):
    """One of four is killed while one holds the interpreter's lock and one is stopped: the last goes on at once."""
    held = gate("held")
    faults = [
        fault("step.forward", 6, 1, "lock", seconds=2), fault("step.forward", 6, 2, "stop"),
        fault("step.forward", 6, 3, "sleep", seconds=0.3), fault("step.forward", 6, 3),
        fault("step.forward", 8, 0, "hold", file=held),
    ]  # fmt: skip
    run, watch = prepared(tmp_path, 4, recovery__hang_timeout="60s"), Watch()
    with local_run(run, 4, on_record=watch, environment=plan(*faults)) as local:
        stopped = local.processes[2].pid
        watch.wait_for(lambda r: r.get("kind") == "world_formed" and r["detail"]["size"] == 1)
        assert is_stopped(stopped)
        os.kill(stopped, signal.SIGCONT)
        waiting = {"w1-1", "w1-2"}
        wait_until(lambda: waiting <= set(local.link.request("/group")["waiting"]), "both that were slow")
        held.unlink()
        local.wait(WAIT_S)
        codes = [p.wait(WAIT_S) for p in local.processes]

    ran = Ran(run, None)
    assert codes == [0, 0, 0, -9]
    assert [e["member"] for e in ran.events("member_lost")] == ["w1-3"]
    assert {e["member"] for e in ran.events("member_late")} == {"w1-1", "w1-2"}
    sizes = ran.column("world_size")
    assert (sizes[4], sizes[6], sizes[-1]) == (4, 1, 3)
    assert_same_training(ran, undisturbed)
