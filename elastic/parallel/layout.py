"""Which workers of a world hold which part of the model: (nodes of the members, strategy) -> mesh and spares. Pure.

A cell is the smallest set of workers that together run a microbatch: one worker, or with tensor parallelism T workers
of one node. Cells are laid out by the strategy:

    ddp    a whole model in every cell                      C x 1
    fsdp   one model over all cells                         1 x C
    hsdp   one model over the cells of a node, one copy     R x S
           for each group of S, so that a lost node leaves
           whole copies

With pipelines, each runs microbatches as a whole, and its cells are stages of it. What a worker holds of the state is
laid out apart from that, row by row of each tensor: with ddp over the workers of each pipeline, with fsdp over all.

A mesh has `replicas` rows of `shards` cells of `tensor` workers. Workers that do not fill a cell, or cells that do not
fill a row, stay outside as hot spares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from elastic.placement import Cut, Part, pipelines

REPLICATE, SHARD, TENSOR = "replicate", "shard", "tensor"
ROWS: Cut = ((SHARD, 0),)  # how every parameter is sharded that is whole in each worker of a cell


@dataclass(frozen=True)
class Layout:
    """The mesh of a world.

    Args:
        ranks: the world's ranks in the mesh, cell after cell and row after row:
            `ranks[(replica * shards + shard) * tensor + index]`.
        spares: ranks outside of the mesh, ascending.
        tensor: workers of a cell.
        stages: cells of a pipeline, neighbours in the mesh; 0 without pipelines.
    """

    replicas: int
    shards: int
    ranks: tuple[int, ...]
    spares: tuple[int, ...] = ()
    tensor: int = 1
    stages: int = 0

    @property
    def cells(self) -> int:
        """The number of cells in the mesh."""
        return self.replicas * self.shards

    @property
    def size(self) -> int:
        """The number of workers in the mesh."""
        return self.cells * self.tensor

    def place_of(self, rank: int) -> int | None:
        """A rank's place in the mesh, counted cell after cell; None for a spare."""
        return self.ranks.index(rank) if rank in self.ranks else None

    def cell_of(self, place: int) -> int:
        """The cell of a place, counted row after row."""
        return place // self.tensor

    def row_of(self, place: int) -> range:
        """The cells of a place's row, which hold one copy of the model together."""
        first = self.cell_of(place) // self.shards * self.shards
        return range(first, first + self.shards)

    @property
    def pipelines(self) -> int:
        """The number of pipelines, if there are any."""
        return self.cells // self.stages

    def part(self, place: int) -> Part:
        """The part of the state that a place holds."""
        shard = (SHARD, self.cell_of(place) % self.shards, self.shards)
        return Part.of([shard, (TENSOR, place % self.tensor, self.tensor)])

    @property
    def copies(self) -> dict[Part, list[int]]:
        """The places that hold each part, ascending."""
        found: dict[Part, list[int]] = {}
        for place in range(self.size):
            found.setdefault(self.part(place), []).append(place)
        return found

    def is_first(self, place: int) -> bool:
        """Whether a place is the first of those that hold the same part."""
        return self.copies[self.part(place)][0] == place


def lay_out(
    nodes: Sequence[str],
    strategy: str,
    per_node: int | None,
    tensor: int = 1,
    stages: tuple[int, int] | None = None,
) -> Layout:
    """The mesh of a world whose rank r is on `nodes[r]`. There is at least one cell.

    hsdp takes groups of `per_node` workers from every node. With two copies or more it is worth having spares, since a
    lost node then costs nothing. With at most one full group there would be a single copy: then all cells share it,
    so that none is idle and each holds less.

    Args:
        strategy: ddp, fsdp or hsdp.
        per_node: the workers that hold one copy together in hsdp.
        tensor: workers of a cell.
        stages: the fewest of a pipeline that are wished for, and the most that there can be; None without pipelines.
    """
    cells = fill_cells(nodes, tensor)
    if stages is not None and cells:
        count, each = pipelines(len(cells), *stages)
        length = count * each if strategy == "fsdp" else each
        rows = [tuple(cells[first : first + length]) for first in range(0, count * each, length)]
        return replace(_meshed(nodes, rows), stages=each)
    assert cells, "no world is formed without a cell"
    if strategy == "ddp":
        return _meshed(nodes, [(cell,) for cell in cells])
    if strategy == "hsdp":
        assert per_node is not None, "refused with the options"
        together = per_node // tensor
        rows = []
        for node in sorted(set(nodes), key=nodes.index):
            here = [cell for cell in cells if nodes[cell[0]] == node]
            rows += [tuple(here[i : i + together]) for i in range(0, len(here) - together + 1, together)]
        if len(rows) > 1:
            return _meshed(nodes, rows)
    return _meshed(nodes, [tuple(cells)])


