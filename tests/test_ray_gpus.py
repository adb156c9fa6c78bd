"""Workers on nodes of several GPUs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from jobs.bench.nodes import LocalCluster
from tests.forked_command import ForkedCommand
from tests.ray_cluster import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(480)]

GPU_PROGRAM = """
import json, os, sys, time
from pathlib import Path
import ray
from elastic.cluster.actors import see_devices
from elastic.cluster.references import Sent
from elastic.cluster.placement_groups import GroupPlan
from elastic.cluster.sharing import Terms
from elastic.cluster.workers import RayWorkers

folder = Path(sys.argv[2])

def pick():
    index = see_devices()
    runtime, visible = ray.get_runtime_context(), os.environ["CUDA_VISIBLE_DEVICES"]
    seen = {"node": runtime.get_node_id(), "index": index, "visible": visible,
            "assigned": runtime.get_accelerator_ids()["GPU"]}
    (folder / f"{os.getpid()}.new").write_text(json.dumps(seen))
    (folder / f"{os.getpid()}.new").rename(folder / f"{os.getpid()}.json")
    while not (folder / "stop").exists():
        time.sleep(0.05)
    return "finished"

ray.init(address=sys.argv[1])
plan = GroupPlan("http://127.0.0.1:9", "none", 4, 0, None, {"GPU": 1.0, "CPU": 1.0}, "elastic/gpus/",
                 Terms("gpus", 0, 0.0, "gpu", 4, 600.0))
workers = RayWorkers(plan, Sent(pick), here=False)
workers.start()
while workers.over() is None:
    time.sleep(0.1)
assert workers.over().why == "", workers.over()
workers.close()
"""


def test_workers_on_nodes_of_several_gpus_each_pick_their_own_also_those_that_come_late(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    """The GPUs are Ray's alone, there are none; so the program does nothing but pick."""

    def picks() -> dict[int, dict[str, Any]]:
        found = {int(file.stem): json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
        return {pid: seen for pid, seen in found.items() if Path(f"/proc/{pid}").exists()}

    (tmp_path / "program.py").write_text(GPU_PROGRAM)
    nodes = [cluster.add_node(gpus=2) for _ in range(2)]
    try:
        program = ForkedCommand(str(tmp_path / "program.py"), cluster.address, str(tmp_path))
        wait_until(lambda: len(picks()) == 4 or program.process.poll() is not None, 90)
        first = picks()
        for node in {seen["node"] for seen in first.values()}:
            os.kill(next(pid for pid, seen in first.items() if seen["node"] == node), signal.SIGKILL)
        wait_until(lambda: len(picks()) == 4 and picks().keys() != first.keys(), 60)
        later = picks()
        (tmp_path / "stop").touch()
        assert program.wait() == 0, program.output
    finally:
        cluster.kill_nodes(nodes)
        cluster.wait_until_known_dead(nodes)  # the next tests are to see no GPU
    for seen in (first, later):
        assert len({(p["node"], p["index"]) for p in seen.values()}) == 4
        assert {p["visible"] for p in seen.values()} == {"0,1"}
        assert all(p["assigned"] == [str(p["index"])] for p in seen.values())
    assert len(first.keys() & later.keys()) == 2
