"""`elastic doctor` of a whole cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.bench.nodes import LocalCluster
from tests.forked_command import ForkedCommand

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(400)]


def test_every_node_of_a_cluster_and_every_pair_is_examined(cluster: LocalCluster, tmp_path: Path) -> None:
    doctor = ForkedCommand(
        "-m", "elastic.cli", "doctor", "--address", cluster.address, "--storage", str(tmp_path / "runs"), "--json"
    )
    assert doctor.wait() == 0, doctor.output
    found = json.loads(doctor.output[doctor.output.index("{\n") :])["findings"]
    nodes = {f["where"] for f in found if f["check"] == "clock"}
    assert len(nodes) == len(cluster.nodes) + 1, "and the head"
    for check in ("disk", "device", "matmul", "ports"):
        assert {f["where"] for f in found if f["check"] == check} == nodes
    sums = [f["where"] for f in found if f["check"] == "all-reduce"]
    assert len(sums) == len(nodes) * (len(nodes) - 1) // 2 + 1
    assert sums[-1] == f"all {len(nodes)} nodes"
    assert not [f for f in found if f["state"] == "fail"]
