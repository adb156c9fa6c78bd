"""What the recovery benchmark reads out of notes and ledgers, and how it refuses bad input."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

import elastic.worker.children
from elastic.observe.ledger import EVENTS, METRICS, LedgerFile
from elastic.storage import Storage
from jobs.bench import here, overhead
from jobs.bench import recovery as recovery_bench
from jobs.bench.peers.notes import PHASES, Notes, read, recovery, split
from jobs.bench.peers.torchrun import _lines
from jobs.bench.report import interval_of_median
from jobs.bench.sizes import width_of
from jobs.bench.stalls import Ledger
from jobs.bench.steady import CONFIG, build_model
from tests import forked


def test_phases_fill_the_stall_whatever_order_marks_come_in():
    parts = split({"detect": 11.0, "form": 10.5, "connect": 13.0, "restore": 99.0}, 10.0, 15.0, 0.0)
    assert parts == {"detect": 1.0, "form": 0.0, "start": 0.0, "connect": 2.0, "restore": 2.0, "first step": 0.0}
    assert tuple(parts) == PHASES
    assert sum(split({"detect": 1.0}, 0.0, 5.0, 0.5).values()) == 4.5


def test_a_recovery_that_does_steps_again_and_leaves_a_survivor_out():
    def row(step: int, time: float, world: str, size: int) -> dict[str, Any]:
        return {"step": step, "time": time, "world": world, "size": size}

    # given a world of three that saved at step 20, and died in step 25; one of two survivors is not in the next
    notes = [row(s, 0.1 * s, "a", 3) for s in range(1, 25)]
    notes += [
        {"mark": "detect", "time": 3.0},
        {"mark": "form", "time": 1.0},
        row(21, 4.5, "b", 1),
        row(22, 4.6, "b", 1),
    ]
    found = recovery(notes, killed=2.45, expected=2)
    assert (found["lost"], found["left_out"]) == (4.0, 1.0)
    assert found["stall_s"] == pytest.approx(4.5 - 2.4 - 0.1)
    assert found["detect"] == pytest.approx(0.55)
    assert found["form"] == 0.0, "a mark from before the kill is of another recovery"


def test_a_half_written_note_waits(tmp_path: Path):
    notes = Notes(tmp_path / "notes")
    notes.step(1, 3, "a")
    notes.mark("detect", 7.0)
    with (tmp_path / "notes").open("a") as file:
        file.write('{"step": 2, "ti')
    assert [n.get("step", n.get("mark")) for n in read(tmp_path / "notes")] == [1, "detect"]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """A world of three; w0 dies in the middle of step 4; its place is taken after step 6."""
    storage = Storage(str(tmp_path))

    def world(n: int, time: float, *pids: int) -> dict[str, Any]:
        detail = {"size": len(pids), "pids": list(pids), "ids": [f"w{p}" for p in pids]}
        return {"time": time, "kind": "world_formed", "generation": f"1-{n}", "detail": detail}

    def row(step: int, time: float, n: int, size: int, **more: float) -> dict[str, Any]:
        return {"step": step, "time": time, "generation": f"1-{n}", "world_size": size, "sample_hash": "0", **more}

    connected = {"connect_s": 0.01, "restore_s": 0.02}
    events, rows = LedgerFile(storage, EVENTS, 1), LedgerFile(storage, METRICS, 1)
    for event in (
        world(1, 0.0, 0, 1, 2),
        {"time": 3.2, "kind": "member_lost", "generation": "1-1"},
        world(2, 3.3, 1, 2),
        {"time": 3.25, "kind": "member_late", "member": "w0"},
        world(3, 7.8, 1, 2, 3),
    ):
        events.add(event)
    for one in (
        row(1, 1.0, 1, 3),
        row(2, 2.0, 1, 3),
        row(3, 3.0, 1, 3),
        row(4, 4.8, 2, 2, **connected),
        row(5, 6.0, 2, 2),
        row(6, 7.2, 2, 2),
        row(7, 9.0, 3, 3, **connected),
        row(8, 10.0, 3, 3),
    ):
        rows.add(one)
    events.flush()
    rows.flush()
    return storage


def test_a_recovery_by_the_ledger(storage: Storage):
    found = Ledger(storage).recovery(3.1, {0}, 3)
    assert found["stall_s"] == pytest.approx(0.8)
    assert found["rest"] == pytest.approx(0.1)
    assert (found["lost"], found["left_out"]) == (0.0, 0.0), "a dead process is left behind rightly"
    assert [round(found[p], 3) for p in PHASES] == [0.1, 0.1, 0.0, 0.01, 0.02, 0.47]


def test_a_live_process_that_was_left_behind_counts(storage: Storage):
    assert Ledger(storage).recovery(3.1, {2}, 3)["left_out"] == 1.0


def test_a_join_by_the_ledger(storage: Storage):
    (join,) = Ledger(storage).joins(3)
    assert join["stall_s"] == pytest.approx(0.8)
    assert join["form"] == pytest.approx(0.6)


def test_what_agents_of_torchrun_log(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text(
        "I1122 11:25:53.127000 157 torch/distributed/elastic/agent/server/api.py:942] [default] Worker group FAILED.\n"
        "Traceback (most recent call last):\n"
        "I1122 11:25:56.593000 157 torch/distributed/elastic/agent/server/api.py:715] [default] Starting worker group\n"
    )
    (failed, first), (started, second) = _lines(log)
    assert (first, second) == ("Worker group FAILED.", "Starting worker group")
    assert started - failed == pytest.approx(3.466)


@pytest.mark.parametrize("megabytes", [1, 50])
def test_a_state_has_the_size_that_was_asked_for(megabytes: int):
    numbers = 3 * sum(p.numel() for p in build_model(width_of(megabytes)).parameters())
    assert 4 * numbers == pytest.approx(megabytes * 1e6, rel=0.01)


@pytest.mark.parametrize("python", ["/nonexistent/python", "/bin/false"])
def test_an_interpreter_without_torchft_is_refused(
    python: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["recovery", "--torchft-python", python])
    with pytest.raises(SystemExit) as left:
        recovery_bench.main()
    found = capsys.readouterr()
    assert left.value.code == 2
    assert f"--torchft-python is {python}, which cannot import torchft" in found.err
    assert found.out == ""


def test_where_a_median_lies_is_known_from_six_on():
    """Among n values, those that are left out on one side are all beyond it in at most 1 of 40 samples."""
    ends = {5: (-math.inf, math.inf), 6: (1, 6), 9: (2, 8), 20: (6, 15), 100: (40, 61)}
    assert {n: interval_of_median(range(n, 0, -1)) for n in ends} == ends
    assert not overhead.Enough(width_percent=0.5).reached([1.0, 1.1, 1.2, 1.3, 1.4], 0.0)
    assert overhead.Enough(width_percent=0.5).reached([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], 0.0)
    assert overhead.Enough(width_percent=0.4, limit_s=60.0).reached([1.0, 1.5], 61.0)


@pytest.fixture
def forks(fork_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in plain processes start their workers as forks, which is faster."""
    monkeypatch.setattr(elastic.worker.children, "subprocess", forked._Subprocess(()))


@pytest.mark.processes
@pytest.mark.usefixtures("forks")
def test_whole_and_bare_steps_take_turns():
    found = overhead.measure(overhead.Waiting(pause=0.002), CONFIG, 2, overhead.Enough(most=2))
    assert {len(seconds) for seconds in found.values()} == {2}
    assert min(found["bare_s"]) > 0.002
    assert min(found["whole_cpu_s"]) > 0


@pytest.mark.processes
@pytest.mark.usefixtures("forks")
def test_a_kill_and_the_join_after_it(tmp_path: Path):
    found = here.in_processes(tmp_path, 1, steps=3)
    (killed,), (joined,) = found.process, found.join
    assert (killed["lost"], killed["left_out"]) == (0.0, 0.0)
    assert 0 < killed["stall_s"] < 10
    assert joined["stall_s"] < 10  # less a usual step, which noise may make longer than the one with the join
    assert found.node == []
