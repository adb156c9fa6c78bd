"""Two runs on one cluster of three nodes; and what a run leaves in the cluster when it ends, crashes or is stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from jobs.bench.nodes import Command, LocalCluster, result
from tests.ray_cluster import Story, actor_pids, check_bits_and_samples, slow_job, stop, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
FOREVER = ("--run.duration", "100000st")
WHOLE_NODES = ("--scaling.cpus-per-worker", "2")  # those of a node of the cluster


def test_a_run_of_higher_priority_gets_its_least_and_gives_it_back_and_both_have_their_bits(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    low_options = (*FOREVER, *WHOLE_NODES, "--scaling.min-workers", "1", "--scaling.max-workers", "3",
                   "--scaling.request-timeout", "2s")  # fmt: skip
    low = slow_job(cluster, tmp_path, "low", *low_options)
    story = Story(low)
    first = story.next_world(3)
    low.wait_for_step(5)

    # a run that needs two of the three nodes: the first shrinks at a step boundary, nobody is lost
    high_options = ("--run.duration", "60st", *WHOLE_NODES)
    high = slow_job(cluster, tmp_path, "high", *high_options, "--scaling.min-workers", "2", "--scaling.priority", "5")
    second = story.next_world(1)
    assert set(second) < set(first)
    assert len(Story(high).next_world(2)) == 2
    yielded = low.wait_for(lambda line: "yielded" in line)
    assert "high" in yielded

    # it asks for more in vain, and after a while no longer; when the other has finished, it grows again
    wait_until(lambda: not placement_groups(cluster, "elastic/low/", "PENDING"))
    assert high.process.poll() is None, high.output
    assert high.wait(120) == 0, high.output
    assert set(second) < set(story.next_world(3))

    stop(low, 10)
    low_events = check_bits_and_samples(tmp_path, "low", *low_options)
    high_events = check_bits_and_samples(tmp_path, "high", *high_options)
    assert result(tmp_path / "high")["status"] == "finished"
    assert not {"member_lost", "member_suspected"} & {e["kind"] for e in (*low_events, *high_events)}
    assert [e["detail"]["max_workers"] for e in low_events if e["kind"] == "yielded"] == [1, None]


PROGRAM = """
import json, sys, ray
from ray._private.state import actors
from ray.experimental.internal_kv import _internal_kv_list
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(json.dumps({
    "actors": [a["ActorClassName"] for a in actors().values() if a["State"] != "DEAD"],
    "groups": {g["name"]: g["state"] for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"},
    "board": [key.decode() for key in _internal_kv_list(b"run/", namespace=b"elastic")],
    "free": sorted(ray.available_resources().items())[:1],
}))
"""


def ask_ray(cluster: LocalCluster) -> dict[str, Any]:
    """What the cluster holds, as Ray says."""
    command = Command("-c", PROGRAM, cluster.address)
    assert command.wait() == 0, command.output
    return json.loads(command.lines[-1])


def placement_groups(cluster: LocalCluster, prefix: str, state: str) -> list[str]:
    return [n for n, s in ask_ray(cluster)["groups"].items() if n.startswith(prefix) and s == state]


def left_on_this_machine() -> dict[str, set[str]]:
    """Shared memory, files of runs in Ray's folders, and processes of ours."""
    sessions = Path("/tmp/ray")
    return {
        "shared memory": {n for n in os.listdir("/dev/shm") if not n.startswith("plasma")},
        "files": {str(p) for p in sessions.glob("session_2*/elastic-*")},
        "processes": {str(p) for name in ("RayTrainWorker", "Controller", "HostActor") for p in actor_pids(name)},
    }


@pytest.mark.parametrize("ending", ["finished", "stopped", "crashed"])
def test_a_run_frees_everything(ending: str, cluster: LocalCluster, tmp_path: Path) -> None:
    before, here = ask_ray(cluster), left_on_this_machine()
    options = ("--run.duration", "30st" if ending == "finished" else "100000st", "--scaling.max-workers", "7",
               "--batch.microbatches", "8", "--scaling.cpus-per-worker", "1")  # fmt: skip
    run = slow_job(cluster, tmp_path, ending, *options, pause_s=0.005)
    run.wait_for_step(5)
    assert ask_ray(cluster)["board"] == [f"run/{ending}"]
    if ending == "stopped":
        run.signal(signal.SIGTERM)
    elif ending == "crashed":
        run.process.kill()
    assert run.wait() == {"finished": 0, "stopped": 130, "crashed": -signal.SIGKILL}[ending], run.output

    wait_until(lambda: not actor_pids("RayTrainWorker") and not actor_pids("HostActor"))
    after = ask_ray(cluster)
    assert after["actors"] == before["actors"]
    assert after["groups"] == before["groups"] == {}
    assert after["board"] == ([] if ending != "crashed" else ["run/crashed"]), "the next run forgets a crashed one"
    wait_until(lambda: left_on_this_machine() == here or ending == "crashed")
    now = left_on_this_machine()
    assert {k: v - here[k] for k, v in now.items() if k != "files"} == {"shared memory": set(), "processes": set()}
