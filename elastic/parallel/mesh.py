"""The process groups of a layout: of a row (one copy of the model), of a column (the same shard), of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from elastic.parallel.canonical import Link
from elastic.parallel.layout import REPLICATE, SHARD, Layout
from elastic.parallel.levels import levels
from elastic.placement import Part


@dataclass(frozen=True)
class Mesh:
    """A worker's view of its world's mesh.

    Args:
        place: this worker's place in the layout; None for a spare, which has no groups.
        everyone: the group of all members of the mesh; None is the default group.
        links: how workers with whole models exchange gradients.
    """

    layout: Layout
    place: int | None
    devices: DeviceMesh | None = None
    everyone: dist.ProcessGroup | None = None
    links: tuple[Link, ...] = ()

    @property
    def replica(self) -> int:
        assert self.place is not None, "a spare has no place"
        return self.place // self.layout.shards

    @property
    def part(self) -> Part:
        """The part of the state that this worker holds."""
        assert self.place is not None, "a spare has no place"
        return self.layout.part(self.place)

    @property
    def rows(self) -> DeviceMesh:
        """The one-dimensional mesh of this worker's row."""
        assert self.devices is not None
        return self.devices[SHARD] if self.devices.ndim > 1 else self.devices

    @property
    def row_group(self) -> dist.ProcessGroup:
        return self.rows.get_group()

    @property
    def column_group(self) -> dist.ProcessGroup | None:
        """The group of all workers with this worker's shard; None if there is one copy only."""
        assert self.devices is not None
        return self.devices.get_group(REPLICATE) if self.devices.ndim > 1 else None


def make_whole(layout: Layout, rank: int, nodes: Sequence[str]) -> Mesh:
    """The mesh of workers with whole models, of which rank r is on `nodes[r]`. Connects the groups inside nodes and
    between them if the exchange of gradients has two levels. Every rank of the world calls this."""
    steps = levels(nodes, rank)
    if len(steps[0].members) == len(nodes):
        return Mesh(layout, rank, links=tuple(Link(step, None) for step in steps))
    # made by their members alone: with all ranks, N nodes of L workers would wait for each other N + L times
    groups = [dist.new_group(list(step.members), use_local_synchronization=True) for step in steps]
    return Mesh(layout, rank, links=tuple(map(Link, steps, groups)))


def make_mesh(layout: Layout, rank: int, device: torch.device) -> Mesh:
    """Connect the groups of a layout. Every rank of the world calls this, also spares."""
    place = layout.place_of(rank)
    ranks = torch.tensor(layout.ranks, dtype=torch.int64)
    if layout.replicas > 1:
        shape = ranks.view(layout.replicas, layout.shards)
        devices = DeviceMesh(device.type, shape, mesh_dim_names=(REPLICATE, SHARD))
    else:
        devices = DeviceMesh(device.type, ranks, mesh_dim_names=(SHARD,))
    everyone = dist.new_group(list(layout.ranks)) if layout.spares else None
    return Mesh(layout, place) if place is None else Mesh(layout, place, devices, everyone)
