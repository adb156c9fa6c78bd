"""What a worker group requests from Ray: how many workers, and their placement groups."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from elastic.cluster.forks import Forks
from elastic.cluster.sharing import Terms
from elastic.membership.forming import helpful_size


@dataclass(frozen=True)
class GroupPlan:
    """The workers that the run hosted at `url` is to have.

    Args:
        max_workers: the most in a world when the run starts.
        spares: workers to have in addition.
        microbatches: V, the microbatches of a step.
        unit: resources of one worker.
        name: prefix of the names of its placement groups and vaults.
        terms: how it shares the cluster with other runs.
        per_node: the most workers on one node; None for no limit.
        exclude: nodes to keep out.
        packed: `per_node` workers are placed together on one node.
        cell_size: workers that run a microbatch together, and are placed together.
        stages: the fewest cells of a pipeline; 1 without pipelines.
        vaults: the run has vaults.
        hang_timeout_s: seconds after which a vault or controller that does not answer is replaced.
        forks: how workers are forks on a standing cluster.
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
    cell_size: int = 1
    stages: int = 1
    vaults: bool = False
    hang_timeout_s: float = 30.0
    forks: Forks | None = None

    def want(self, max_workers: int) -> int:
        """How many workers to have if a world has at most `max_workers`: those that help or are needed, and spares."""
        least, size = self.terms.min_workers, self.cell_size
        return helpful_size(self.microbatches, max_workers, least, size, self.stages) + self.spares

    @property
    def group_size(self) -> int:
        """The number of workers in one placement group."""
        return self.per_node or 1 if self.packed else self.cell_size


class Placement:
    """A placement group: it has bundles for one worker, or for all workers of one node, which come and go one by
    one."""

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
        self.usable = True  # False once its node is known to go away
        self._size = size

    def give_back(self, bundle: int, *, node_lost: bool) -> None:
        """A worker's bundle is free again. A group without workers is removed in the same turn: otherwise Ray places
        the group of a dead node again, on another node."""
        self.free.append(bundle)
        self.usable = self.usable and not node_lost
        if len(self.free) == self._size:
            self.usable = False
            remove_placement_group(self.group)


def group_prefix(run: str) -> str:
    """The prefix of the names of a run's placement groups."""
    return f"elastic/{run}/"


def remove_groups(prefix: str) -> None:
    """Remove the placement groups whose names begin with `prefix`: a controller that died left them behind."""
    groups = [g for g in ray.util.placement_group_table().values() if g["name"].startswith(prefix)]
    for group in groups:
        if group["state"] != "REMOVED":
            with contextlib.suppress(ValueError):  # Ray has just removed it
                remove_placement_group(ray.util.get_placement_group(group["name"]))
