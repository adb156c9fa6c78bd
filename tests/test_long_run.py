"""A run of 100,000 steps that goes on: its ledger is long, but looking at it is not."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from elastic import cli
from elastic.observe.ledger import EVENTS, METRICS, LedgerFile, to_line
from elastic.run.folder import RunFolder
from elastic.storage import Storage
from jobs.bench.s3front import S3Front

STEPS = 100_000
PART = 400  # rows of a segment, at 40 steps a second; and a checkpoint, which is an event and a segment of its own
FIRST_BYTE_S = 0.03  # of S3
MOST_REPORT_S = 2.0  # of a processor; 0.8 where nobody else computes


def rows_of(part: int) -> list[dict[str, Any]]:
    steps = range(part * PART + 1, (part + 1) * PART + 1)
    return [
        {
            "step": step,
            "time": 1.0,
            "loss": 1 / step,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "world_size": 2,
            "generation": "1-1",
            "samples": 64 * step,
            "tokens": None,
            "device_memory": None,
            "first_position": 64 * (step - 1),
            "count": 64,
            "sample_hash": f"{step:032x}",
            "step_s": 0.025,
            "data_s": 0.0,
            "compute_s": 0.02,
            "sync_s": 0.005,
            "checkpoint_s": 0.0,
            "other_s": 0.0,
        }
        for step in steps
    ]


def event_of(part: int) -> dict[str, Any]:
    return {"time": 1.0, "kind": "checkpoint_committed", "generation": "1-1", "step": (part + 1) * PART}


def write(storage: Storage) -> None:
    """The ledger as the run's keeper leaves it in such storage, and that the run goes on."""
    parts = range(STEPS // PART)
    if storage.can_append:
        rows, events = LedgerFile(storage, METRICS, 1), LedgerFile(storage, EVENTS, 1)
        for part in parts:
            for row in rows_of(part):
                rows.add(row)
            events.add(event_of(part))
        rows.flush()
        events.flush()
    else:
        whole = {f"{METRICS}.d/000001-0-{part * PART:012d}.jsonl": rows_of(part) for part in parts}
        whole |= {f"{EVENTS}.d/000001-0-{part:012d}.jsonl": [event_of(part)] for part in parts}
        storage.fs.pipe({storage.path(name): "".join(map(to_line, rows)).encode() for name, rows in whole.items()})
    folder = RunFolder(storage)
    folder.write_config({"job": {"name": "digits"}, "config": {}})
    folder.write_status(
        {
            "status": "running",
            "heartbeat": time.time(),
            "epoch": 1,
            "step": STEPS,
            "total_steps": 2 * STEPS,
            "message": "",
            "world": {"generation": "1-1", "size": 2},
            "owner": "ann@host-7",
            "host": "host-7",
            "members": [{"id": f"w1-{i}", "node": "host-7", "pid": 40 + i} for i in range(2)],
        }
    )


def check(runs: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Imports are paid for by the first question."""

    def asked(*arguments: str) -> tuple[float, Any]:
        began = time.perf_counter()
        assert cli.main([*arguments, "--json"]) == 0
        return time.perf_counter() - began, json.loads(capsys.readouterr().out)

    listed = [asked("runs", runs) for _ in range(4)]
    looked = [asked("status", f"{runs}/long") for _ in range(4)]
    assert [run["step"] for run in listed[0][1]["runs"]] == [STEPS]
    assert [row["step"] for row in looked[0][1]["rows"]] == list(range(STEPS - 4, STEPS + 1))
    assert [(w["id"], w["rank"]) for w in looked[0][1]["workers"]] == [("w1-0", 0), ("w1-1", 1)]
    for verb, answers in (("runs", listed), ("status", looked)):
        first, *others = (seconds for seconds, _ in answers)
        print(f"elastic {verb} {runs}: {first:.3f} s with its imports, then {min(others):.3f} s")
        assert min(others) < 1


def test_runs_and_status_of_a_folder_answer_in_under_a_second(tmp_path, capsys):
    write(Storage(f"{tmp_path}/long"))
    check(str(tmp_path), capsys)


def test_a_report_reads_all_of_it_in_a_second_of_a_processor(tmp_path, capsys):
    write(Storage(f"{tmp_path}/long"))
    spent = []
    for _ in range(3):  # the first one imports
        began = time.process_time()
        assert cli.main(["report", f"{tmp_path}/long", "--json"]) == 0
        spent.append(time.process_time() - began)
        assert json.loads(capsys.readouterr().out)["history"]["steps"][-1] == STEPS
    print(f"elastic report: {spent[0]:.2f} s of a processor with its imports, then {min(spent[1:]):.2f} s")
    assert min(spent[1:]) < MOST_REPORT_S


@pytest.mark.processes
def test_runs_and_status_of_a_bucket_that_is_far_away_answer_in_under_a_second(front: S3Front, bucket, capsys):
    write(Storage(f"{bucket}/long"))
    front.fault(delay_s=FIRST_BYTE_S, count=10**6)
    check(bucket, capsys)
