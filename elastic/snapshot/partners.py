"""Where the second copy of a worker's part goes, and how much memory that takes on each node. Pure.

Every node with workers has a vault. Its workers keep their parts there, and a second copy in the vault of the node's
partner, which is in another failure domain. Where possible two nodes are each other's partners: then only few pairs of
nodes hold all copies of any part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

GENERATIONS = 2  # the newest complete snapshot, and the one that is being written


@dataclass(frozen=True, order=True)
class Vault:
    """A node's vault. `host` is the machine's address; several nodes may be on one host."""

    node: str
    host: str
    url: str


def domains(vaults: Sequence[Vault]) -> dict[str, str]:
    """The failure domain of each node: its host, or the node itself if all nodes are on one host."""
    several = len({v.host for v in vaults}) > 1
    return {v.node: v.host if several else v.node for v in vaults}


def needs_copies(holders: Sequence[Sequence[str]]) -> bool:
    """Whether losing one failure domain would lose a part of the state.

    Args:
        holders: for each part of the state, the failure domains of the workers that hold it.
    """
    return any(len(set(domains_of_part)) < 2 for domains_of_part in holders)


def partners(vaults: Sequence[Vault]) -> dict[str, Vault]:
    """The vault for each node's second copies; a node has none if there is no other failure domain.

    With several hosts, a partner is never on its owner's host. In the order by domain, nodes half the list apart are
    each other's partners; a node for which that fails gets the vault that is used by the fewest.

    Returns:
        partner by node; the same on every worker, whatever the order of `vaults`.
    """
    domain = domains(vaults)
    size = Counter(domain[v.node] for v in vaults)
    order = sorted(vaults, key=lambda v: (-size[domain[v.node]], domain[v.node], v.node))
    half, found = len(order) // 2, dict[str, Vault]()
    for one, other in zip(order[:half], order[half : 2 * half]):
        if domain[one.node] != domain[other.node]:
            found[one.node], found[other.node] = other, one
    uses = Counter(v.node for v in found.values())
    for vault in order:
        others = [v for v in order if domain[v.node] != domain[vault.node]]
        if vault.node not in found and others:
            found[vault.node] = least = min(others, key=lambda v: (uses[v.node], order.index(v)))
            uses[least.node] += 1
    return found


def memory(
    parts: Sequence[tuple[str, int]], partner: Mapping[str, Vault], copied: Set[str] = frozenset()
) -> dict[str, int]:
    """Bytes that snapshots take on each node: for each generation a copy of its own workers' parts, and of the parts of
    those nodes whose partner it is.

    Args:
        parts: (node, bytes) of each worker that has a part.
        copied: nodes whose vault cannot map its workers' memory, so that the workers keep a copy of their own to send.
    """
    found: Counter[str] = Counter()
    for node, size in parts:
        found[node] += (GENERATIONS + (node in copied)) * size
        if node in partner:
            found[partner[node].node] += GENERATIONS * size
    return dict(found)


def short_of_memory(need: Mapping[str, int], vaults: Sequence[Vault], available: Mapping[str, int]) -> str | None:
    """The first host on which snapshots do not fit, as a text for people. Nodes on one host share its memory.

    Args:
        need: bytes by node.
        available: bytes by host.
    """
    for host in sorted({v.host for v in vaults}):
        size = sum(need.get(v.node, 0) for v in vaults if v.host == host)
        if size > available[host]:
            left = _mib(available[host])
            return f"snapshots take {_mib(size)} MiB of host {host}, which has {left} MiB left for them"
    return None


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
