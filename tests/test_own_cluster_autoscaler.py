"""Nodes that an autoscaler starts and takes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.bench.nodes import OBJECT_STORE_BYTES, REPOSITORY, Command, free_port
from tests.own_cluster import OwnCluster
from tests.ray_cluster import Story, check_bits_and_samples, stop, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480), pytest.mark.usefixtures("fork_server")]
HEAD_ID = "f" * 51 + "00000"
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")


def autoscaled(folder: Path, most: int) -> OwnCluster:
    """A head without work, whose autoscaler (version 2) starts up to `most` nodes of one CPU on this machine; and what
    `ray up` would have left in the home folder there."""
    from ray.util import get_node_ip_address

    port = free_port()
    small = {"CPU": 1, "object_store_memory": OBJECT_STORE_BYTES}
    config = {
        "cluster_name": "elastic-test", "max_workers": most, "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.1, "head_node_type": "ray.head.default", "auth": {}, "docker": {},
        "file_mounts": {}, "cluster_synced_files": [], "rsync_exclude": [], "rsync_filter": [],
        **{f"{part}_commands": [] for part in COMMANDS},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "small": {"resources": small, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
        "provider": {
            "type": "external", "module": "tests.failing_nodes.Failing", "fails_while": str(folder / "no-nodes"),
            "launch_multiple": True, "head_node_id": HEAD_ID,
            "gcs_address": f"{get_node_ip_address()}:{port}",
        },
    }  # fmt: skip
    file = folder / "autoscaling.json"
    file.write_text(json.dumps(config))
    (folder / "ray_bootstrap_config.yaml").write_text(json.dumps(config))
    environment = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID, "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    return OwnCluster(
        "--num-cpus=0",
        "--num-gpus=0",
        "--include-dashboard=false",
        f"--autoscaling-config={file}",
        environment=environment,
        port=port,
    )


def test_a_run_begins_on_an_empty_cluster_whose_autoscaler_starts_nodes_and_takes_them_back(tmp_path: Path) -> None:
    (tmp_path / "no-nodes").touch()
    with autoscaled(tmp_path, most=3) as cluster:
        assert len(cluster.processes("raylet/raylet")) == 1
        options = ("--run.duration", "100000st", "--scaling.max-workers", "3")
        command = ("-m", "tests.slow_job", "--cluster.address", cluster.address, "--run.storage", str(tmp_path),
                   "--run.exactness", "bitwise", "--observe.log-every", "0.05")  # fmt: skip
        environment = {"SLOW_JOB_PAUSE_S": "0.05", "RAY_AUTH_MODE": "disabled"}

        unknown = Command(*command, *options, "--run.name", "unknown", environment=environment)
        assert unknown.wait() == 2, unknown.output
        assert "the cluster has no node for workers yet" in unknown.lines[-1]

        run = Command(*command, *options, "--run.name", "grows", environment={**environment, "HOME": str(tmp_path)})
        run.wait_for(lambda line: "waiting for the cluster's first node with a CPU" in line)
        why = "nodes of type small could not be started: InsufficientInstanceCapacity: no spot capacity in zone a"
        run.wait_for(lambda line: f"the cluster's autoscaler: {why}" in line)
        doctor = Command("-m", "elastic.cli", "doctor", "--address", cluster.address, environment=environment)
        doctor.wait_for(lambda line: why in line)
        doctor.wait()
        (tmp_path / "no-nodes").unlink()
        story = Story(run)
        first = story.next_world(1, 2, 3)  # of those that came first alone, if nodes start slower than workers
        assert len(first) == 3 or set(first) < set(story.next_world(2, 3))
        run.wait_for_step(5)
        assert len(cluster.processes("raylet/raylet")) == 4
        stop(run, 5)
        wait_until(lambda: len(cluster.processes("raylet/raylet")) == 1, 60)
    check_bits_and_samples(tmp_path, "grows", *options)
