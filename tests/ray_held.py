"""What runs hold of a cluster and of this machine: nothing when they ended, crashed or were stopped."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ray._private.state import GlobalState
from ray._raylet import GcsClient, GcsClientOptions

from jobs.bench.nodes import LocalCluster
from tests import leaks
from tests.ray_cluster import wait_until


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
        """Living actors, placement groups, demands of runs, files in Ray's folder, processes, and shared memory of
        processes that were ever seen here."""
        actors = self._state.actor_table(None)
        groups = self._state.placement_group_table().values()
        processes = {p: n for p, n in leaks.descendants(os.getpid()).items() if n.startswith("ray::")}
        self._pids |= processes.keys()
        return {
            "actors": sorted(a["ActorClassName"] for a in actors.values() if a["State"] != "DEAD"),
            "groups": sorted(g["name"] for g in groups if g["state"] != "REMOVED"),
            "demands": sorted(k.decode() for k in self._gcs.internal_kv_keys(b"run/", namespace=b"elastic")),
            "files": sorted(str(p) for p in self._session.glob("elastic-*")),
            "processes": sorted(n for n in processes.values() if not n.startswith("ray::IDLE")),
            "shared memory": [n for n in os.listdir("/dev/shm") if any(f"_{pid}_" in n for pid in self._pids)],
        }

    def check_nothing_is_left(self, crashed: str = "") -> None:
        """All is as before. What a killed driver left in Ray's folder goes with the session, its standing
        with the next run."""

        def left() -> dict[str, list[str]]:
            now = self.look()
            found = {kind: [n for n in names if n not in self._before[kind]] for kind, names in now.items()}
            if crashed:
                found["demands"], found["files"] = [n for n in found["demands"] if n != f"run/{crashed}"], []
            return {kind: names for kind, names in found.items() if names}

        with contextlib.suppress(AssertionError):  # the assertion below says what is left
            wait_until(lambda: not left())
        assert left() == {}
