"""A node of a Ray cluster whose link is cut: Ray notices after its health checks, the run does not wait for that."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic.membership.protocol import SILENT_S
from elastic.observe.ledger import METRICS, read_records
from elastic.storage import Storage
from jobs.bench.nodes import Command
from tests import hosts as namespaces
from tests.hosts import Hosts, RayNodes
from tests.ray_cluster import Story, check_bits_and_samples, slow_job, step_of, stop, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("fork_server")]
#: Ray calls a node dead after so many checks; by default that takes 15 s and more.
HEALTH = {
    "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "8",
}  # fmt: skip
JOB = ("--run.duration", "100000st", "--scaling.max-workers", "3", "--checkpoint.every", "10st")


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayNodes]:
    """A head and two more nodes of one CPU, each on a host of its own."""
    reason = namespaces.missing()
    if reason is not None:
        pytest.skip(reason)
    for name, value in namespaces.RAY_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with Hosts() as hosts, RayNodes(hosts, head_cpus=1, environment=HEALTH) as made:
        made.add(2)
        yield made
        while Command.started:
            Command.started.pop().end()


def test_survivors_of_a_cut_link_go_on_whatever_ray_says_and_the_zombie_ends(nodes: RayNodes, tmp_path: Path) -> None:
    run = slow_job(nodes, tmp_path, "silent", *JOB, under=nodes.head.command())
    story, hosts = Story(run), nodes.hosts
    first = story.next_world(3)
    run.wait_for_step(10)
    silent = hosts.all[1]
    (zombie,) = silent.pids() & set(first)
    hosts.cut(silent)
    cut_at = time.time()

    # the others go on as they are, before and after Ray calls the node dead
    second = story.next_world(2)
    assert second == [pid for pid in first if pid != zombie]
    run.wait_for(lambda line: "has been marked dead" in line)
    run.wait_for_step(step_of(run) + 5)
    assert os.path.exists(f"/proc/{zombie}")

    # and the zombie ends when the link is back
    hosts.heal(silent)
    run.wait_for_step(step_of(run) + 5)
    wait_until(lambda: not os.path.exists(f"/proc/{zombie}"))
    stop(run, step_of(run) + 5)

    events = check_bits_and_samples(tmp_path, "silent", *JOB)
    rows = [row for row in read_records(Storage(str(tmp_path / "silent")), METRICS) if "sample_hash" in row]
    stall_s = next(row["time"] for row in rows if row["generation"] == "1-2") - cut_at
    print(f"cut to the survivors' next step: {stall_s:.2f} s")
    assert stall_s < SILENT_S + 3
    late = [e for e in events if e["kind"] == "checkpoint_committed" and e["time"] > cut_at + SILENT_S]
    assert late
    assert {e["generation"] for e in late} == {"1-2"}
