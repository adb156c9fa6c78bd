"""Which workers of a world hold which part of the model: (nodes of the members, wish) -> mesh and spares. Pure.

    ddp    every worker a whole model                       W x 1
    fsdp   one model over all workers                       1 x W
    hsdp   one model over the workers of a node, one copy   R x S
           for each group of S, so that a lost node leaves
           whole copies

A mesh has `replicas` rows of `shards` workers. What does not fill a row stays outside as a hot spare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """The mesh of a world.

    Args:
        ranks: the world's ranks in the mesh, row after row; `ranks[replica * shards + shard]`.
        spares: ranks outside it, ascending.
    """

    replicas: int
    shards: int
    ranks: tuple[int, ...]
    spares: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Workers in the mesh."""
        return self.replicas * self.shards

    def place_of(self, rank: int) -> int | None:
        """A rank's place in the mesh, counted row after row; None for a spare."""
        return self.ranks.index(rank) if rank in self.ranks else None

    def row(self, place: int) -> tuple[int, ...]:
        """The ranks that together hold one copy of the model with `place`."""
        start = place // self.shards * self.shards
        return self.ranks[start : start + self.shards]


def lay_out(nodes: Sequence[str], strategy: str, per_node: int | None) -> Layout:
    """The mesh of a world whose rank r is on `nodes[r]`.

    hsdp takes groups of `per_node` from every node. Two copies or more are worth spares, since a lost node then costs
    nothing. With a single full group (or none) there would be one copy anyway: then all workers share it, so that none
    is idle and each holds less.

    Args:
        strategy: ddp, fsdp or hsdp.
        per_node: workers that hold one copy in hsdp.
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


def shard_range(length: int, shard: int, shards: int) -> range:
    """The rows of dimension 0 that a shard holds, as `torch.chunk` cuts them: the last ones shorter or empty."""
    each = -(-length // shards)
    return range(min(length, shard * each), min(length, (shard + 1) * each))


def lockstep(run: range, shard: int, shards: int) -> range:
    """Deal a row's run of microbatches in rounds: in round k shard s takes `run.start + k * shards + s`.

    So the leaves of a round are neighbours in the tree, and arrive in its order.
    """
    return range(run.start + shard, run.stop, shards)


@dataclass(frozen=True)
class Held:
    """What a worker brings into a new world: its state's step (-1: none) and which part of it."""

    step: int
    shard: int
    shards: int


def holders(held: Sequence[Held]) -> list[list[int]] | None:
    """Who holds each part of the newest state in memory: ranks for each shard, ascending.

    Returns:
        None where a part of it is held by nobody, or nobody holds any.
    """
    newest = max((h.step for h in held), default=-1)
    if newest < 0:
        return None
    for shards in sorted({h.shards for h in held if h.step == newest}):
        found: list[list[int]] = [[] for _ in range(shards)]
        for rank, h in enumerate(held):
            if h.step == newest and h.shards == shards:
                found[h.shard].append(rank)
        if all(found):
            return found
    return None


def sources(steps: Sequence[int]) -> list[int]:
    """Where each rank takes a whole state from: itself if that is the newest, else one of those that have it, in turn.

    Args:
        steps: of the state that each rank holds; -1: none.
    """
    having = [rank for rank, step in enumerate(steps) if step == max(steps)]
    takers = [rank for rank, step in enumerate(steps) if step != max(steps)]
    return [rank if rank in having else having[takers.index(rank) % len(having)] for rank in range(len(steps))]


def lost_shards(held: Sequence[Held]) -> str:
    """For people: which parts of the newest state nobody holds."""
    newest = max((h.step for h in held), default=-1)
    there = [h for h in held if h.step == newest]
    if newest < 0 or not there:
        return "nobody holds any state"
    shards = max(h.shards for h in there)
    missing = sorted(set(range(shards)) - {h.shard for h in there if h.shards == shards})
    return f"of the state of step {newest}, shard {', '.join(map(str, missing))} of {shards} was lost"


@dataclass(frozen=True)
class Move:
    """Rows `start` to `stop` of a tensor's dimension 0 that go from one rank to another (or stay)."""

    source: int
    target: int
    start: int
    stop: int


def moves(length: int, found: list[list[int]], targets: Sequence[tuple[int, int, int]]) -> list[Move]:
    """How to bring a sharded tensor of `length` rows into a new layout.

    Args:
        found: what `holders` returned.
        targets: (rank, shard, shards) of everyone in the new layout.

    Returns:
        moves by target, then by row; a rank that holds rows takes them from itself.
    """
    plan = []
    for rank, shard, shards in targets:
        wanted = shard_range(length, shard, shards)
        for old, ranks in enumerate(found):
            have = shard_range(length, old, len(found))
            start, stop = max(wanted.start, have.start), min(wanted.stop, have.stop)
            if start < stop:
                source = rank if rank in ranks else ranks[rank % len(ranks)]
                plan.append(Move(source, rank, start, stop))
    return plan
