"""What a worker group asks of Ray: how many workers, and the placement groups that they get."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from elastic.cluster.sharing import Terms
from elastic.membership.forming import helpful_size


@dataclass(frozen=True)
class GroupPlan:
    """What a worker group is to have, for the run hosted at `url`: workers of `unit` resources each.

    `max_workers` is that of the start, of `microbatches` in a step. `name` begins the names of its placement groups,
    and of vaults where the run has them. `terms` are those of sharing the cluster with other runs; `exclude` are nodes
    to keep out. `per_node` is the most workers on one node; with `packed`, so many are placed together. A vault that
    does not answer for `hang_timeout_s` is replaced.
    """

    url: str
    token: str = field(repr=False)
    max_workers: int
    spares: int
    microbatches: int | None
    unit: dict[str, float]
    name: str
    terms: Terms
    per_node: int | None = None
    exclude: tuple[str, ...] = ()
    packed: bool = False
    vaults: bool = False
    hang_timeout_s: float = 30.0

    def want(self, max_workers: int) -> int:
        """How many workers to have where a world has at most so many: all that help or are needed, and spares."""
        return helpful_size(self.microbatches, max_workers, self.terms.min_workers) + self.spares

    @property
    def group_size(self) -> int:
        """Workers of one placement group."""
        return self.per_node or 1 if self.packed else 1


class Placement:
    """A placement group: placement for one worker, or for those of one node, which come and go one by one."""

    def __init__(self, plan: GroupPlan, number: int, full_nodes: list[str]):
        size = plan.group_size
        elsewhere = [{"ray.io/node-id": f"!in({','.join(full_nodes)})"}] * size if full_nodes else None
        self.group = placement_group(
            [plan.unit] * size,
            strategy="STRICT_PACK" if size > 1 else "PACK",
            name=f"{plan.name}{number}",
            bundle_label_selector=elsewhere,
        )
        self.free = list(range(size))
        self.usable = True  # its node is not known to go away
        self._size = size

    def give_back(self, bundle: int, *, node_lost: bool) -> None:
        """A worker's place is free again. Placement that nobody is in goes back in the same turn: a dead node's group
        re-places itself otherwise."""
        self.free.append(bundle)
        self.usable = self.usable and not node_lost
        if len(self.free) == self._size:
            self.usable = False
            remove_placement_group(self.group)


def group_prefix(run: str) -> str:
    """Begins the names of a run's placement groups."""
    return f"elastic/{run}/"


def remove_groups(prefix: str) -> None:
    """Remove the placement groups with names that begin so, which a controller that died left behind."""
    groups = [g for g in ray.util.placement_group_table().values() if g["name"].startswith(prefix)]
    for group in groups:
        if group["state"] != "REMOVED":
            with contextlib.suppress(ValueError):  # it has just gone by itself
                remove_placement_group(ray.util.get_placement_group(group["name"]))
