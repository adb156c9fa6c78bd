"""What Ray's autoscaler can start for a cluster, what it failed to start, and which requests it can never serve."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import yaml

from elastic.cluster.capacity import Resources
from elastic.compat.ray import Autoscaling, autoscaler_groups, autoscaling

REQUEST_TIMEOUT_S = 5
MOST_TEXT = 300
LOG_BYTES = 1 << 20
_FAILED = re.compile(r"Failed to launch \d+ nodes? of type (?P<kind>\S+): (?P<why>\S[^\n]*)")
BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # `ray up` writes this file on the head


def node_types() -> list[dict[str, float]]:
    """Resources of one node of each type that the autoscaler of the joined cluster may start.

    They come from the autoscaler; if it reports none, from the cluster's description that `ray up` left on the head,
    if this process runs there. Empty if neither is known.
    """
    groups = autoscaler_groups()
    if groups is not None:
        return groups
    file = BOOTSTRAP.expanduser()
    if not _on_head() or not file.is_file():
        return []
    return types_in(yaml.safe_load(file.read_text()))


def types_in(cluster: Mapping[str, Any]) -> list[dict[str, float]]:
    """Resources of one node of each type in a cluster's description (as in `cluster.yaml`). Types without resources are
    left out: Ray has not filled them in, so they are unknown."""
    types = cluster.get("available_node_types") or {}
    return [
        {name: float(amount) for name, amount in of["resources"].items() if isinstance(amount, (int, float))}
        for of in types.values()
        if of.get("resources") and of.get("max_workers", cluster.get("max_workers", 0))
    ]


def _on_head() -> bool:
    return ray.get_runtime_context().gcs_address.rpartition(":")[0] == ray.util.get_node_ip_address()


def reported(address: str) -> Autoscaling:
    """What the autoscaler last reported to the head.

    Args:
        address: host:port of the head's GCS.

    Raises:
        ray.exceptions.RayError, RuntimeError: the head does not answer.
    """
    return autoscaling(address, REQUEST_TIMEOUT_S)


def known_reasons(session_folder: str) -> dict[str, str]:
    """The last reason for each type of node that could not be started, by type. Ray's autoscaler does not report it;
    only its log on the head has it, so elsewhere the result is empty.

    Args:
        session_folder: Ray's session folder on this machine.
    """
    log = Path(session_folder) / "logs" / "monitor.log"
    return reasons_in(_end_of(log)) if _on_head() and log.is_file() else {}


def failures(report: Autoscaling, reasons: Mapping[str, str]) -> list[str]:
    """What could not be started lately, one line each."""
    # The report's list of failed nodes is not used: it also has every node that was ended for being idle.
    return list(
        dict.fromkeys(
            f"nodes of type {kind} could not be started: "
            + (reasons.get(kind) or why or "its log on the head says why")[:MOST_TEXT]
            for kind, why in report.failed
        )
    )


def unserved(report: Autoscaling, unit: Resources | None = None) -> list[str]:
    """Requests that fit on no present node and on none that may be started, one line for each shape.

    Args:
        unit: if given, only requests for workers of these resources.
    """
    counted = Counter(
        tuple(tuple(sorted(bundle.items())) for bundle in group)
        for group in report.unserved
        if unit is None or all(bundle == dict(unit) for bundle in group)
    )
    return [
        f"it can start no node for {_shape(bundles)}, asked for {_times(count)}: no type of node has as much, or as "
        "many as it may start are there"
        for bundles, count in sorted(counted.items())
    ]


def _shape(bundles: Sequence[Sequence[tuple[str, float]]]) -> str:
    counts = Counter(", ".join(f"{amount:g} {name}" for name, amount in bundle) for bundle in bundles)
    return " and ".join(f"{count} x ({what})" if len(bundles) > 1 else what for what, count in sorted(counts.items()))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def reasons_in(log: str) -> dict[str, str]:
    """The last reason in an autoscaler's log for each type of node that could not be started, by type."""
    return {match["kind"]: match["why"].strip() for match in _FAILED.finditer(log)}


def _end_of(log: Path) -> str:
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        return file.read().decode(errors="replace")
