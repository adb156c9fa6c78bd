"""Nodes that an autoscaler starts and takes back."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import yaml

from jobs.bench.nodes import OBJECT_STORE_BYTES, REPOSITORY, Command, free_port, result
from tests.own_cluster import RAY, OwnCluster, install_wheel
from tests.ray_cluster import Story, check_bits_and_samples, stop, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(480), pytest.mark.usefixtures("fork_server")]
HEAD_ID = "f" * 51 + "00000"
PORTS = ("dashboard", "dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "ray-client-server")
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
#: The states of the placement groups that the autoscaler is to find nodes for.
DEMAND = """
import sys
from ray.autoscaler.v2.sdk import get_cluster_status
for group in get_cluster_status(sys.argv[1], timeout=10).resource_demands.placement_group_demand:
    for same in group.bundles_by_count:
        print(*[group.state] * same.count, sep="\\n")
"""


def autoscaled(
    folder: Path, types: dict[str, dict[str, int]], most: int, *options: str, environment: dict[str, str]
) -> OwnCluster:
    """A head without work, whose autoscaler (version 2) starts up to `most` nodes of each of these types, given by
    what one has, on this machine; and what `ray up` would have left in the home folder there."""
    from ray.util import get_node_ip_address

    port = free_port()
    config = {
        "cluster_name": "elastic-test",
        "max_workers": most * len(types),
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": 0.1,
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{part}_commands": [] for part in COMMANDS},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{
                name: {
                    "resources": {**has, "object_store_memory": OBJECT_STORE_BYTES},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": most,
                }
                for name, has in types.items()
            },
        },
        "provider": {
            "type": "external",
            "module": "failing_nodes.Failing",
            "fails_while": str(folder / "no-nodes"),
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "gcs_address": f"{get_node_ip_address()}:{port}",
        },
    }
    provider = folder / "provider"
    provider.mkdir()
    shutil.copy(REPOSITORY / "tests" / "failing_nodes.py", provider)
    file = folder / "autoscaling.json"
    file.write_text(json.dumps(config))
    (folder / "ray_bootstrap_config.yaml").write_text(json.dumps(config))
    return OwnCluster(
        "--num-cpus=0",
        "--num-gpus=0",
        f"--autoscaling-config={file}",
        *options,
        port=port,
        environment={
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "HOME": str(folder),
            **environment,
            "PYTHONPATH": f"{provider}:{environment['PYTHONPATH']}",
        },
    )


def test_a_run_begins_on_an_empty_cluster_whose_autoscaler_starts_nodes_and_takes_them_back(tmp_path: Path) -> None:
    (tmp_path / "no-nodes").touch()
    """Its workers, of hsdp, are to have a node each, where two would fit: so rooms that are asked for together may come
    together, and one is given back."""
    without_token = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY)}
    with autoscaled(
        tmp_path, {"small": {"CPU": 2}}, 3, "--include-dashboard=false", environment=without_token
    ) as cluster:
        assert len(cluster.processes("raylet/raylet")) == 1
        options = ("--run.duration", "100000st", "--scaling.max-workers", "3")
        command = (
            "-m",
            "tests.slow_job",
            "--cluster.address",
            cluster.address,
            "--run.storage",
            str(tmp_path),
            "--run.exactness",
            "bitwise",
            "--observe.log-every",
            "0.05",
        )
        environment = {"SLOW_JOB_PAUSE_S": "0.05", "RAY_AUTH_MODE": "disabled"}

        unknown = Command(*command, *options, "--run.name", "unknown", environment=environment)
        assert unknown.wait() == 2, unknown.output
        assert "the cluster has no node for workers yet" in unknown.lines[-1]

        large = ("--scaling.accelerator", "cpu", "--scaling.cpus-per-worker", "3", "--run.name", "large")
        waits = Command(*command, *options, *large, environment=environment)
        never = "it can start no node for 3 CPU, asked for 3 times: no type of node has as much"
        waits.wait_for(lambda line: f"the cluster's autoscaler: {never}" in line)
        waits.signal(signal.SIGINT)  # as long as it asks, others of its rank ask after it
        assert waits.wait() == 130

        hsdp = ("--parallel.strategy", "hsdp", "--scaling.workers-per-node", "1")
        run = Command(
            *command, *options, *hsdp, "--run.name", "grows", environment={**environment, "HOME": str(tmp_path)}
        )
        run.wait_for(lambda line: "waiting for the cluster's first node with a CPU" in line)
        why = "nodes of type small could not be started: InsufficientInstanceCapacity: no spot capacity in zone a"
        run.wait_for(lambda line: f"the cluster's autoscaler: {why}" in line)
        doctor = Command("-m", "elastic.cli", "doctor", "--address", cluster.address, environment=environment)
        doctor.wait_for(lambda line: why in line)
        doctor.wait()
        demand = Command("-c", DEMAND, cluster.address, environment=environment)
        assert demand.wait() == 0, demand.output
        assert demand.lines == ["PENDING"] * 3, "all rooms are asked for at once"
        (tmp_path / "no-nodes").unlink()
        story = Story(run)
        first = story.next_world(1, 2, 3)  # of those that came first alone, if nodes start slower than workers
        assert len(first) == 3 or set(first) < set(story.next_world(2, 3))
        run.wait_for_step(5)
        assert len(cluster.processes("raylet/raylet")) == 4
        stop(run, 5)
        wait_until(lambda: len(cluster.processes("raylet/raylet")) == 1, 60)
    check_bits_and_samples(tmp_path, "grows", *options)


def commands_of(document: str) -> list[list[str]]:
    """Of the Ray commands that a document gives for submitting: the words of each, in order. A RayJob's entrypoint is
    what its operator submits."""
    text = (REPOSITORY / "docs" / document).read_text()
    if document == "kubernetes.md":
        (manifest,) = re.findall(r"```yaml\n(apiVersion: ray.io/v1\nkind: RayJob\n.*?)```", text, re.DOTALL)
        submit = ["ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--submission-id", "kubernetes", "--"]
        return [[*submit, *shlex.split(yaml.safe_load(manifest)["spec"]["entrypoint"])]]
    (block,) = re.findall(r"## Submit\n.*?```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines() if line.startswith("ray ")]


@pytest.mark.long
def test_the_documented_commands_bring_nodes_and_finish_and_the_nodes_go_again(tmp_path: Path) -> None:
    ports = {part: free_port() for part in PORTS}
    url, app, user = f"http://127.0.0.1:{ports['dashboard']}", tmp_path / "app", tmp_path / "user"
    for folder in (app, user):  # the image of docs/Dockerfile has the jobs, a user's folder is sent along
        shutil.copytree(REPOSITORY / "jobs", folder / "jobs", ignore=shutil.ignore_patterns("__pycache__", "bench"))
    client = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "the-token-of-this-cluster"}
    environment = {
        **client,
        "RAY_JOB_STOP_WAIT_TIME_S": "120",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{install_wheel(tmp_path)}:{app}",
    }
    nodes = {"cpu": {"CPU": 1}, "gpu": {"CPU": 1, "GPU": 1}}

    def documented(words: list[str], *more: str, accelerator: str) -> Command:
        """A command as it stands, but for where the cluster and the bucket are."""
        given = {"http://127.0.0.1:8265": url, "s3://bucket/runs": str(tmp_path / "runs"), "gpu": accelerator}
        began = [given.get(word, word) for word in words]
        print("$", *began, *more)
        return Command(RAY, *began[1:], *more, cwd=user, environment={**client, "PYTHONPATH": ""}, show=True)

    options = ("--dashboard-host=127.0.0.1", *(f"--{part}-port={port}" for part, port in ports.items()))
    with autoscaled(tmp_path, nodes, 2, *options, environment=environment) as cluster:

        def count() -> int:
            return len(cluster.processes("raylet/raylet"))

        submit, logs, stop_it = commands_of("clusters.md")
        # GPUs are believed in, and nodes with one come. Ray only counts them here: no worker can be had
        first = documented(submit, accelerator="gpu")
        first.wait_for(lambda line: "waiting for the cluster's first node with a GPU" in line)
        wait_until(lambda: count() == 3, 60)
        followed = documented(logs, accelerator="gpu")
        followed.wait_for(lambda line: "starting 8 workers on gpu" in line)
        assert documented(stop_it, accelerator="gpu").wait() == 0
        first.wait()
        followed.wait()
        wait_until(lambda: count() == 1, 60)

        (submit,) = commands_of("kubernetes.md")
        run = documented(submit, "--run.duration", "30st", "--optim.warmup", "5st", accelerator="cpu")
        run.wait_for(lambda line: "world formed" in line)
        assert count() > 1
        assert run.wait() == 0, run.output
        wait_until(lambda: count() == 1, 60)
        assert "(autoscaler" not in run.output
        assert result(tmp_path / "runs" / "codegpt")["status"] == "finished"
