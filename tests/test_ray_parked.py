"""A spare fills a loss at once; a run with too few workers parks, and gives up with its state saved."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from elastic.checkpoint.reader import newest_first
from elastic.observe.ledger import EVENTS, METRICS, read_records
from elastic.storage import Storage
from jobs.bench.nodes import LocalCluster, result
from tests.ray_cluster import Story, check_bits_and_samples, slow_job, stop

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(480)]
FOREVER = ("--run.duration", "100000st")
OPTIONS = (
    *FOREVER,
    "--scaling.min-workers",
    "2",
    "--scaling.max-workers",
    "2",
    "--scaling.spares",
    "1",
    "--scaling.workers-per-node",
    "1",
    "--recovery.max-wait",
    "4s",
)


def test_a_spare_then_too_few_workers_and_a_rerun(cluster: LocalCluster, tmp_path: Path) -> None:
    run = slow_job(cluster, tmp_path, "parked", *OPTIONS)
    story = Story(run)
    first = story.next_world(2)
    run.wait_for(lambda line: sum("worker warm" in seen for seen in run.lines) == 3)
    run.wait_for_step(5)

    # a worker is killed: the spare is in the very next world
    os.kill(first[1], signal.SIGKILL)
    second = story.next_world(1, 2)
    assert len(second) == 2
    assert first[0] in second

    # two nodes go, one worker is left: it keeps the state, waits in vain, commits the state, and the run ends
    for node in [n for n in cluster.nodes if first[0] not in cluster.workers_of(n)]:
        cluster.kill_node(node)
    assert run.wait() == 1, run.output
    assert "1 workers, waiting for at least 2" in run.output
    folder = Storage(str(tmp_path / "parked"))
    newest = max(r["step"] for r in read_records(folder, METRICS) if "sample_hash" in r)
    assert next(newest_first(folder)).step == newest
    assert "workers" in run.lines[-1]
    assert result(tmp_path / "parked")["status"] == "failed"

    # with nodes again, the same command goes on where it ended: not a step is done twice
    for _ in range(2):
        cluster.add_node()
    run = slow_job(cluster, tmp_path, "parked", *OPTIONS)
    Story(run, epoch=2).next_world(2)
    stop(run, newest + 5, by=signal.SIGTERM)
    assert json.loads((tmp_path / "parked" / "status.json").read_text())["status"] == "stopped"
    events = check_bits_and_samples(tmp_path, "parked", *FOREVER)
    assert [e["kind"] for e in events].count("parked") == 1
    assert [e["step"] for e in read_records(folder, EVENTS) if e["kind"] == "restored" and e["step"] == newest]
