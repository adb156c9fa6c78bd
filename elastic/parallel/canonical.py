"""Canonical gradient reduction for replicated models: the same bits at every world size.

Each microbatch's gradients are a leaf. A rank sums the aligned blocks of its run; the blocks of all ranks are then
exchanged, bucket by bucket, and summed in tree order ([levels.py](levels.py)). All sums are element by element, so
neither the buckets nor the boundaries of slices reach the result.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from elastic.compat.torch import add_each_
from elastic.compat.torch_groups import all_gather_flat
from elastic.parallel.levels import Level, Transfer, exchange
from elastic.parallel.tree import TreeSum

T = TypeVar("T")
Tensors = list[torch.Tensor]
_PIECE = 16384
_TOGETHER = 1 << 24  # elements: 64 MiB of float32; a launch for so many costs less than moving them
UNDER_WAY = 2  # buckets whose exchange has begun and was not waited for: one travels while the next one is made


def add(left: Tensors, right: Tensors) -> Tensors:
    if left:
        add_each_(left, right)
    return left


@dataclass(frozen=True)
class Link:
    """A level of an exchange, and the group of its members; None is the default group."""

    level: Level
    group: dist.ProcessGroup | None


class CanonicalSum:
    """Sums lists of tensors, one list per microbatch, over all ranks in tree order.

    All ranks exchange the same buckets in the same order. Temporary memory is about three times that of a bucket, for
    each one under way.

    Args:
        links: the levels of the exchange in which this rank takes part.
        runs: the microbatches of each rank, as dealt; strided ones are not summed before the exchange.
        buckets: those of every leaf, or the most bytes of one.
    """

    def __init__(self, links: Sequence[Link], runs: list[range], buckets: Sequence[slice] | int):
        self._links, self._runs, self._buckets = links, runs, buckets
        self._sums: list[TreeSum[Tensors]] = [] if isinstance(buckets, int) else [TreeSum(add) for _ in buckets]
        self._under_way: deque[tuple[Exchange[torch.Tensor], list[torch.Size]]] = deque()
        self._begun = 0
        self._results: list[Tensors] = []

    def push(self, microbatch: int, leaf: Tensors, count: int = 1) -> None:
        """Add the leaf of the next microbatch of this rank, or the sum of an aligned block of `count` microbatches.

        Args:
            leaf: tensors of the same shapes and dtypes in every call. Their memory belongs to the sum from now on.
        """
        if isinstance(self._buckets, int):
            self._buckets = buckets_of(leaf, self._buckets)
            self._sums = [TreeSum(add) for _ in self._buckets]
        for total, bucket in zip(self._sums, self._buckets):
            total.push((microbatch, count), leaf[bucket])

    def push_last(self, microbatch: int, part: Tensors) -> None:
        """Add the next bucket of the leaf of this rank's last microbatch, and begin its exchange."""
        self._sums[self._begun].push((microbatch, 1), part)
        self._begin()

    def _begin(self) -> None:
        """Begin the exchange of the next bucket. If too many are under way then, wait for the oldest: a rank that is
        later than the others finds it done."""
        total = self._sums[self._begun]
        self._sums[self._begun] = TreeSum(add)  # so that the parts go when they have been sent
        self._begun += 1
        if len(self._runs) == 1:
            self._results.append(total.total())
            return
        parts = total.parts()
        steps = exchange([link.level for link in self._links], self._runs, parts)
        groups, uses = [link.group for link in self._links], [t for _, tensors in parts for t in tensors]
        self._under_way.append((Exchange(steps, groups, uses[0].device, uses), [t.shape for t in parts[0][1]]))
        if len(self._under_way) > UNDER_WAY:
            self._finish()

    def _finish(self) -> None:
        """Wait for the oldest exchange."""
        one, shapes = self._under_way.popleft()
        use_on_current_stream(flat := one.result())
        self._results.append(_split(flat, shapes))

    def reduce(self) -> Tensors:
        """Return the sum of all ranks' leaves; its bits are equal on every rank."""
        while self._begun < len(self._sums):
            self._begin()
        while self._under_way:
            self._finish()
        return [t for part in self._results for t in part]


class Exchange(Generic[T]):
    """An exchange, which begins when this is made. On CUDA it runs on a stream of its own.

    Args:
        steps: its transfers; returns what it brings.
        groups: of each level.
        uses: tensors that it reads.
    """

    def __init__(
        self,
        steps: Generator[Transfer, None, T],
        groups: Sequence[dist.ProcessGroup | None],
        device: torch.device,
        uses: Iterable[torch.Tensor],
    ):
        self._steps, self._groups, self._device = steps, groups, device
        self._transfer: Transfer | None = None  # which keeps its tensors
        self._work: dist.Work | None = None
        self._found: list[T] = []
        with _aside(self._device):
            for t in uses:
                use_on_current_stream(t)
            self._go_on()

    def _go_on(self) -> None:
        """Wait for the transfer under way, and begin the next one."""
        if self._work is not None:
            self._work.wait()
        try:
            self._transfer = next(self._steps)
        except StopIteration as end:
            self._transfer, self._work, self._found = None, None, [end.value]
        else:
            self._work = _start(self._transfer, self._groups[self._transfer.level])

    def result(self) -> T:
        """Wait for the exchange; its tensors are to be used with `use_on_current_stream`."""
        with _aside(self._device) as side:
            while not self._found:
                self._go_on()
        torch.get_device_module(self._device).current_stream(self._device).wait_stream(side)
        return self._found[0]


def _start(transfer: Transfer, group: dist.ProcessGroup | None) -> dist.Work:
    if transfer.output_sizes is None:
        return all_gather_flat(transfer.output, transfer.input, group=group, async_op=True)
    sizes = (transfer.output_sizes, transfer.input_sizes)
    return dist.all_to_all_single(transfer.output, transfer.input, *sizes, group=group, async_op=True)


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.get_device_module(device).Stream(device)


@contextmanager
def _aside(device: torch.device) -> Iterator[Any]:
    """Inside, work is enqueued on another stream, behind what the present one has."""
    module, side = torch.get_device_module(device), _side_stream(device)
    side.wait_stream(module.current_stream(device))
    with module.stream(side):
        yield side


def use_on_current_stream(tensor: torch.Tensor) -> None:
    """Keep memory that was allocated on another stream from being reused before the current one is done with it."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


def buckets_of(tensors: Tensors, limit: int) -> list[slice]:
    """Divide tensors into runs of one dtype: of together at most `limit` bytes, or of a single larger tensor."""
    found, start, size = [], 0, 0
    for i, t in enumerate(tensors):
        bytes_ = t.numel() * t.element_size()
        if i > start and (size + bytes_ > limit or t.dtype != tensors[start].dtype):
            found.append(slice(start, i))
            start, size = i, 0
        size += bytes_
    return [*found, slice(start, len(tensors))] if tensors else []


def _split(flat: torch.Tensor, shapes: Sequence[torch.Size]) -> Tensors:
    return [part.view(shape) for part, shape in zip(flat.split([shape.numel() for shape in shapes]), shapes)]


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
        for bucket in buckets_of([part for _, part in group], together * group[0][1].element_size()):
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
