"""What a cluster can hold, and what to request from it. Pure functions of Ray's node tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elastic.errors import ConfigError

Resources = Mapping[str, float]


def worker_resources(accelerator: str, cpus: int) -> dict[str, float]:
    """The resources that one worker requests from Ray: one GPU and its CPU slots, or CPU slots only."""
    return {"GPU": 1.0, "CPU": float(cpus)} if accelerator == "gpu" else {"CPU": float(cpus)}


def choose_accelerator(wish: str, nodes: Sequence[Resources]) -> str:
    """`gpu` or `cpu`. With `auto`, gpu if any node has one: a present node, or one that the cluster can start."""
    if wish != "auto":
        return wish
    return "gpu" if any(n.get("GPU", 0) >= 1 for n in nodes) else "cpu"


def check_fits(
    wish: str,
    accelerator: str,
    workers_per_node: int | None,
    cpus: int,
    nodes: Sequence[Resources],
    cell_size: int = 1,
) -> None:
    """Refuse requests that no node could ever hold. A wish for GPUs is accepted if no node with GPUs is known yet.

    Args:
        wish: --scaling.accelerator as given; `accelerator` is the choice made from it.
        nodes: the present nodes, and one of each type that the cluster can start.
        cell_size: workers that run a microbatch together, on one node.

    Raises:
        ConfigError: a node would need more GPUs or CPUs than any has, or the kind of the first node is unknown.
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
    most = max(int(min(n.get(name, 0) // amount for name, amount in unit.items())) for n in having)
    for option, number in (("--scaling.workers-per-node", workers_per_node), ("--parallel.tensor", cell_size)):
        if number is not None and number > most:
            raise ConfigError(
                f"{option} is {number}, but no node has room for more than {most} "
                f"({', '.join(f'{a:g} {n}' for n, a in unit.items())} each); give at most {most}"
            )


def _having(accelerator: str, nodes: Sequence[Resources]) -> list[Resources]:
    return [n for n in nodes if n.get(accelerator.upper(), 0) >= 1]


def awaited(accelerator: str, present: Sequence[Resources]) -> str:
    """What a run has to wait for, if no present node has the accelerator; else empty."""
    return "" if _having(accelerator, present) else f"the cluster's first node with a {accelerator.upper()}"


def fits(unit: Resources, free: Resources) -> bool:
    """Whether one worker fits into the free resources."""
    return all(free.get(name, 0) >= amount for name, amount in unit.items())


def full_nodes(placed: Sequence[str], per_node: int | None) -> list[str]:
    """Nodes that have as many workers as allowed, given the node of every worker; none if there is no limit."""
    return sorted({n for n in placed if placed.count(n) >= per_node}) if per_node else []


def may_share(present: int, more: int, per_node: int | None) -> bool:
    """Whether a node with `present` workers may have `more` in addition."""
    return per_node is None or present + more <= per_node


def excluded_nodes(names: Sequence[str], nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Ids of the nodes in `ray.nodes()` that `names` gives by host name, by address or by the beginning of their id."""

    def named(node: Mapping[str, Any]) -> bool:
        known = (node["NodeManagerHostname"], node["NodeManagerAddress"])
        return any(name in known or node["NodeID"].startswith(name) for name in names)

    return sorted(n["NodeID"] for n in nodes if n["Alive"] and named(n))


def visible_devices(assigned: str, node_total: int) -> tuple[str, int]:
    """(CUDA_VISIBLE_DEVICES, index in it) for a worker to which Ray assigned one GPU of its node.

    Every worker sees all GPUs of its node, however late it came, so that neighbours can exchange data directly. If the
    assigned id is none of 0..total-1 (the node itself sees only some GPUs), the worker sees only its own.
    """
    everyone = [str(i) for i in range(node_total)]
    if assigned in everyone:
        return ",".join(everyone), everyone.index(assigned)
    return assigned, 0
