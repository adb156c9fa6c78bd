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
    "5st",
    "--eval.every",
    "5st",
    "--batch.microbatches",
    "32",
)
#: Of a step, in its order, with the rank that is killed there. Before the next one all five are there again.
POINTS = {
    "step.forward": 1,
    "step.reduce": 1,
    "step.before_fence": 1,
    "step.after_fence": 0,
    "eval.begin": 1,
    "checkpoint.before_stage": 1,
    "checkpoint.staged": 0,
}


def test_a_kill_at_each_point_of_a_step_and_one_while_a_world_forms(cluster: LocalCluster, tmp_path: Path) -> None:
    def kill(point: str, rank: int | None, when: str) -> dict[str, object]:
        planned = {
            "point": point,
            "do": "kill",
            "only": str(tmp_path / f"{point}-killed"),
            "when": str(tmp_path / when),
        }
        return planned if rank is None else {**planned, "rank": rank}

    plan = [kill(point, rank, point) for point, rank in POINTS.items()]
    plan.append(kill("world.assigned", None, "step.before_fence-killed"))  # one of those who are left then
    run = slow_job(cluster, tmp_path, "points", *FOREVER, "--scaling.max-workers", "5", pause_s=0.015, faults=plan)
    story = Story(run)
    for point in POINTS:
        story.next_world(5)
        (tmp_path / point).touch()
    story.next_world(5)
    stop(run, 1)
    assert all(Path(str(planned["only"])).exists() for planned in plan)

    events = check_bits_and_samples(tmp_path, "points", *FOREVER)
    assert not [e for e in events if e["kind"] in ("member_late", "member_evicted")]
    assert sum(e["kind"] == "member_lost" for e in events) == len(plan)
    assert {e["detail"]["rung"] for e in events if e["kind"] == "restored"} == {"peer"}, "a step was redone"
