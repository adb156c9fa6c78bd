"""Which workers of a world hold which part of the model: (nodes of the members, strategy) -> mesh and spares. Pure.

    ddp    a whole model on every worker                    W x 1
    fsdp   one model over all workers                       1 x W
    hsdp   one model over the workers of a node, one copy   R x S
           for each group of S, so that a lost node leaves
           whole copies

A mesh has `replicas` rows of `shards` workers. Workers that do not fill a row stay outside as hot spares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic.placement import Cut, Part

REPLICATE, SHARD = "replicate", "shard"
ROWS: Cut = ((SHARD, 0),)  # how every parameter is sharded


@dataclass(frozen=True)
class Layout:
    """The mesh of a world.

    Args:
        ranks: the world's ranks in the mesh, row after row; `ranks[replica * shards + shard]`.
        spares: ranks outside of the mesh, ascending.
    """

    replicas: int
    shards: int
    ranks: tuple[int, ...]
    spares: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """The number of workers in the mesh."""
        return self.replicas * self.shards

    def place_of(self, rank: int) -> int | None:
        """A rank's place in the mesh, counted row after row; None for a spare."""
        return self.ranks.index(rank) if rank in self.ranks else None

    def part(self, place: int) -> Part:
        """The part of the state that a place holds."""
        return Part.of([(SHARD, place % self.shards, self.shards)])

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


def lay_out(nodes: Sequence[str], strategy: str, per_node: int | None) -> Layout:
    """The mesh of a world whose rank r is on `nodes[r]`.

    hsdp takes groups of `per_node` workers from every node. With two copies or more it is worth having spares, since a
    lost node then costs nothing. With at most one full group there would be a single copy: then all workers share it,
    so that none is idle and each holds less.

    Args:
        strategy: ddp, fsdp or hsdp.
        per_node: the workers that hold one copy together in hsdp.
    """
    everyone = tuple(range(len(nodes)))
    if strategy == "ddp":
        return Layout(len(nodes), 1, everyone)
    if strategy == "hsdp":
        assert per_node is not None, "refused with the options"
        rows: list[tuple[int, ...]] = []
        for node in sorted(set(nodes), key=nodes.index):
            here = [rank for rank in everyone if nodes[rank] == node]
            rows += [tuple(here[i : i + per_node]) for i in range(0, len(here) - per_node + 1, per_node)]
        if len(rows) > 1:
            ranks = tuple(rank for row in rows for rank in row)
            return Layout(len(rows), per_node, ranks, tuple(rank for rank in everyone if rank not in ranks))
    return Layout(1, len(nodes), everyone)


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
