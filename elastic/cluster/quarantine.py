"""Which nodes take no further workers of a run: those on which one worker after another could not get ready, while
workers train elsewhere. Pure.

A failed worker is replaced after a pause that doubles (`membership.state.BACK_OFF_S`). Ray tends to grant the same free
node again, so that without this a node with a broken accelerator or a missing mount keeps a run small for ever, though
a healthy node, or one that the autoscaler could add, is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

MOST_FAILURES = 3  # in a row on one node


@dataclass(frozen=True)
class Quarantine:
    """What a run knows of the nodes on which its workers failed.

    Args:
        failures: by node, how many workers in a row could not get ready on it.
        nodes: those that take no further worker, for as long as the controller lives.
    """

    failures: Mapping[str, int] = field(default_factory=dict)
    nodes: frozenset[str] = frozenset()

    def after_failure(self, node: str, running: Iterable[str]) -> Quarantine:
        """A worker could not get ready on `node`, while others run on the nodes `running`. A node is closed only if
        workers run elsewhere: where all fail, the fault is not the node's."""
        count = self.failures.get(node, 0) + 1
        closed = {node} if node and count >= MOST_FAILURES and any(n and n != node for n in running) else set()
        return replace(self, failures={**self.failures, node: count}, nodes=self.nodes | closed)

    def after_success(self, node: str) -> Quarantine:
        """A worker of this node got ready."""
        return replace(self, failures={n: count for n, count in self.failures.items() if n != node})
