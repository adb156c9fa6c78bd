"""One run through many faults on a cluster: survivors keep their processes, no step is lost, no bit differs."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic.observe.ledger import EVENTS, METRICS, gaps_and_doubles, read_records
from elastic.storage import Storage
from jobs.bench.nodes import Command, LocalCluster, result

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
JOB = ("--run.duration", "100000st", "--run.exactness", "bitwise", "--scaling.max-workers", "3",
       "--checkpoint.every", "50st", "--observe.log-every", "0.05", "--run.name", "faults")  # fmt: skip


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("SLOW_JOB_PAUSE_S", "0.02")
    shared = LocalCluster(nodes=3, cpus=1)
    yield shared
    shared.close()


class Story:
    """Reads the run's console: worlds as they are formed, with the process ids of their members."""

    def __init__(self, run: Command):
        self.run, self._seen = run, 0

    def next_world(self, size: int) -> dict[int, str]:
        """The pids (and ids) of the next world of this size."""

        def parse(line: str) -> re.Match[str] | None:
            match = re.search(r"world formed world 1-(\d+) size=(\d+) pids=\[(.*?)\] ids=\[(.*?)\]", line)
            return match if match and int(match[1]) > self._seen and int(match[2]) == size else None

        match = parse(self.run.wait_for(lambda line: parse(line) is not None))
        assert match is not None
        self._seen = int(match[1])
        return dict(zip(map(int, match[3].split(",")), re.findall(r"'(\w+)'", match[4]), strict=True))


def test_killed_workers_and_nodes_a_new_node_and_a_drained_one_cost_no_survivor_no_step_and_no_bit(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    run = Command("-m", "tests.slow_job", "--cluster.address", cluster.address, "--run.storage", str(tmp_path), *JOB)
    story = Story(run)
    first = story.next_world(3)
    run.wait_for_step(10)

    # a worker is killed: the two others go on as they are, and a new one is taken in
    victim = sorted(first)[0]
    os.kill(victim, signal.SIGKILL)
    assert set(story.next_world(2)) == set(first) - {victim}
    second = story.next_world(3)
    assert set(first) - {victim} < set(second)

    # a whole node is killed: its place stays empty until a node joins
    cluster.kill_node(cluster.nodes[0])
    survivors = story.next_world(2)
    assert set(survivors) < set(second)
    cluster.add_node()
    third = story.next_world(3)
    assert set(survivors) < set(third)

    # a node will go away: a replacement is taken in before it does, on a node that is already there
    cluster.add_node()
    cluster.drain_node(cluster.nodes[0], deadline_s=60)
    run.wait_for(lambda line: "handed over" in line)
    fourth = story.next_world(3)
    assert len(set(third) & set(fourth)) == 2

    # and the run has the bits of an undisturbed one, paused at the same step
    run.signal(signal.SIGINT)
    assert run.wait() == 130, run.output
    found = result(tmp_path / "faults")
    twin = Command("-m", "elastic.worker", "--module", "tests.slow_job", "--class", "Slow", "--workers", "1",
                   "--run.storage", str(tmp_path / "twin"), *JOB, "--run.stop-after", f"{found['steps']}st",
                   environment={"SLOW_JOB_PAUSE_S": "0"})  # fmt: skip
    assert twin.wait() == 0, twin.output
    assert found["weights_sha256"] == result(tmp_path / "twin" / "faults")["weights_sha256"]
    storage = Storage(str(tmp_path / "faults"))
    assert gaps_and_doubles(read_records(storage, METRICS), 32) == []
    steps = [r["step"] for r in read_records(storage, METRICS) if "sample_hash" in r]
    assert len(steps) == len(set(steps)), "a step was applied twice"
    assert not [e for e in read_records(storage, EVENTS) if e["kind"] == "member_suspected"]
