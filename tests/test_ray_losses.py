"""Losses on a cluster, one after another in one run, at every point of a step. In processes: tests.test_kill_points."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.bench.nodes import LocalCluster
from tests.ray_cluster import Story, check_bits_and_samples, slow_job, stop

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]
#: Of 8 microbatches a fifth worker would take none off another: it would not be asked for.
FOREVER = (
    "--run.duration",
    "100000st",
    "--checkpoint.every",
    "10st",
    "--eval.every",
    "25st",
    "--batch.microbatches",
    "32",
)


def test_a_kill_at_each_point_of_a_step_and_one_while_a_world_forms(cluster: LocalCluster, tmp_path: Path) -> None:
    def kill(number: int, point: str, step: int, rank: int | None = 1) -> dict[str, object]:
        planned = {"point": point, "step": step, "do": "kill", "only": str(tmp_path / f"fault{number}")}
        return planned if rank is None else {**planned, "rank": rank}

    plan = [
        kill(0, "step.forward", 12),
        kill(1, "step.reduce", 24),
        kill(2, "step.after_fence", 36, rank=0),
        # two are left, and replacements come; one of them may be rank 1 of the world after step 114
        kill(3, "checkpoint.before_stage", 90),
        kill(4, "eval.begin", 100),
        kill(5, "step.before_fence", 115),
        # those who are left had all of step 115 too, or the kill cut it short
        kill(6, "world.assigned", 114, rank=None),
        kill(6, "world.assigned", 115, rank=None),
        kill(7, "checkpoint.staged", 130, rank=0),
    ]
    run = slow_job(cluster, tmp_path, "points", *FOREVER, "--scaling.max-workers", "5", pause_s=0.015, faults=plan)
    Story(run).next_world(5)
    stop(run, 132)
    files = {Path(str(planned["only"])) for planned in plan}
    assert all(file.exists() for file in files)

    events = check_bits_and_samples(tmp_path, "points", *FOREVER)
    assert not [e for e in events if e["kind"] in ("member_late", "member_evicted")]
    assert sum(e["kind"] == "member_lost" for e in events) == len(files)
    assert {e["detail"]["rung"] for e in events if e["kind"] == "restored"} == {"peer"}, "a step was redone"
