"""`elastic node-watch`: a notice, or SIGTERM, becomes a drain of the right node, and a run leaves it without loss."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from jobs.bench.nodes import Command, LocalCluster
from tests.notice_servers import iso_in, notice_server
from tests.ray_cluster import Story, check_bits_and_samples, slow_job, stop

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]
OPTIONS = ("--run.duration", "100000st", "--scaling.max-workers", "2", "--scaling.workers-per-node", "1")


def watcher(cluster: LocalCluster, node: Any, *options: str) -> Command:
    """Watches a node that will not be there any more at the end."""
    cluster.nodes.remove(node)
    return Command(
        "-m", "elastic.cli", "node-watch", "--address", cluster.address, "--node-id", node.node_id, "--poll", "0.2s",
        *options,
    )  # fmt: skip


def test_a_run_leaves_a_node_of_which_ec2_gave_notice_and_one_that_is_told_to_end(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    run = slow_job(cluster, tmp_path, "noticed", *OPTIONS)
    story = Story(run)
    first = story.next_world(2)
    going, staying = (next(n for n in cluster.nodes if pid in cluster.workers_of(n)) for pid in first)
    run.wait_for_step(10)

    # the cloud gives notice of one node: a worker elsewhere takes over, and the node ends
    with notice_server("aws") as server:
        watch = watcher(cluster, going, "--cloud", "aws", "--endpoint", server.url)
        other = watcher(cluster, staying, "--cloud", "none", "--grace", "12s")
        watch.wait_for(lambda line: "watching node" in line)
        soon = json.dumps({"action": "terminate", "time": iso_in(60)})
        server.answers["/latest/meta-data/spot/instance-action"] = (200, soon)
        run.wait_for(lambda line: "handed over" in line)
        second = story.next_world(2)
        assert set(second) & set(first) == {first[1]}
        assert watch.wait(60) == 0, watch.output
    assert f"EC2 spot interruption: terminate: draining node {going.node_id}" in watch.output
    assert f"node {going.node_id} is gone" in watch.output

    # another is told to end, and there is none to take over: the run goes on with one worker
    other.wait_for(lambda line: "watching node" in line)
    other.signal(signal.SIGTERM)
    assert len(story.next_world(1)) == 1
    assert other.wait(60) == 0, other.output
    assert "told to leave" in other.output

    stop(run, 10)
    events = check_bits_and_samples(tmp_path, "noticed", *OPTIONS)
    noticed = [e["node"] for e in events if e["kind"] == "notice" and "node" in e]
    assert noticed == [going.node_id, staying.node_id]
    assert [e["node"] for e in events if e["kind"] == "handed_over"] == noticed
    assert not {"member_lost", "member_suspected"} & {e["kind"] for e in events}
