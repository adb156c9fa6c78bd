"""A node on which no worker can get ready does not keep a run small while another node could have them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jobs.bench.nodes import LocalCluster
from tests.ray_cluster import Story, check_bits_and_samples, slow_job, step_of, stop

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(240)]
OPTIONS = ("--run.duration", "100000st", "--scaling.max-workers", "3", "--scaling.workers-per-node", "1")


def test_a_node_that_makes_one_worker_after_another_fail_is_closed_and_a_new_one_takes_its_place(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    sick = cluster.nodes[-1]
    run = slow_job(cluster, tmp_path, "sick", *OPTIONS, sick_node=sick.node_id)
    story = Story(run)
    story.next_world(2)
    run.wait_for(lambda line: "node quarantined" in line and sick.node_id in line)
    cluster.add_node()
    story.next_world(3)
    stop(run, step_of(run) + 5)

    events = check_bits_and_samples(tmp_path, "sick", *OPTIONS)
    (closed,) = [e for e in events if e["kind"] == "node_quarantined"]
    assert closed["detail"] == {
        "node": sick.node_id,
        "why": "3 workers in a row could not get ready on it, while others train elsewhere",
    }
    lost = [e["detail"].splitlines()[0] for e in events if e["kind"] == "member_lost"]
    assert [bool(re.search("get ready|got ready", line)) for line in lost] == [True] * 3, f"one that trained: {lost}"
    assert not [e for e in events if e["kind"] == "world_broken"], "nobody who trains was disturbed"
