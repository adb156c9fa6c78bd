"""What a cluster can hold, and what to ask of it. Pure functions over what Ray says of its nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elastic.errors import ConfigError

Resources = Mapping[str, float]


def worker_resources(accelerator: str, cpus: int) -> dict[str, float]:
    """What one worker asks of Ray: one GPU and its CPU slots, or CPU slots."""
    return {"GPU": 1.0, "CPU": float(cpus)} if accelerator == "gpu" else {"CPU": float(cpus)}


def choose_accelerator(wish: str, nodes: Sequence[Resources]) -> str:
    """`gpu` or `cpu`; auto takes GPUs where any node has one, of those that are there or that the cluster can start."""
    if wish != "auto":
        return wish
    return "gpu" if any(n.get("GPU", 0) >= 1 for n in nodes) else "cpu"


def check_fits(
    wish: str, accelerator: str, workers_per_node: int | None, cpus: int, nodes: Sequence[Resources]
) -> None:
    """Refuse what no node could ever hold. GPUs that are asked for are believed in, also where none is known of.

    Args:
        wish: --scaling.accelerator as it was given; `accelerator` is what was chosen.
        nodes: those that are there and, one of each type, those that the cluster can start.

    Raises:
        ConfigError: more GPUs or CPUs on one node than any node has, or nothing says what kind of node will come.
    """
    unit, having = worker_resources(accelerator, cpus), _having(accelerator, nodes)
    if not having:
        if wish == "auto":
            raise ConfigError(
                "--scaling.accelerator is 'auto', but the cluster has no node for workers yet, and does not say which "
                "it can start; give gpu or cpu, and the first such node is waited for"
            )
        return
    for name, amount in unit.items():
        most = max(n.get(name, 0) for n in having)
        if most < amount:
            raise ConfigError(
                f"--scaling.cpus-per-worker asks for {amount:g} {name} for one worker, but no node has more than "
                f"{most:g}; ask for less"
            )
    if workers_per_node is not None:
        most = max(int(min(n.get(name, 0) // amount for name, amount in unit.items())) for n in having)
        if workers_per_node > most:
            raise ConfigError(
                f"--scaling.workers-per-node is {workers_per_node}, but no node has room for more than {most} "
                f"({', '.join(f'{a:g} {n}' for n, a in unit.items())} each); give at most {most}"
            )


def _having(accelerator: str, nodes: Sequence[Resources]) -> list[Resources]:
    return [n for n in nodes if n.get(accelerator.upper(), 0) >= 1]


def awaited(accelerator: str, there: Sequence[Resources]) -> str:
    """What a run has to wait for, as no node that is there has any of it; empty where one has."""
    return "" if _having(accelerator, there) else f"the cluster's first node with a {accelerator.upper()}"


def fits(unit: Resources, free: Resources) -> bool:
    """Whether one worker fits into what is free."""
    return all(free.get(name, 0) >= amount for name, amount in unit.items())


def full_nodes(placed: Sequence[str], per_node: int | None) -> list[str]:
    """Nodes that have as many workers as they may, given the node of every worker; none where there is no limit."""
    return sorted({n for n in placed if placed.count(n) >= per_node}) if per_node else []


def may_share(there: int, more: int, per_node: int | None) -> bool:
    """Whether a node with so many workers may have so many more."""
    return per_node is None or there + more <= per_node


def excluded_nodes(names: Sequence[str], nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ids of the nodes, as `ray.nodes()` lists them, that are named: by host name, address, or the id's beginning."""

    def named(node: Mapping[str, Any]) -> bool:
        known = (node["NodeManagerHostname"], node["NodeManagerAddress"])
        return any(name in known or node["NodeID"].startswith(name) for name in names)

    return sorted(n["NodeID"] for n in nodes if n["Alive"] and named(n))


def visible_devices(assigned: str, node_total: int) -> tuple[str, int]:
    """(CUDA_VISIBLE_DEVICES, index in it) for a worker to which Ray assigned one GPU of its node.

    Every worker sees all GPUs of its node, however late it came, so that neighbours can exchange data directly. Where
    the assigned id is none of 0..total-1 (the node itself sees only some), a worker sees just its own.
    """
    everyone = [str(i) for i in range(node_total)]
    if assigned in everyone:
        return ",".join(everyone), everyone.index(assigned)
    return assigned, 0
