"""Live control of a run on a Ray cluster, from the command line: another size, a drained worker, the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elastic import cli
from jobs.bench.nodes import LocalCluster, result
from tests.forked_command import ForkedCommand
from tests.ray_cluster import Story, check_bits_and_samples, slow_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
OPTIONS = ("--run.duration", "100000st", "--scaling.max-workers", "2", "--batch.microbatches", "8")


def test_a_run_is_scaled_drained_and_stopped_without_a_lost_step_or_bit(
    cluster: LocalCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    excluded = cluster.nodes[0]
    run = slow_job(cluster, tmp_path, "control", *OPTIONS, "--scaling.exclude", excluded.node_id[:16])
    story, url = Story(run), str(tmp_path / "control")

    def told(verb: str, *options: str) -> dict[str, Any]:
        assert cli.main([verb, url, *options, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    first = story.next_world(2)
    run.wait_for_step(5)
    assert told("scale", "--max-workers", "3")["world_size"] == 3
    second = story.next_world(3)
    assert set(first) < set(second), "those that were there stay"

    assert not set(second) & set(cluster.workers_of(excluded)), "it was to be kept out"
    seen = told("status")
    assert (seen["status"], seen["asked"], seen["max_workers"]) == ("running", True, 3)
    assert {w["pid"] for w in seen["workers"]} == set(second)
    leaver = next(w for w in seen["workers"] if w["pid"] == second[0])
    assert told("drain", leaver["id"][:9], "--deadline", "60s")["worker"] == leaver["id"]
    third = story.next_world(3)
    assert set(second) - set(third) == {leaver["pid"]}, "another took its place"

    assert told("scale", "--max-workers", "1")["world_size"] == 1
    (last,) = story.next_world(1)
    assert last in third

    saved = told("checkpoint")
    stop = ForkedCommand("-m", "elastic.cli", "stop", url)
    assert stop.wait() == 0, stop.output
    assert run.wait() == 0, run.output
    assert "asked to save and end at the next step boundary" in stop.output
    assert f"newest checkpoint: step {result(tmp_path / 'control')['steps']}" in stop.output
    assert saved["step"] <= result(tmp_path / "control")["steps"]
    events = check_bits_and_samples(tmp_path, "control", *OPTIONS)
    kinds = [e["kind"] for e in events]
    assert kinds.count("handed_over") == 3
    assert "member_lost" not in kinds
    assert "controller_restarted" not in kinds
