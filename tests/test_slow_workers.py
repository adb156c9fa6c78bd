"""Workers that live but do not answer: they hold the interpreter's lock, are stopped and continued, or take long."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from elastic.errors import RunFailed
from elastic.membership import eviction
from elastic.run.prepare import PreparedRun, prepare
from tests.forked import WAIT_S, Ran, Watch, configure, fault, local_run, plan, wait_until
from tests.test_bits import assert_same_training
from tests.tiny_jobs import Everything

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.usefixtures("fork_server")]


def prepared(tmp_path: Path, most: int, **options: Any) -> PreparedRun:
    return prepare(Everything(), configure(tmp_path, "run", scaling__max_workers=most, **options))


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def test_survivors_that_do_not_answer_are_taken_in_when_they_do(undisturbed, tmp_path, gate):
    """One of four is killed while one holds the interpreter's lock and one is stopped: the last goes on at once."""
    held = gate("held")
    faults = [
        fault("step.forward", 6, 1, "lock", seconds=2),
        fault("step.forward", 6, 2, "stop"),
        fault("step.forward", 6, 3, "sleep", seconds=0.3),
        fault("step.forward", 6, 3),
        fault("step.forward", 8, 0, "hold", file=held),
    ]
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


@dataclass
class SlowModel(Everything):
    """Its model is made by a long call into C, as one that is read from a file may be."""

    def model(self):
        ctypes.PyDLL(None).usleep(2_500_000)
        return super().model()


def test_who_lives_is_not_silent(undisturbed, tmp_path, monkeypatch):
    """The interpreter's lock is held while the model is made and in a step, and a process is stopped and continued."""
    monkeypatch.setattr(eviction, "SILENT_S", 1.0)
    faults = [fault("step.forward", 4, 1, "lock", seconds=2.5), fault("step.forward", 8, 0, "stop")]
    run = prepare(SlowModel(), configure(tmp_path, "run", scaling__max_workers=2))
    with local_run(run, 2, environment=plan(*faults)) as local:
        wait_until(lambda: any(is_stopped(p.pid) for p in local.processes), "the stop")
        stopped_at = time.monotonic()
        wait_until(lambda: time.monotonic() - stopped_at > 2.5, "more than enough silence")
        (stopped,) = (p.pid for p in local.processes if is_stopped(p.pid))
        os.kill(stopped, signal.SIGCONT)
        local.wait(WAIT_S)
        assert [p.wait(WAIT_S) for p in local.processes] == [0, 0]

    ran = Ran(run, None)
    assert len(ran.events("world_formed")) == 1
    assert not [e for kind in ("member_lost", "member_late", "member_evicted") for e in ran.events(kind)]
    assert_same_training(ran, undisturbed)


def test_who_keeps_others_waiting_without_answering_is_left_behind_and_taken_in_later(
    undisturbed, tmp_path, monkeypatch
):
    """Nobody who is only slow is given up, and its microbatch costs no other one its place."""
    monkeypatch.setattr(eviction, "SILENT_S", 1.0)
    faults = [
        fault("step.forward", 6, 1, "stop", only=tmp_path / "mark"),
        fault("step.forward", 9, 0, "hold", file=(held := tmp_path / "held")),
    ]
    held.touch()
    run, watch = prepared(tmp_path, 3, recovery__hang_timeout="2s"), Watch()
    with local_run(run, 3, on_record=watch, environment=plan(*faults)) as local:
        watch.wait_for(lambda r: r.get("kind") == "member_late")
        os.kill(local.processes[1].pid, signal.SIGCONT)
        wait_until(lambda: local.link.request("/group")["waiting"] == ["w1-1"], "its return")
        held.unlink()
        local.wait(WAIT_S)
        assert [p.wait(WAIT_S) for p in local.processes] == [0, 0, 0]

    ran = Ran(run, None)
    assert not ran.events("member_lost") + ran.events("member_evicted")
    assert [e["member"] for e in ran.events("member_late")] == ["w1-1"]
    assert ran.column("world_size")[-1] == 3
    assert_same_training(ran, undisturbed)