def fill_cells(nodes: Sequence[str], tensor: int) -> list[tuple[int, ...]]:
    """The ranks of each cell: `tensor` neighbours on one node, since they talk to each other in every layer."""
    if tensor == 1:
        return [(rank,) for rank in range(len(nodes))]
    found = []
    for node in sorted(set(nodes), key=nodes.index):
        here = [rank for rank, other in enumerate(nodes) if other == node]
        found += [tuple(here[i : i + tensor]) for i in range(0, len(here) - tensor + 1, tensor)]
    return found


def _meshed(nodes: Sequence[str], rows: Sequence[tuple[tuple[int, ...], ...]]) -> Layout:
    """The mesh with these rows of cells; all other ranks are spares."""
    ranks = tuple(rank for row in rows for cell in row for rank in cell)
    inside = frozenset(ranks)
    spares = tuple(rank for rank in range(len(nodes)) if rank not in inside)
    return Layout(len(rows), len(rows[0]), ranks, spares, len(rows[0][0]))


def lockstep(run: range, shard: int, shards: int) -> range:
    """Deal a row's microbatches in rounds: in round k, shard s takes `run.start + k * shards + s`.

    So the leaves of a round are neighbours in the tree, and arrive in its order.
    """
    return range(run.start + shard, run.stop, shards)


@dataclass(frozen=True)
class Held:
    """What a worker brings into a new world: the step of its state (-1: none), and which part of the state."""

    step: int
    part: Part


def holders(held: Sequence[Held]) -> dict[Part, list[int]] | None:
    """The ranks that hold each part of the newest state in memory, ascending.

    Returns:
        None if a part is held by no rank, or no rank holds any state.
    """
    newest = max((h.step for h in held), default=-1)
    newest_held = [(rank, h.part) for rank, h in enumerate(held) if h.step == newest >= 0]
    for parts in sorted({part.siblings for _, part in newest_held}, key=len):
        found = {part: [rank for rank, own in newest_held if own == part] for part in parts}
        if all(found.values()):
            return found
    return None


def lost_parts(held: Sequence[Held]) -> str:
    """The parts of the newest state that no rank holds, as a text for people; empty if no rank holds any state."""
    newest = max((h.step for h in held), default=-1)
    present = {h.part for h in held if h.step == newest >= 0}
    if not present:
        return ""
    missing = [part for part in max((part.siblings for part in present), key=len) if part not in present]
    return f"of the state of step {newest}, {', '.join(map(str, missing))} was lost"


@dataclass(frozen=True)
class Move:
    """One rank sends another the elements of a tensor that its old part shares with the other's new part."""

    source: int
    target: int
    old: Part
    new: Part


def moves(found: Mapping[Part, Sequence[int]], wants: Mapping[int, Part], cut: Cut) -> list[Move]:
    """How tensors with this cut get from the ranks that hold them to those that need them.

    Args:
        found: the ranks that hold each part of the state.
        wants: the part that each rank needs.

    Returns:
        moves whose boxes tile the new box of each rank; some share no element. A rank takes what it holds from itself,
        and everything else from the other holders in turn.
    """
    givers: dict[Part, list[int]] = {}
    for part, ranks in found.items():
        givers.setdefault(part.first(cut), []).extend(ranks)
    plan = []
    for old, ranks in givers.items():
        lacking = [rank for rank in wants if rank not in ranks]
        turn = {rank: ranks[i % len(ranks)] for i, rank in enumerate(lacking)}
        plan += [Move(turn.get(rank, rank), rank, old, new) for rank, new in wants.items()]
    return plan
