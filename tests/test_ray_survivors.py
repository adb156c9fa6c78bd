"""One run through what happens to nodes: survivors keep their processes, no step is lost, no bit differs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from elastic.observe.ledger import METRICS, read_records
from elastic.storage import Storage
from jobs.bench.nodes import LocalCluster
from tests.notice_servers import iso_in, notice_server
from tests.ray_cluster import Story, actor_pids, check_bits_and_samples, slow_job, stop, watcher

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]
OPTIONS = (
    "--run.duration",
    "100000st",
    "--scaling.max-workers",
    "3",
    "--scaling.workers-per-node",
    "1",
    "--checkpoint.every",
    "50st",
)


def test_a_killed_host_a_stopped_worker_killed_nodes_new_ones_and_noticed_ones_cost_no_survivor_no_step_and_no_bit(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    run = slow_job(cluster, tmp_path, "faults", *OPTIONS)
    story = Story(run)
    first = story.next_world(3)
    run.wait_for_step(10)

    # the run's host is killed: the workers train on as they are, and it comes back
    (host,) = actor_pids("HostActor")
    os.kill(host, signal.SIGKILL)
    rows = read_records(Storage(str(tmp_path / "faults")), METRICS)
    before = max(row["step"] for row in rows if "sample_hash" in row)
    worlds = [line for line in run.lines if "world formed" in line]
    run.wait_for(lambda line: "restarted" in line)
    run.wait_for_step(before + 20)
    assert [line for line in run.lines if "world formed" in line] == worlds

    # a worker is stopped, so that nothing of it breaks: the two others go on, and take it in when it answers
    # (one that never does: tests.test_ray_sharded)
    os.kill(first[0], signal.SIGSTOP)
    assert story.next_world(2) == first[1:]
    os.kill(first[0], signal.SIGCONT)
    second = story.next_world(3)
    assert set(second) == set(first)

    # two nodes are killed at one moment, rank 0 is on one of them: their places stay empty until nodes join
    cluster.kill_nodes([n for n in cluster.nodes if {second[0], second[2]} & set(cluster.workers_of(n))])
    assert story.next_world(1) == second[1:2]
    going, _ = cluster.add_node(), cluster.add_node()
    third = story.next_world(3)
    assert second[1] in third

    # EC2 gives notice of a node, and another one is there: its worker is taken in, takes over, and the node ends
    cluster.add_node()
    (leaver,) = set(third) & set(cluster.workers_of(going))
    with notice_server("aws") as server:
        watch = watcher(cluster, going, "--cloud", "aws", "--endpoint", server.url)
        notice = json.dumps({"action": "terminate", "time": iso_in(60)})
        server.answers["/latest/meta-data/spot/instance-action"] = (200, notice)
        run.wait_for(lambda line: "handed over" in line)
        fourth = story.next_world(3)
        assert set(third) - set(fourth) == {leaver}
        assert watch.wait(60) == 0, watch.output
    assert f"EC2 spot interruption: terminate: draining node {going.node_id}" in watch.output
    assert f"node {going.node_id} is gone" in watch.output

    # another one is told to end, and none is there to take over: the others go on without it, before the deadline
    doomed = next(n for n in cluster.nodes if fourth[0] in cluster.workers_of(n))
    watch = watcher(cluster, doomed, "--cloud", "none", "--grace", "12s")
    watch.signal(signal.SIGTERM)
    assert story.next_world(2) == fourth[1:]
    assert watch.wait(60) == 0, watch.output
    assert "told to leave" in watch.output

    stop(run, 10)
    events = check_bits_and_samples(tmp_path, "faults", *OPTIONS)
    worlds = [e["detail"] for e in events if e["kind"] == "world_formed"]
    ids = {pid: member for world in worlds for pid, member in zip(world["pids"], world["ids"])}
    late, lost = ({e["member"] for e in events if e["kind"] == kind} for kind in ("member_late", "member_lost"))
    assert ids[first[0]] in late, "it is no loss"
    # of two that go at one moment, one may be late for the world that the other's loss makes
    assert lost <= {ids[second[0]], ids[second[2]]} <= late | lost, "handing over is no loss"
    noticed = [e["node"] for e in events if e["kind"] == "notice" and "node" in e]
    assert noticed == [going.node_id, doomed.node_id]
    assert [e["node"] for e in events if e["kind"] == "handed_over"] == noticed
