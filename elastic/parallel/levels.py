"""How workers exchange the sums of their leaves: in one level, or first inside nodes and then between them. Pure.

A tensor is divided into slices, one for each owner. Every worker sends each owner its blocks of the owner's slice; the
owner sums what it has received in the canonical tree, and at the end the slices are gathered.

In two levels the owners of a node's slices do so again with their counterparts on the other nodes: the workers of a
node have neighbouring leaves, so that what an owner sends to other nodes are whole blocks of the tree. A worker has
(L - 1) + (N - 1) partners on N nodes of L workers, instead of N L - 1, and of what a node's workers hold it sends the
sum to other nodes. The sums have the same bits.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from elastic.parallel.tree import Block, TreeSum, blocks


@dataclass(frozen=True)
class Level:
    """One level of an exchange, as one of its members sees it.

    Args:
        members: the ranks that take part, in the order of their ranks in the level's group.
        holds: for each member, the ranks whose leaves it has the sums of when the level begins.
        owners: the first so many members own a slice each.
        mine: this worker's place among the members.
    """

    members: tuple[int, ...]
    holds: tuple[tuple[int, ...], ...]
    owners: int
    mine: int

    @property
    def owns(self) -> bool:
        """Whether this worker owns a slice."""
        return self.mine < self.owners

    def blocks(self, runs: Sequence[range]) -> list[list[Block]]:
        """The blocks of which each member has the sums, in order; `runs`: the leaves of each rank."""
        return [blocks_of([runs[rank] for rank in ranks]) for ranks in self.holds]


def blocks_of(runs: Sequence[range]) -> list[Block]:
    """The blocks of ranks with these leaves: of one rank, or of neighbours. Strided leaves are not summed before an
    exchange."""
    if any(run.step != 1 for run in runs):
        return [(leaf, 1) for run in runs for leaf in run]
    return blocks(range(runs[0].start, runs[-1].stop))


def one_level(size: int, rank: int) -> Level:
    """All of `size` workers exchange with all."""
    everyone = tuple(range(size))
    return Level(everyone, tuple((r,) for r in everyone), size, rank)


def levels(nodes: Sequence[str], rank: int) -> tuple[Level, ...]:
    """The levels in which `rank` takes part, if rank r is on `nodes[r]`.

    There are two where several nodes have several workers each, and no node has more than twice as many as another. As
    many workers of each node own slices as the smallest node has; others only give and take, inside their node.
    """
    found = {node: tuple(r for r, other in enumerate(nodes) if other == node) for node in dict.fromkeys(nodes)}
    groups = tuple(found.values())
    owners, most = min(map(len, groups)), max(map(len, groups))
    neighbours = all(group[-1] - group[0] < len(group) for group in groups)
    if len(groups) < 2 or owners < 2 or most > 2 * owners or not neighbours:
        return (one_level(len(nodes), rank),)
    own = found[nodes[rank]]
    inside = Level(own, tuple((r,) for r in own), owners, own.index(rank))
    if not inside.owns:
        return (inside,)
    return inside, Level(tuple(group[inside.mine] for group in groups), groups, len(groups), groups.index(own))


@dataclass(frozen=True)
class Transfer:
    """A collective of an exchange.

    Args:
        level: its number.
        output, input: flat tensors.
        output_sizes, input_sizes: elements from and to each member; None: the inputs of all members are gathered.
    """

    level: int
    output: torch.Tensor
    input: torch.Tensor
    output_sizes: list[int] | None = None
    input_sizes: list[int] | None = None


Parts = list[tuple[Block, list[torch.Tensor]]]


def exchange(
    steps: Sequence[Level], runs: Sequence[range], parts: Parts, number: int = 0
) -> Generator[Transfer, None, torch.Tensor]:
    """Sum the leaves of all ranks. Each transfer has been carried out when the generator is resumed.

    Args:
        steps: the levels of this worker that are left; `number` is that of the first.
        runs: the leaves of each rank.
        parts: by block, sums of this worker: tensors of one dtype and device.

    Returns:
        the sum, flat; equal on all ranks.
    """
    level, *rest = steps
    length = sum(t.numel() for t in parts[0][1])
    if not length:
        return parts[0][1][0].new_empty(0)
    width = -(-length // level.owners)
    held = level.blocks(runs)
    sent = [len(parts) * width if member < level.owners else 0 for member in range(len(level.members))]
    coming = [len(of) * width if level.owns else 0 for of in held]
    received = parts[0][1][0].new_empty(sum(coming))
    yield Transfer(number, received, _slices(parts, level.owners, width, length), coming, sent)
    if level.owns:
        total: TreeSum[torch.Tensor] = TreeSum(lambda a, b: a.add_(b))
        pieces = zip((block for of in held for block in of), received.view(-1, width))
        for block, piece in sorted(pieces, key=lambda found: found[0]):
            total.push(block, piece)
        if rest:
            own = yield from exchange(rest, runs, [(block, [t]) for block, t in total.parts()], number + 1)
        else:
            own = total.total()
    else:
        own = received.new_zeros(width)
    gathered = received.new_empty(len(level.members) * width)
    yield Transfer(number, gathered, own.contiguous())
    return gathered[:length]


def _slices(parts: Parts, owners: int, width: int, length: int) -> torch.Tensor:
    """What is sent: for each owner its slice of each part, filled up with zeros."""
    like = parts[0][1][0]
    slices = like.new_empty(owners, len(parts), width)
    for i, (_, tensors) in enumerate(parts):
        flat = slices.view(-1) if len(parts) == 1 else like.new_empty(owners * width)
        flat[length:].zero_()
        torch.cat([t.reshape(-1) for t in tensors], out=flat[:length])
        if len(parts) > 1:
            slices[:, i] = flat.view(owners, width)
    return slices.view(-1)
