"""What Ray's autoscaler can start for a cluster, and what it could not start.

Touches private names of Ray, as `raytrain` does; `tests/test_ray_contract.py` has a test for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private.state import state
from ray.autoscaler.v2.sdk import get_cluster_status

REQUEST_TIMEOUT_S = 5
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # `ray up` writes it to the head


def node_types() -> list[dict[str, float]]:
    """Resources of one node of each type that the autoscaler of the joined cluster may start.

    As the autoscaler reports them; where it does not, as `ray up` has described the cluster on its head, if this
    process is there. Empty where neither says anything.
    """
    reported = state.get_cluster_config()
    if reported is not None and reported.node_group_configs:
        return [dict(group.resources) for group in reported.node_group_configs if group.max_count]
    file = BOOTSTRAP.expanduser()
    if not _on_head() or not file.is_file():
        return []
    return types_in(yaml.safe_load(file.read_text()))


def types_in(cluster: Mapping[str, Any]) -> list[dict[str, float]]:
    """The same, of a cluster's description (as in `cluster.yaml`). Types without resources are left out: Ray has not
    filled them in, so what they have is not known."""
    types = cluster.get("available_node_types") or {}
    return [
        {name: float(amount) for name, amount in of["resources"].items() if isinstance(amount, (int, float))}
        for of in types.values() if of.get("resources") and of.get("max_workers", cluster.get("max_workers", 0))
    ]  # fmt: skip


def _on_head() -> bool:
    return ray.get_runtime_context().gcs_address.rpartition(":")[0] == ray.util.get_node_ip_address()


def failures(address: str) -> list[str]:
    """What the autoscaler could not start lately, each in a line; empty where there is no autoscaler of version 2.

    Args:
        address: of the head's GCS, host:port.

    Raises:
        ray.exceptions.RayError, RuntimeError: the head does not answer.
    """
    found = get_cluster_status(address, timeout=REQUEST_TIMEOUT_S)
    lines = [
        f"{launch.count} x {launch.ray_node_type_name} could not be started: {launch.details or 'no reason given'}"
        for launch in found.failed_launches
    ]
    lines += [
        f"a node of type {node.ray_node_type_name} failed: {node.failure_detail or node.details or 'no reason given'}"
        for node in found.failed_nodes if node.failure_detail or node.details
    ]  # fmt: skip
    return list(dict.fromkeys(" ".join(line.split())[:500] for line in lines))
