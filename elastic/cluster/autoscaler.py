"""What Ray's autoscaler can start for a cluster, and what it could not start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import yaml

from elastic.compat.ray import autoscaler_groups, failed_launches

REQUEST_TIMEOUT_S = 5
MOST_TEXT = 300
LOG_BYTES = 1 << 20
_FAILED = re.compile(r"Failed to launch \d+ nodes? of type (?P<kind>\S+): (?P<why>\S[^\n]*)")
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # `ray up` writes it to the head


def node_types() -> list[dict[str, float]]:
    """Resources of one node of each type that the autoscaler of the joined cluster may start.

    As the autoscaler reports them; where it does not, as `ray up` has described the cluster on its head, if this
    process is there. Empty where neither says anything.
    """
    reported = autoscaler_groups()
    if reported is not None:
        return reported
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
        for of in types.values()
        if of.get("resources") and of.get("max_workers", cluster.get("max_workers", 0))
    ]


def _on_head() -> bool:
    return ray.get_runtime_context().gcs_address.rpartition(":")[0] == ray.util.get_node_ip_address()


def failures(address: str, session_folder: str) -> list[str]:
    """What the autoscaler could not start lately, a line each; empty where there is none of version 2.

    Why it could not is lost between Ray's autoscaler and what it reports, and stands in its log on the head alone.

    Args:
        address: of the head's GCS, host:port.
        session_folder: of Ray on this machine.

    Raises:
        ray.exceptions.RayError, RuntimeError: the head does not answer.
    """
    # Its list of failed nodes has every node that ever went, also those that were let go for being idle: no news.
    found = failed_launches(address, REQUEST_TIMEOUT_S)
    log = Path(session_folder) / "logs" / "monitor.log"
    reasons = reasons_in(_end_of(log)) if _on_head() and log.is_file() else {}
    return list(
        dict.fromkeys(
            f"nodes of type {kind} could not be started: "
            + (reasons.get(kind) or why or "its log on the head says why")[:MOST_TEXT]
            for kind, why in found
        )
    )


def reasons_in(log: str) -> dict[str, str]:
    """The last reason that an autoscaler's log has for each type of node that could not be started."""
    return {match["kind"]: match["why"].strip() for match in _FAILED.finditer(log)}


def _end_of(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        return file.read().decode(errors="replace")
