"""The benchmark of checkpoints runs, checks what it loads, and counts what it says it counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.bench import checkpoint
from jobs.bench.s3front import most_in_flight
from jobs.bench.s3relay import Record

ROOT = Path(__file__).parent.parent


@pytest.mark.long
@pytest.mark.processes
def test_the_quick_mode_measures_this_engine_beside_torch_s(tmp_path):
    file = tmp_path / "figures.json"

    ended = subprocess.run(
        [sys.executable, "-m", "jobs.bench.checkpoint", "--quick", "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=ROOT,
    )

    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = {row["engine"]: row for row in json.loads(file.read_text())["rows"]}
    assert set(rows) == {"dcp.save", "here"}
    assert "stall s" in ended.stdout
    here = rows["here"]
    assert here["read_same"] == pytest.approx(1.0, abs=1e-3)
    assert here["read_other"] == pytest.approx(1.0, abs=1e-3)
    assert here["write_amplification"] == pytest.approx(1.0, abs=1e-3)
    assert here["stall_s"] < rows["dcp.save"]["stall_s"]


def test_ratios_are_to_the_same_case_and_missing_without_it():
    def row(store: str, engine: str, speed: float) -> dict:
        case = {"store": store, "shape": "160MB", "world": 1, "engine": engine}
        return {**case, "save_mb_s": speed, "load_mb_s_same": 2 * speed, "stall_s": 1 / speed}

    rows = [row("simulated", "dcp.save", 50.0), row("simulated", "here", 200.0), row("seaweed", "here", 9.0)]

    checkpoint.compare(rows)

    assert [r["save_mb_s_of_dcp"] for r in rows] == [1.0, 4.0, None]
    assert rows[1]["stall_s_of_dcp"] == pytest.approx(0.25)


def test_requests_are_in_flight_together_only_while_they_overlap():
    def record(began: float, ended: float) -> Record:
        return Record("GET", "/b/k", {}, "", began, ended)

    assert most_in_flight([]) == 0
    assert most_in_flight([record(0, 1), record(1, 2), record(2, 3)]) == 1
    assert most_in_flight([record(0, 3), record(1, 2), record(1.5, 4)]) == 3
