"""Sharded models on Ray: a lost part comes from snapshots, a lost node of hsdp costs nothing, the bits are the same."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from elastic.observe.ledger import METRICS, read_records
from elastic.storage import Storage
from jobs.bench.nodes import LocalCluster
from tests.ray_cluster import (
    Story,
    actor_pids,
    check_bits_and_samples,
    slow_job,
    step_of,
    stop,
    wait_until,
    watcher,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]
DURATION = ("--run.duration", "100000st")  # the twin is one worker with ddp
EVERY = 5


@pytest.mark.long
def test_a_lost_worker_of_fsdp_comes_from_a_snapshot(cluster: LocalCluster, tmp_path: Path) -> None:
    """It is stopped, so that Ray and its peers see no end of it."""
    stopped = {"point": "step.forward", "rank": 1, "step": 23, "do": "stop", "only": str(tmp_path / "stopped")}
    run = slow_job(
        cluster,
        tmp_path,
        "fsdp",
        *DURATION,
        "--parallel.strategy",
        "fsdp",
        "--recovery.snapshot-every",
        f"{EVERY}st",
        "--scaling.max-workers",
        "3",
        "--scaling.workers-per-node",
        "1",
        "--recovery.hang-timeout",
        "10s",
        faults=[stopped],
    )
    story = Story(run)
    first = story.next_world(3)
    assert story.next_world(2) == [first[0], first[2]]
    wait_until(lambda: not Path(f"/proc/{first[1]}").exists())
    assert {first[0], first[2]} < set(story.next_world(3))
    killed_one, stopped_one, _ = actor_pids("VaultActor")
    os.kill(killed_one, signal.SIGKILL)
    os.kill(stopped_one, signal.SIGSTOP)
    wait_until(lambda: len(set(actor_pids("VaultActor")) - {killed_one, stopped_one}) == 3)
    again = step_of(run)
    stop(run, again + 10 * EVERY)

    events = check_bits_and_samples(tmp_path, "fsdp", *DURATION, redone=True)
    assert "controller_restarted" not in {e["kind"] for e in events}, run.output
    lost = next(i for i, e in enumerate(events) if e["kind"] == "member_lost")
    restored = next(e for e in events[lost:] if e["kind"] == "restored")
    assert restored["detail"]["rung"] == "snapshot"
    assert restored["detail"]["reason"].startswith("of the state of step 22, shard 1 of 3 was lost")
    assert restored["step"] >= 22 - 2 * EVERY, "one that was on its way when the worker died does not count"
    rows = [r for r in read_records(Storage(str(tmp_path / "fsdp")), METRICS) if "sample_hash" in r]
    assert rows[-1]["snapshot"] > again, "the vaults that died alone or stood still take part again"
    (ended, still) = [e["detail"]["why"] for e in events if e["kind"] == "vault_restarted"]
    assert ended.startswith("it ended: Worker unexpectedly exits")
    assert still == "it did not answer for 10 s and was ended"
    wait_until(lambda: not actor_pids("VaultActor"))


def test_a_lost_node_of_hsdp_costs_no_step(cluster: LocalCluster, tmp_path: Path) -> None:
    run = slow_job(
        cluster,
        tmp_path,
        "hsdp",
        *DURATION,
        "--parallel.strategy",
        "hsdp",
        "--scaling.max-workers",
        "4",
        "--scaling.workers-per-node",
        "2",
    )
    story = Story(run)
    first = story.next_world(4)
    on_nodes = [set(first) & set(cluster.workers_of(n)) for n in cluster.nodes]
    assert sorted(map(len, on_nodes)) == [0, 2, 2], "a row is on one node"
    run.wait_for_step(10)
    cluster.kill_node(next(n for n in cluster.nodes if first[0] in cluster.workers_of(n)))
    left = next(workers for workers in on_nodes if workers and first[0] not in workers)
    assert set(story.next_world(2)) == left
    assert left < set(story.next_world(4)), "the other node takes both at once"
    stop(run, 20)

    events = check_bits_and_samples(tmp_path, "hsdp", *DURATION)
    assert {e["detail"]["rung"] for e in events if e["kind"] == "restored"} == {"peer"}


def test_workers_of_a_cell_come_together_on_one_node_and_a_lost_one_is_replaced_there(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    options = (*DURATION, "--parallel.tensor", "2")
    run = slow_job(cluster, tmp_path, "cells", *options, "--scaling.max-workers", "4")
    run.wait_for(lambda line: "4 workers = 2 cells x 2 tensor, 0 spare -> 4 rounds" in line)
    story = Story(run)
    first = story.next_world(4)
    on_nodes = [set(first) & set(cluster.workers_of(n)) for n in cluster.nodes]
    assert {len(workers) % 2 for workers in on_nodes} == {0}, "a cell is on one node"
    run.wait_for_step(5)
    os.kill(first[0], signal.SIGKILL)
    assert set(story.next_world(3)) == set(first[1:]), "its mate stands by"
    second = story.next_world(4)
    assert set(first[1:]) < set(second), "a worker beside the mate makes a cell"
    run.wait_for_step(step_of(run) + 5)
    cluster.kill_node(next(n for n in cluster.nodes if second[0] in cluster.workers_of(n)))
    left = story.next_world(2)
    assert set(left) < set(second)
    assert set(left) < set(story.next_world(4)), "the cell comes back on another node"
    stop(run, step_of(run) + 5)

    events = check_bits_and_samples(tmp_path, "cells", *options)
    assert {e["detail"]["rung"] for e in events if e["kind"] == "restored"} == {"peer"}


@pytest.mark.long
@pytest.mark.parametrize("tensor", [1, 2])
def test_stages_of_a_drained_node_move_to_another_and_a_lost_one_is_replaced(
    cluster: LocalCluster, tmp_path: Path, tensor: int
) -> None:
    """Two pipelines of two workers, or one of two cells of two: the bits are those of one process, or one cell."""
    options = (*DURATION, "--parallel.tensor", str(tensor))
    size = ("--scaling.max-workers", "4", "--scaling.workers-per-node", "2")
    run = slow_job(cluster, tmp_path, "stages", *options, "--parallel.pipeline", "2", *size)
    cells = "2 pipelines x 2 stages, 0 spare" if tensor == 1 else "1 pipeline x 2 stages x 2 tensor, 0 spare"
    run.wait_for(lambda line: f"4 workers = {cells} -> " in line)
    story = Story(run)
    now = story.next_world(4)
    run.wait_for_step(5)
    if tensor == 1:
        os.kill(now[1], signal.SIGKILL)
        assert set(story.next_world(3)) == {now[0], *now[2:]}, "one pipeline of three stages"
        now = story.next_world(4)
        run.wait_for_step(step_of(run) + 5)

    going = next(n for n in cluster.nodes if now[0] in cluster.workers_of(n))
    leavers = set(now) & set(cluster.workers_of(going))
    watch = watcher(cluster, going, "--cloud", "none", "--grace", "60s")
    watch.signal(signal.SIGTERM)
    while leavers & set(now := story.next_world(4)):
        pass
    assert watch.wait(60) == 0, watch.output
    stop(run, step_of(run) + 5)

    events = check_bits_and_samples(tmp_path, "stages", *options)
    assert len([e for e in events if e["kind"] == "handed_over"]) == len(leavers)
    lost = [e for e in events if e["kind"] == "member_lost"]
    assert len(lost) == (1 if tensor == 1 else 0), "handing over is no loss"