def test_who_takes_long_to_copy_what_is_saved_is_not_ahead_of_those_that_wait_for_it(undisturbed, tmp_path):
    """They are in the next step already; they were given up for it."""
    slow = fault("checkpoint.before_stage", 6, 1, "sleep", seconds=2.5)
    options = {"recovery__hang_timeout": "0.5s", "checkpoint__every": "6st"}
    run = prepared(tmp_path, 2, **options)
    with local_run(run, 2, environment=plan(slow)) as local:
        local.wait(WAIT_S)

    ran = Ran(run, None)
    assert len(ran.events("world_formed")) == 1
    assert_same_training(ran, undisturbed)


# ---- all of them -----------------------------------------------------------------------------------------------


def test_where_all_stand_still_the_world_is_made_anew_once_and_then_the_run_is_saved_and_ends(tmp_path, gate):
    first, second = gate("first"), gate("second")
    faults = [fault("step.forward", 6, do="hold", file=first), fault("step.before_fence", 6, do="hold", file=second)]
    run, watch = prepared(tmp_path, 2, recovery__hang_timeout="0.5s"), Watch()
    with local_run(run, 2, on_record=watch, environment=plan(*faults)) as local:
        for number, held in ((1, first), (2, second)):
            watch.wait_for(lambda r, n=number: r.get("kind") == "world_broken" and r["generation"] == f"1-{n}")
            held.unlink()
        with pytest.raises(
            RunFailed, match=r"all workers stand still: hung in step: step 6, microbatch \d+; if it only"
        ):
            local.wait(WAIT_S)

    ran = Ran(run, None)
    assert [(e["step"], e["generation"]) for e in ran.events("world_stalled")] == [(6, "1-1"), (6, "1-2")]
    assert "_act" in "".join(ran.storage.read(f"stacks/{name}").decode() for name in ran.storage.names("stacks"))
    assert len(ran.events("world_formed")) == 3
    assert not ran.events("member_lost") + ran.events("member_evicted")
    assert [e["step"] for e in ran.events("checkpoint_committed")] == [6], "step 6 was in hand"


def test_the_only_worker_that_never_returns_ends_the_run_with_a_clear_error(tmp_path, gate):
    held = gate("held")
    run = prepared(tmp_path, 1, recovery__hang_timeout="0.5s")
    with local_run(run, 1, environment=plan(fault("step.forward", 6, do="hold", file=held))) as local:
        with pytest.raises(RunFailed, match=r"worker w1-0 hung in step: step 6, microbatch 0; if it only takes long"):
            local.wait(WAIT_S)
        held.unlink()

    assert len(Ran(run, None).events("world_stalled")) == 1


# ---- those outside a world -------------------------------------------------------------------------------------


def test_a_spare_that_is_stopped_is_passed_over(undisturbed, tmp_path, gate, monkeypatch):
    monkeypatch.setattr(eviction, "LATELY_S", 1.0)
    held = gate("held")
    faults = [fault("step.forward", 6, 1, "hold", file=held), fault("step.forward", 6, 1, only=tmp_path / "mark")]
    run, watch = prepared(tmp_path, 2, scaling__spares=2), Watch()
    with local_run(run, 4, on_record=watch, environment=plan(*faults)) as local:
        first = watch.wait_for(lambda r: r.get("kind") == "world_formed")["detail"]["ids"]
        wait_until(lambda: len(local.link.request("/group")["waiting"]) == 2, "both spares")
        stopped, well = local.link.request("/group")["waiting"]
        process = local.processes[int(stopped.removeprefix("w1-"))]
        os.kill(process.pid, signal.SIGSTOP)

        def says(name: str) -> str:
            return next(w["phase"] for w in local.link.request("/run")["workers"] if w["id"] == name)

        wait_until(lambda: says(stopped) == "does not answer", "its silence")
        held.unlink()
        second = watch.wait_for(lambda r: r.get("kind") == "world_formed" and r["generation"] == "1-2")
        assert second["detail"]["ids"] == sorted([first[0], well])
        os.kill(process.pid, signal.SIGCONT)
        local.wait(WAIT_S)
        assert process.wait(WAIT_S) == 0

    ran = Ran(run, None)
    assert ran.column("world_size") == [2] * 12
    assert_same_training(ran, undisturbed)
