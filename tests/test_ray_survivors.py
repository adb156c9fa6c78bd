"""One run through what happens to nodes: survivors keep their processes, no step is lost, no bit differs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from jobs.bench.nodes import LocalCluster
from tests.ray_cluster import Story, check_bits_and_samples, slow_job, stop

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
OPTIONS = ("--run.duration", "100000st", "--scaling.max-workers", "3", "--scaling.workers-per-node", "1",
           "--checkpoint.every", "50st")  # fmt: skip


def test_a_stopped_worker_a_killed_node_a_new_one_and_drained_ones_cost_no_survivor_no_step_and_no_bit(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    run = slow_job(cluster, tmp_path, "faults", *OPTIONS)
    story = Story(run)
    first = story.next_world(3)
    run.wait_for_step(10)

    # a worker is stopped, so that nothing of it breaks: the two others go on as they are, and a new one is taken in
    os.kill(first[0], signal.SIGSTOP)
    assert story.next_world(2) == first[1:]
    second = story.next_world(3)
    assert set(first[1:]) < set(second)
    assert not Path(f"/proc/{first[0]}").exists(), "the stopped worker was left behind"

    # a node is killed: its place stays empty until a node joins
    cluster.kill_node(next(n for n in cluster.nodes if second[1] in cluster.workers_of(n)))
    survivors = story.next_world(2)
    assert survivors == [second[0], second[2]]
    spare = cluster.add_node()
    third = story.next_world(3)
    assert set(survivors) < set(third)

    # a node will go away, and another one is there: its worker is taken in, and takes over before that
    cluster.add_node()
    cluster.drain_node(spare, deadline_s=60)
    run.wait_for(lambda line: "handed over" in line)
    fourth = story.next_world(3)
    assert set(survivors) < set(fourth)
    assert not set(third) - set(survivors) & set(fourth)

    # another one will, and none comes: the others go on without it, before the deadline
    doomed = next(n for n in cluster.nodes if fourth[0] in cluster.workers_of(n))
    cluster.drain_node(doomed, deadline_s=12)
    assert story.next_world(2) == fourth[1:]

    stop(run, 10)
    events = check_bits_and_samples(tmp_path, "faults", *OPTIONS)
    kinds = [e["kind"] for e in events]
    assert kinds.count("member_lost") == 2, "handing over is no loss"
    assert kinds.count("handed_over") == 2
    assert "member_suspected" not in kinds
