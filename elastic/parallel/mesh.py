"""The process groups of a layout: of a row (one copy of the model), of a column (the same part of it), of a cell, of
all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from elastic.compat.torch_groups import forget_meshes
from elastic.parallel.canonical import Link
from elastic.parallel.layout import REPLICATE, SHARD, TENSOR, Layout
from elastic.parallel.levels import levels
from elastic.placement import Cut, Part


@dataclass(frozen=True)
class Mesh:
    """A worker's view of its world's mesh.

    Args:
        place: this worker's place in the layout; None for a spare, which has no groups.
        everyone: the group of all members of the mesh; None is the default group.
        one_of_each_cell: the group of the workers that have this worker's place in their cells; None as above.
        links: how workers with whole models exchange gradients.
        pipeline_group: of the workers of this one's pipeline that have its place in their cells, by stage, if there
            are pipelines.
        stage_group: of the workers with this one's stage and place in their cells, by pipeline.
    """

    layout: Layout
    place: int | None
    devices: DeviceMesh | None = None
    everyone: dist.ProcessGroup | None = None
    one_of_each_cell: dist.ProcessGroup | None = None
    links: tuple[Link, ...] = ()
    pipeline_group: dist.ProcessGroup | None = None
    stage_group: dist.ProcessGroup | None = None

    def _named(self, *axes: str) -> DeviceMesh:
        """The mesh along some axes: of the workers that have this one's place along the others."""
        assert self.devices is not None
        names = {axis_of(name): name for name in self.devices.mesh_dim_names or ()}
        return self.devices[tuple(names[axis] for axis in axes)] if self.devices.ndim > len(axes) else self.devices

    @property
    def _place(self) -> int:
        assert self.place is not None, "a spare has no place"
        return self.place

    @property
    def cell(self) -> int:
        """The cell of this worker, counted row after row."""
        return self.layout.cell_of(self._place)

    @property
    def replica(self) -> int:
        return self.cell // self.layout.shards

    @property
    def pipeline(self) -> int:
        """The pipeline of this worker."""
        return self.cell // self.layout.stages

    @property
    def stage(self) -> int:
        """Its stage in the pipeline."""
        return self.cell % self.layout.stages

    @property
    def part(self) -> Part:
        """The part of the state that this worker holds."""
        return self.layout.part(self._place)

    @property
    def parts_of_row(self) -> list[Part]:
        """The parts of the workers of its row that have its place in their cells, itself included, by shard."""
        tensor = self.layout.tensor
        return [self.layout.part(cell * tensor + self._place % tensor) for cell in self.layout.row_of(self._place)]

    def copy_of(self, cut: Cut) -> tuple[int, int]:
        """(index, count) of this worker among those that hold the same box of tensors with this cut over shards.

        A tensor that is cut over shards, but not over a cell, is held by each worker of the cell.
        """
        replicas, tensor = self.layout.replicas, self.layout.tensor
        if TENSOR in dict(cut):
            return self.replica, replicas
        return self.replica * tensor + self._place % tensor, replicas * tensor

    @property
    def rows(self) -> DeviceMesh:
        """The one-dimensional mesh of this worker's row: workers with its place in their cells."""
        return self._named(SHARD)

    @property
    def copies(self) -> DeviceMesh:
        """The mesh over which FSDP2 itself shards, and sums over copies of the model if there are several."""
        return self._named(REPLICATE, SHARD) if self.layout.replicas > 1 else self.rows

    @property
    def row_group(self) -> dist.ProcessGroup:
        return self.rows.get_group()

    @property
    def column_group(self) -> dist.ProcessGroup | None:
        """The group of all workers with this worker's part; None if there is one copy only."""
        return self._named(REPLICATE).get_group() if self.layout.replicas > 1 else None

    @property
    def cells(self) -> DeviceMesh:
        """The one-dimensional mesh of this worker's cell, where a cell has several workers."""
        return self._named(TENSOR)


def axis_of(name: str) -> str:
    """The axis that a dimension of a world's mesh is named after."""
    return name.partition("@")[0]


def make_whole(layout: Layout, rank: int, nodes: Sequence[str]) -> Mesh:
    """The mesh of workers with whole models, of which rank r is on `nodes[r]`. Connects the groups inside nodes and
    between them if the exchange of gradients has two levels. Every rank of the world calls this."""
    steps = levels(nodes, rank)
    if len(steps[0].members) == len(nodes):
        return Mesh(layout, rank, links=tuple(Link(step, None) for step in steps))
    # made by their members alone: with all ranks, N nodes of L workers would wait for each other N + L times
    groups = [dist.new_group(list(step.members), use_local_synchronization=True) for step in steps]
    return Mesh(layout, rank, links=tuple(map(Link, steps, groups)))


def make_mesh(layout: Layout, rank: int, device: torch.device, world: str) -> Mesh:
    """Connect the groups of a layout. Every rank of the world calls this, also spares.

    Args:
        world: a name that no other world of this process has. It is part of the names of the mesh's dimensions: torch
            caches what it finds out about DTensors by their meshes, and takes a mesh of equal ranks and names for the
            same, although in another world this process has another place in it, and the groups are others.
    """
    forget_meshes()
    place = layout.place_of(rank)
    sizes = {REPLICATE: layout.replicas, SHARD: layout.shards, TENSOR: layout.tensor}
    axes = {f"{name}@{world}": size for name, size in sizes.items() if size > 1 or name == SHARD}
    ranks = torch.tensor(layout.ranks, dtype=torch.int64).view(*axes.values())
    devices = DeviceMesh(device.type, ranks, mesh_dim_names=tuple(axes))
    everyone = dist.new_group(list(layout.ranks)) if layout.spares else None
    alike = [everyone]
    if layout.tensor > 1:
        alike = [dist.new_group(list(layout.ranks[index :: layout.tensor])) for index in range(layout.tensor)]
    pipelines, columns = _pipelines(layout) if layout.stages else ({}, {})
    if place is None:
        return Mesh(layout, place)
    return Mesh(
        layout,
        place,
        devices,
        everyone,
        alike[place % layout.tensor],
        pipeline_group=pipelines.get(place),
        stage_group=columns.get(place),
    )


Groups = dict[int, dist.ProcessGroup]


def _pipelines(layout: Layout) -> tuple[Groups, Groups]:
    """Connect the workers of each pipeline that have one place in their cells, and those of each stage, by place."""
    stages, tensor = range(layout.stages), range(layout.tensor)
    lines = [
        [(pipeline * layout.stages + stage) * layout.tensor + index for stage in stages]
        for pipeline in range(layout.pipelines)
        for index in tensor
    ]
    columns = [
        [(pipeline * layout.stages + stage) * layout.tensor + index for pipeline in range(layout.pipelines)]
        for stage in stages
        for index in tensor
    ]
    return _connected(layout, lines), _connected(layout, columns)


def _connected(layout: Layout, groups: Sequence[Sequence[int]]) -> Groups:
    found: Groups = {}
    for places in groups:
        group = dist.new_group([layout.ranks[place] for place in places])
        found |= dict.fromkeys(places, group)
    return found
