"""Canonical gradient reduction for replicated models: the same bits at every world size.

The gradients of a microbatch are a leaf of a binary tree, and all sums follow that tree. A rank sums the aligned blocks
of its own microbatches. For every bucket of tensors the ranks exchange slices of their blocks (`all_to_all_single`),
each rank sums its slice over all blocks in tree order, and the sums are gathered. All sums are element by element, so
neither the size of buckets nor the boundaries of slices change the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist

from elastic.compat.torch import add_each_
from elastic.compat.torch_groups import all_gather_flat
from elastic.parallel.tree import Block, TreeSum, blocks

Tensors = list[torch.Tensor]
_PIECE = 16384
_TOGETHER = 1 << 24  # elements: 64 MiB of float32; a launch for so many costs less than moving them


def _add(left: Tensors, right: Tensors) -> Tensors:
    if left:
        add_each_(left, right)
    return left


class CanonicalSum:
    """Sums lists of tensors, one list per microbatch, over all ranks in tree order.

    Args:
        runs: the microbatches of each rank, as dealt. Those of a strided run are not summed before the exchange.
        rank: of this process, in `runs`.
        bucket_bytes: the size of a bucket; the exchange takes about three times this memory.
    """

    def __init__(self, runs: list[range], rank: int, group: dist.ProcessGroup | None, bucket_bytes: int):
        self._runs, self._rank, self._group, self._bucket_bytes = runs, rank, group, bucket_bytes
        self._sum: TreeSum[Tensors] = TreeSum(_add)

    def push(self, microbatch: int, leaf: Tensors, count: int = 1) -> None:
        """Add the leaf of the next microbatch of this rank, or the sum of an aligned block of `count` microbatches.

        Args:
            leaf: tensors of the same shapes and dtypes in every call. Their memory belongs to the sum from now on.
        """
        self._sum.push((microbatch, count), leaf)

    def reduce(self) -> Tensors:
        """Return the sum of all ranks' leaves; its bits are equal on every rank."""
        if len(self._runs) == 1:
            return self._sum.total()
        parts = [tensors for _, tensors in self._sum.parts()]
        result: Tensors = []
        for bucket in _buckets(parts[0], self._bucket_bytes):
            result.extend(self._exchange([part[bucket] for part in parts]))
            # the sums of this bucket are made: free its parts, so that memory does not grow by a whole model
            for part in parts:
                part[bucket] = [t.new_empty(0) for t in part[bucket]]
        return result

    def _exchange(self, parts: list[Tensors]) -> Tensors:
        """Sum one bucket over all ranks.

        Args:
            parts: the sums of this rank's blocks, in the order of its blocks; lists of tensors of one dtype.
        """
        world_size = len(self._runs)
        like = parts[0]
        length = sum(t.numel() for t in like)
        if not length:
            return list(like)
        width = -(-length // world_size)
        block_lists: list[list[Block]] = [blocks(run) if run.step == 1 else [(i, 1) for i in run] for run in self._runs]
        counts = [len(b) for b in block_lists]
        send = like[0].new_zeros(world_size, len(parts), width)
        for i, part in enumerate(parts):
            flat = torch.cat([t.reshape(-1) for t in part])
            if len(parts) == 1 and length == width * world_size:
                send = flat.view(world_size, 1, width)
            else:
                full = length // width
                send[:full, i] = flat[: full * width].view(full, width)
                if full < world_size:
                    send[full, i, : length - full * width] = flat[full * width :]
        received = like[0].new_empty(sum(counts) * width)
        dist.all_to_all_single(
            received,
            send.reshape(-1),
            [c * width for c in counts],
            [len(parts) * width] * world_size,
            group=self._group,
        )
        total: TreeSum[torch.Tensor] = TreeSum(lambda a, b: a.add_(b))
        pieces = zip((b for bs in block_lists for b in bs), received.view(-1, width))
        for block, piece in sorted(pieces, key=lambda found: found[0]):
            total.push(block, piece)
        gathered = like[0].new_empty(world_size * width)
        all_gather_flat(gathered, total.total().contiguous(), group=self._group)
        return _split(gathered, like)


def _buckets(tensors: Tensors, limit: int) -> Iterable[slice]:
    """Yield consecutive tensors of one dtype: together at most `limit` bytes, or a single larger tensor."""
    start, size = 0, 0
    for i, t in enumerate(tensors):
        bytes_ = t.numel() * t.element_size()
        if i > start and (size + bytes_ > limit or t.dtype != tensors[start].dtype):
            yield slice(start, i)
            start, size = i, 0
        size += bytes_
    if tensors:
        yield slice(start, len(tensors))


def _split(flat: torch.Tensor, like: Tensors) -> Tensors:
    out, offset = [], 0
    for t in like:
        out.append(flat[offset : offset + t.numel()].view(t.shape))
        offset += t.numel()
    return out


def canonical_norm(tensors: Tensors) -> torch.Tensor:
    """Return the global L2 norm, a float64 scalar, whose bits do not depend on how dim 0 is sharded.

    Squares are summed within each row of dim 0, which sharding leaves whole; then the row sums of all tensors are
    summed in float64.
    """
    return row_sums(tensors).sum().sqrt()


def row_sums(tensors: Tensors) -> torch.Tensor:
    """Return the sums of squares within each row of dim 0: float64 [rows of all tensors * `sums_per_row`], row after
    row and tensor after tensor.

    The sum of a row has the same bits whatever other rows are there. On a CPU torch's sum was measured to have that
    property. On CUDA it has not: its kernel depends on the number of rows and on their alignment (`set_block_dimension`
    and `split_across_warps` in ATen's Reduce.cuh), so there the halves of rows are added element by element.
    """
    rows = [_pieces(t) for t in tensors if t.numel()]
    flat = [piece for pieces in rows for piece in pieces]
    if not flat:
        return tensors[0].new_empty(0, dtype=torch.float64)
    sums = iter(sums_by_halves(flat, _TOGETHER) if flat[0].is_cuda else [(piece * piece).sum(1) for piece in flat])
    return torch.cat([torch.stack([next(sums) for _ in pieces], dim=1).reshape(-1).double() for pieces in rows])


def _pieces(tensor: torch.Tensor) -> Tensors:
    """Cut the rows of dim 0 into pieces [rows, _PIECE or less].

    A piece is shorter than torch's grain size (32,768): torch lets several threads sum parts of a longer row if it is
    the only one.
    """
    rows = tensor.shape[0] if tensor.dim() else 1
    # the square of a complex number is the sum of those of its two parts
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return list(values.reshape(rows, -1).split(_PIECE, dim=1))


def sums_by_halves(pieces: Tensors, together: int) -> Tensors:
    """Return the sums of squares of each row of each piece [rows, width], in float32 or wider.

    The second half of a row is added to its first half, until one element is left. Pieces of one width are summed
    together, in launches of `together` elements, which take that much memory once more.
    """
    sums: list[Tensors] = [[] for _ in pieces]
    groups: dict[tuple[int, torch.dtype], list[tuple[int, torch.Tensor]]] = {}
    for i, piece in enumerate(pieces):
        width = piece.shape[1]
        groups.setdefault((width, piece.dtype), []).extend((i, part) for part in piece.split(max(1, together // width)))
    for group in groups.values():
        for bucket in _buckets([part for _, part in group], together * group[0][1].element_size()):
            rows = torch.cat([part for _, part in group[bucket]])
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32)).square_()
            width = rows.shape[1]
            while width > 1:
                half = (width + 1) // 2
                rows[:, : width - half] += rows[:, half:width]
                width = half
            found = rows[:, 0].split([len(part) for _, part in group[bucket]])
            for (i, _), total in zip(group[bucket], found):
                sums[i].append(total)
    return [torch.cat(parts) for parts in sums]


def sums_per_row(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Return how many sums `row_sums` makes of each row of a tensor of this shape; 0 for rows without elements."""
    values = math.prod(shape[1:]) * (2 if dtype.is_complex else 1)
    return -(-values // _PIECE)
