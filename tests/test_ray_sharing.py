"""Two runs on one cluster of three nodes; and what a run leaves in the cluster when it ends, crashes or is stopped."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from ray._private.state import GlobalState
from ray._raylet import GcsClient, GcsClientOptions

from jobs.bench.nodes import LocalCluster, result
from tests import leaks
from tests.ray_cluster import Story, check_bits_and_samples, slow_job, stop, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]
FOREVER = ("--run.duration", "100000st")
WHOLE_NODES = ("--scaling.cpus-per-worker", "2")  # those of a node of the cluster


def test_a_run_of_higher_priority_gets_its_least_and_gives_it_back_and_both_have_their_bits(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    held = Held(cluster)
    low_options = (*FOREVER, *WHOLE_NODES, "--scaling.min-workers", "1", "--scaling.max-workers", "3",
                   "--scaling.request-timeout", "2s")  # fmt: skip
    low = slow_job(cluster, tmp_path, "low", *low_options)
    story = Story(low)
    first = story.next_world(3)
    low.wait_for_step(5)

    # a run that needs two of the three nodes: the first shrinks at a step boundary, nobody is lost
    high_options = ("--run.duration", "25st", *WHOLE_NODES)
    high = slow_job(cluster, tmp_path, "high", *high_options, "--scaling.min-workers", "2", "--scaling.priority", "5")
    second = story.next_world(1)
    assert set(second) < set(first)
    assert len(Story(high).next_world(2)) == 2
    yielded = low.wait_for(lambda line: "yielded" in line)
    assert "high" in yielded

    # it asks for more in vain, and after a while no longer; when the other has finished, it grows again
    wait_until(lambda: not held.groups("elastic/low/", "PENDING"))
    assert high.process.poll() is None, high.output
    assert high.wait(120) == 0, high.output
    assert set(second) < set(story.next_world(3))

    stop(low, 10)
    low_events = check_bits_and_samples(tmp_path, "low", *low_options)
    high_events = check_bits_and_samples(tmp_path, "high", *high_options)
    assert result(tmp_path / "high")["status"] == "finished"
    assert not {"member_lost", "member_suspected"} & {e["kind"] for e in (*low_events, *high_events)}
    assert [e["detail"]["max_workers"] for e in low_events if e["kind"] == "yielded"] == [1, None]
    held.check_nothing_is_left()  # of one that was finished, and of one that was stopped


def test_a_run_that_crashed_leaves_nothing_running_and_nothing_held(cluster: LocalCluster, tmp_path: Path) -> None:
    held = Held(cluster)
    run = slow_job(cluster, tmp_path, "crashed", *FOREVER, "--scaling.max-workers", "3")
    run.wait_for_step(5)
    during = held.look()
    assert during["actors"].count("Controller") == during["actors"].count("HostActor") == 1
    assert during["actors"].count("RayTrainWorker") == len(during["groups"]) == 3
    assert during["board"] == ["run/crashed"]

    run.process.kill()
    assert run.wait() == -signal.SIGKILL
    held.check_nothing_is_left(crashed="crashed")


class Held:
    """What runs hold of a cluster and of this machine, and what there was before."""

    def __init__(self, cluster: LocalCluster):
        options = GcsClientOptions.create(
            cluster.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=True
        )
        self._state = GlobalState()
        self._state._initialize_global_state(options)
        self._gcs = GcsClient(cluster.address)
        self._session = Path(cluster.session_folder)
        self._pids: set[int] = set()
        self._before = self.look()

    def groups(self, prefix: str, state: str) -> list[str]:
        """Names of placement groups."""
        found = self._state.placement_group_table().values()
        return [g["name"] for g in found if g["name"].startswith(prefix) and g["state"] == state]

    def look(self) -> dict[str, list[str]]:
        """Living actors, placement groups, words on the board, files in Ray's folder, processes, and shared memory of
        processes that were ever seen here."""
        actors = self._state.actor_table(None)
        groups = self._state.placement_group_table().values()
        processes = {p: n for p, n in leaks.descendants(os.getpid()).items() if n.startswith("ray::")}
        self._pids |= processes.keys()
        return {
            "actors": sorted(a["ActorClassName"] for a in actors.values() if a["State"] != "DEAD"),
            "groups": sorted(g["name"] for g in groups if g["state"] != "REMOVED"),
            "board": sorted(k.decode() for k in self._gcs.internal_kv_keys(b"run/", namespace=b"elastic")),
            "files": sorted(str(p) for p in self._session.glob("elastic-*")),
            "processes": sorted(n for n in processes.values() if not n.startswith("ray::IDLE")),
            "shared memory": [n for n in os.listdir("/dev/shm") if any(f"_{pid}_" in n for pid in self._pids)],
        }

    def check_nothing_is_left(self, crashed: str = "") -> None:
        """All is as before. What a killed driver left in Ray's folder goes with the session, its word on the board
        with the next run."""

        def left() -> dict[str, list[str]]:
            now = self.look()
            found = {kind: [n for n in names if n not in self._before[kind]] for kind, names in now.items()}
            if crashed:
                found["board"], found["files"] = [n for n in found["board"] if n != f"run/{crashed}"], []
            return {kind: names for kind, names in found.items() if names}

        with contextlib.suppress(AssertionError):  # the assertion below says what is left
            wait_until(lambda: not left())
        assert left() == {}
