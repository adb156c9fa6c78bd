"""Sums the gradients of stages over pipelines, and brings each worker the rows that it holds, in one exchange.

A stage has the sums of its pipeline's microbatches for all rows of its parameters, by blocks of the canonical tree.
Each worker needs its rows of all parameters, summed over pipelines. Where R workers hold the same rows, each sums an
R-th of them, and they gather these. Every stage sends each worker what that one sums. So a gradient travels once, and
then once to those that hold the same rows.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from elastic.parallel.levels import Parts, Transfer
from elastic.parallel.tree import Block, TreeSum


@dataclass(frozen=True)
class Grid:
    """The cells of a world with pipelines.

    Args:
        replicas: how many workers hold the same rows.
        shards: into how many parts the rows of a parameter are cut.
        stages: of a pipeline.
    """

    replicas: int
    shards: int
    stages: int

    @property
    def cells(self) -> int:
        return self.replicas * self.shards

    @property
    def pipelines(self) -> int:
        return self.cells // self.stages


@dataclass(frozen=True)
class Rows:
    """A parameter, and the elements of it that each shard holds, counted over the flat whole."""

    stage: int
    shards: tuple[range, ...]


class StageSums:
    """How some parameters' gradients are exchanged, as one worker sees it. Pure.

    Args:
        parameters: of all stages, stage after stage.
        cell: of this worker.
    """

    def __init__(self, parameters: Sequence[Rows], grid: Grid, cell: int):
        self._grid, self._cell = grid, cell
        stages = range(grid.stages)
        self._lengths = [
            [sum(len(one.shards[shard]) for one in parameters if one.stage == stage) for shard in range(grid.shards)]
            for stage in stages
        ]
        mine = [one for one in parameters if one.stage == cell % grid.stages]
        cells = range(grid.cells)
        #: What this worker sends to each: (number of the own stage's parameter, begin, end) of the flat whole.
        self._sends = [self._pieces(mine, other) for other in cells]
        self._going = [len(self._share(cell % grid.stages, other)) for other in cells]
        self._coming = [len(self._share(other % grid.stages, cell)) for other in cells]
        #: The elements of each parameter, in order, that this worker gets, by stage.
        shard = cell % grid.shards
        self.sizes = [[len(one.shards[shard]) for one in parameters if one.stage == stage] for stage in stages]

    def _share(self, stage: int, cell: int) -> range:
        """What a cell sums of the rows of a stage's parameters that it holds."""
        replica, shard = divmod(cell, self._grid.shards)
        lengths = [of[shard] for of in self._lengths]
        before, width = sum(lengths[:stage]), self._width(shard)
        begin = min(max(replica * width - before, 0), lengths[stage])
        return range(begin, max(begin, min((replica + 1) * width - before, lengths[stage])))

    def _width(self, shard: int) -> int:
        return -(-sum(of[shard] for of in self._lengths) // self._grid.replicas)

    def _pieces(self, mine: Sequence[Rows], cell: int) -> list[tuple[int, int, int]]:
        share, shard, found, at = self._share(self._cell % self._grid.stages, cell), cell % self._grid.shards, [], 0
        for i, one in enumerate(mine):
            held = one.shards[shard]
            part = held[max(share.start - at, 0) : max(share.stop - at, 0)]
            if part:
                found.append((i, part.start, part.stop))
            at += len(held)
        return found

    def exchange(
        self,
        parts: Parts,
        blocks: Sequence[Sequence[Block]],
        like: torch.Tensor,
    ) -> Generator[Transfer, None, list[torch.Tensor]]:
        """Each transfer has been carried out when the generator is resumed. Level 0 is that of all cells, level 1 that
        of those that hold the same rows.

        Args:
            parts: by block, sums of the own pipeline: the whole gradients of the own stage's parameters.
            blocks: of each pipeline.
            like: has the gradients' dtype and device.

        Returns:
            for each stage the sums of this worker's rows of its parameters, one behind the other; equal on all workers
            that hold them.
        """
        grid, own = self._grid, self._cell
        others = [cell for cell in range(grid.cells) if cell != own]
        flat = [[t.reshape(-1) for t in tensors] for _, tensors in parts]
        pieces = [of[i][a:b] for cell in (*others, own) for of in flat for i, a, b in self._sends[cell]]
        sent = torch.cat(pieces) if pieces else like.new_empty(0)
        going = [0 if cell == own else len(parts) * length for cell, length in enumerate(self._going)]
        del parts, flat, pieces  # whole gradients, which are not needed any more
        coming = [
            0 if cell == own else len(blocks[cell // grid.stages]) * length for cell, length in enumerate(self._coming)
        ]
        received, kept = like.new_empty(sum(coming)), sent[sum(going) :]
        if others:
            yield Transfer(0, received, sent[: sum(going)], coming, going)
        found: list[list[tuple[Block, torch.Tensor]]] = [[] for _ in range(grid.stages)]
        at = 0
        for cell, length in enumerate(self._coming):
            there = blocks[cell // grid.stages]
            of = kept if cell == own else received[at : at + coming[cell]]
            at += coming[cell]
            found[cell % grid.stages] += zip(there, of.view(len(there), length), strict=True)
        sums = [_sum_of(pairs) for pairs in found]
        if grid.replicas == 1:
            return sums
        width = self._width(own % grid.shards)
        mine, length = like.new_empty(width), sum(map(len, sums))
        torch.cat(sums, out=mine[:length])
        mine[length:].zero_()
        gathered = like.new_empty(grid.replicas * width)
        yield Transfer(1, gathered, mine)
        lengths = [of[own % grid.shards] for of in self._lengths]
        return list(gathered[: sum(lengths)].split(lengths))


def _sum_of(pairs: list[tuple[Block, torch.Tensor]]) -> torch.Tensor:
    total: TreeSum[torch.Tensor] = TreeSum(lambda a, b: a.add_(b))
    for block, piece in sorted(pairs, key=lambda pair: pair[0]):
        total.push(block, piece)
    return total.total()
