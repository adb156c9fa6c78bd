"""The example of a parameter server learns though a worker is killed, within the staleness that it states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.bench.nodes import LocalCluster
from tests.forked_command import ForkedCommand


@pytest.mark.ray
def test_it_learns_though_a_worker_is_killed_and_another_joins(cluster: LocalCluster, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"

    run = ForkedCommand(
        "-m",
        "jobs.parameter_server",
        *("--address", cluster.address, "--workers", "2", "--updates", "150", "--max-staleness", "4"),
        *("--slow-ms", "20", "--json", str(file)),
    )

    run.wait_for(lambda line: line.startswith("workers lost"), timeout_s=150)
    print(run.output)
    found = json.loads(file.read_text())
    free, bound = found["asynchronous"], found["synchronous"]
    assert (free["updates"], free["gradients"], free["killed"]) == (150, 300, 1)
    assert free["joined"] >= 1
    assert max(map(int, free["staleness"])) <= 4
    assert sum(free["staleness"].values()) >= 300
    assert bound["staleness"] == {"0": bound["gradients"]}
    assert free["accuracy"] > 0.7
    assert bound["accuracy"] > 0.7
