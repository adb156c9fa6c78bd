"""Nodes that an autoscaler starts and takes back, and nodes of several GPUs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from jobs.bench.nodes import OBJECT_STORE_BYTES, REPOSITORY, Command, LocalCluster, free_port
from tests.own_cluster import OwnCluster
from tests.ray_cluster import Story, check_bits_and_samples, stop, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("fork_server")]
HEAD_ID = "f" * 51 + "00000"
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
FAKE_NODES = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"  # its own type lacks a file


def autoscaled(folder: Path, most: int) -> OwnCluster:
    """A head with one CPU, whose autoscaler (version 2) starts up to `most` nodes of one CPU on this machine."""
    from ray.util import get_node_ip_address

    port = free_port()
    small = {"CPU": 1, "object_store_memory": OBJECT_STORE_BYTES}
    config = {
        "cluster_name": "elastic-test", "max_workers": most, "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.1, "head_node_type": "ray.head.default", "auth": {}, "docker": {},
        "file_mounts": {}, "cluster_synced_files": [], "rsync_exclude": [], "rsync_filter": [],
        **{f"{part}_commands": [] for part in COMMANDS},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "small": {"resources": small, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
        "provider": {
            "type": "external", "module": FAKE_NODES, "launch_multiple": True, "head_node_id": HEAD_ID,
            "gcs_address": f"{get_node_ip_address()}:{port}",
        },
    }  # fmt: skip
    file = folder / "autoscaling.json"
    file.write_text(json.dumps(config))
    environment = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID, "RAY_AUTH_MODE": "disabled",
    }  # fmt: skip
    return OwnCluster(
        "--num-cpus=1", "--include-dashboard=false", f"--autoscaling-config={file}", environment=environment, port=port
    )


def test_a_run_starts_on_one_node_gets_two_more_from_the_autoscaler_and_gives_them_back(tmp_path: Path) -> None:
    with autoscaled(tmp_path, most=2) as cluster:
        assert len(cluster.processes("raylet/raylet")) == 1
        options = ("--run.duration", "100000st", "--scaling.max-workers", "3")
        run = Command("-m", "tests.slow_job", "--cluster.address", cluster.address, "--run.storage", str(tmp_path),
                      "--run.name", "grows", "--run.exactness", "bitwise", "--observe.log-every", "0.05", *options,
                      environment={"SLOW_JOB_PAUSE_S": "0.05"})  # fmt: skip
        story = Story(run)
        first = story.next_world(1, 2, 3)  # the one node's worker alone, if nodes start slower than workers
        assert len(first) == 3 or set(first) < set(story.next_world(3))
        stop(run, 5)
        assert len(cluster.processes("raylet/raylet")) == 3
        wait_until(lambda: len(cluster.processes("raylet/raylet")) == 1, 60)
    check_bits_and_samples(tmp_path, "grows", *options)


GPU_PROGRAM = """
import json, os, sys, time
from pathlib import Path
import ray
from elastic.cluster.actors import see_devices
from elastic.cluster.raytrain import RayTrainer
from elastic.cluster.rooms import GroupPlan
from elastic.cluster.sharing import Terms

folder = Path(sys.argv[2])

def pick(_):
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
RayTrainer(pick, name="gpus", storage_path=str(folder / "markers"), plan=plan, accelerator="gpu").run()
"""


def test_workers_on_nodes_of_several_gpus_each_pick_their_own_also_those_that_come_late(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    """The GPUs are Ray's alone, there are none; so the program does nothing but pick."""

    def picks() -> dict[int, dict[str, Any]]:
        found = {int(file.stem): json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
        return {pid: seen for pid, seen in found.items() if Path(f"/proc/{pid}").exists()}

    (tmp_path / "markers").mkdir()
    (tmp_path / "program.py").write_text(GPU_PROGRAM)
    nodes = [cluster.add_node(gpus=2) for _ in range(2)]
    try:
        program = Command(
            str(tmp_path / "program.py"), cluster.address, str(tmp_path), environment={"PYTHONPATH": str(REPOSITORY)}
        )
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
    for seen in (first, later):
        assert len({(p["node"], p["index"]) for p in seen.values()}) == 4
        assert {p["visible"] for p in seen.values()} == {"0,1"}
        assert all(p["assigned"] == [str(p["index"])] for p in seen.values())
    assert len(first.keys() & later.keys()) == 2
