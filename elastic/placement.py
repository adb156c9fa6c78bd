"""Which box of each tensor a worker, checkpoint or snapshot holds, and which elements two of them share.

A worker's box of a tensor follows from two things: the tensor's cut, which names the mesh axes that divide it, and the
worker's part, its index along each axis. A tensor that no axis divides is whole on every worker, as all are with ddp.
To make new boxes out of old ones (a load, a world of another size, a snapshot), `common` gives the elements that two
boxes share, and `copies` where those lie in memory, row-major. Pure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: How often a layout may be cut in another direction: replicas within shards within shards need few cuts.
MAX_CUTS = 16

#: The mesh axes that divide a tensor, each with the dimension that it divides, in order: each divides the boxes that
#: the axes before it left.
Cut = tuple[tuple[str, int], ...]

#: How a box is cut out of a tensor: (dimension, index, count), one after another, as `Box.chunk` cuts.
Pieces = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Box:
    """Elements `offsets[d]` to `offsets[d] + sizes[d]` in each dimension d."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def volume(self) -> int:
        return math.prod(self.sizes)

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Box:
        return Box((0,) * len(shape), tuple(shape))

    def is_in(self, shape: Sequence[int]) -> bool:
        """Whether this is a box of a tensor of this shape."""
        return len(self.offsets) == len(self.sizes) == len(shape) and all(
            offset >= 0 and size >= 0 and offset + size <= length
            for offset, size, length in zip(self.offsets, self.sizes, shape)
        )

    def chunk(self, dimension: int, index: int, count: int) -> Box:
        """One of `count` pieces along a dimension, as `torch.chunk` cuts them: the last ones may be shorter or
        empty."""
        size = self.sizes[dimension]
        length = -(-size // count)
        return self.rows(dimension, min(size, index * length), min(size, (index + 1) * length))

    def piece(self, index: int, count: int) -> Box:
        """One of `count` pieces along the first dimension that has several rows."""
        return self if count == 1 else self.chunk(self.divided, index, count)

    @property
    def divided(self) -> int:
        """The first dimension that has several rows; 0 if none has."""
        return next((d for d, size in enumerate(self.sizes) if size > 1), 0)

    def rows(self, dimension: int, begin: int, end: int) -> Box:
        """Rows `begin` to `end` along a dimension, counted from the beginning of the box."""
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets[dimension], sizes[dimension] = offsets[dimension] + begin, end - begin
        return Box(tuple(offsets), tuple(sizes))


@dataclass(frozen=True, order=True)
class Part:
    """Which part of the state a worker holds.

    Args:
        axes: (name, index, size) of each mesh axis that divides tensors, in mesh order; none has size 1. Without axes
            it is the whole state.
    """

    axes: tuple[tuple[str, int, int], ...] = ()

    @staticmethod
    def of(axes: Iterable[Sequence[Any]]) -> Part:
        """The part of a worker, given its index along all axes that divide tensors, or as parsed from JSON."""
        return Part(tuple((name, index, size) for name, index, size in axes if size > 1))

    @staticmethod
    def parse(key: str) -> Part:
        """The inverse of `key`.

        Raises:
            ValueError: the text names no part.
        """
        found = [word.split("-") for word in key.split(".") if key != "all"]
        part = Part.of((name, int(index), int(size)) for name, index, size in found)
        if part.key != key or not all(0 <= index < size for _, index, size in part.axes):
            raise ValueError(f"{key!r} names no part of a state")
        return part

    @property
    def key(self) -> str:
        """A short text without spaces that names the part."""
        return ".".join(f"{name}-{index}-{size}" for name, index, size in self.axes) or "all"

    def __str__(self) -> str:
        return " x ".join(f"{name} {index} of {size}" for name, index, size in self.axes) or "all"

    @property
    def siblings(self) -> tuple[Part, ...]:
        """All parts that together are the whole state, this one included."""
        ways = itertools.product(*(range(size) for *_, size in self.axes))
        return tuple(Part(tuple((n, i, s) for (n, _, s), i in zip(self.axes, way))) for way in ways)

    def pieces(self, cut: Cut) -> Pieces:
        """How the box of this part is cut out of a tensor."""
        place = {name: (index, size) for name, index, size in self.axes}
        return tuple((dimension, *place[axis]) for axis, dimension in cut if axis in place)

    def box(self, shape: Sequence[int], cut: Cut) -> Box:
        """The box of a tensor that this part holds."""
        return cut_box(shape, self.pieces(cut))

    def along(self, cut: Cut) -> Part:
        """Only the axes that divide a tensor: equal for all parts with the same box of it."""
        divides = {axis for axis, _ in cut}
        return Part(tuple(one for one in self.axes if one[0] in divides))

    def first(self, cut: Cut) -> Part:
        """The first part with the same box of a tensor as this one. The boxes of such first parts tile the tensor."""
        divides = {axis for axis, _ in cut}
        return Part(tuple((name, index if name in divides else 0, size) for name, index, size in self.axes))


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a state: its name, the name of its dtype, its whole shape, and how it is cut."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    cut: Cut = ()

    @staticmethod
    def of(raw: Sequence[Any]) -> TensorSpec:
        """The inverse of `to_json`."""
        name, dtype, shape, cut = raw
        return TensorSpec(name, dtype, tuple(shape), tuple((axis, dimension) for axis, dimension in cut))

    def to_json(self) -> list[Any]:
        return [self.name, self.dtype, list(self.shape), [list(one) for one in self.cut]]

    def box(self, part: Part) -> Box:
        """The box of it that a part holds."""
        return part.box(self.shape, self.cut)


def cut_box(shape: Sequence[int], pieces: Pieces) -> Box:
    """The box that these pieces cut out of a tensor."""
    box = Box.whole(tuple(shape))
    for dimension, index, count in pieces:
        box = box.chunk(dimension, index, count)
    return box


def pipelines(workers: int, least: int, most: int | None = None) -> tuple[int, int]:
    """How many pipelines some workers make, and of how many stages each: as many pipelines as can have `least` stages,
    then as many stages as the workers fill, up to `most`. Fewer workers than `least` make one pipeline of all."""
    count = max(1, workers // least)
    return count, min(workers // count, most or workers)


def narrowed(tensor: torch.Tensor, box: Box, within: Box) -> torch.Tensor:
    """A view of `tensor`, which holds the box `within`, on the box `box` inside it."""
    for d, (offset, size, base) in enumerate(zip(box.offsets, box.sizes, within.offsets, strict=True)):
        tensor = tensor.narrow(d, offset - base, size)
    return tensor


def common(a: Box, b: Box) -> Box | None:
    """The elements in both boxes, None if there are none."""
    starts = [max(p, q) for p, q in zip(a.offsets, b.offsets, strict=True)]
    ends = [min(p + m, q + n) for p, m, q, n in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)]
    if any(e <= s for s, e in zip(starts, ends)):
        return None
    return Box(tuple(starts), tuple(e - s for s, e in zip(starts, ends)))


def runs(part: Box, whole: Box) -> Iterator[tuple[int, int]]:
    """The contiguous runs of `part` in the row-major elements of `whole`, which contains it: (first, count)."""
    dims = len(part.sizes)
    inner = dims  # from this dimension on both have the same extent, so that rows follow each other without a gap
    while inner > 0 and part.sizes[inner - 1] == whole.sizes[inner - 1]:
        inner -= 1
    inner = max(inner - 1, 0)
    strides = [math.prod(whole.sizes[d + 1 :]) for d in range(dims)]
    start = sum((p - w) * s for p, w, s in zip(part.offsets, whole.offsets, strides, strict=True))
    count = math.prod(part.sizes[inner:])
    index = [0] * inner
    while True:
        yield start + sum(i * s for i, s in zip(index, strides)), count
        for d in reversed(range(inner)):
            index[d] += 1
            if index[d] < part.sizes[d]:
                break
            index[d] = 0
        else:
            return


def copies(source: Box, target: Box) -> Iterator[tuple[int, int, int]]:
    """The elements that two boxes share, as runs that are contiguous in both: (first in the source, first in the
    target, count)."""
    shared = common(source, target)
    if shared is None:
        return
    # Both lists of runs enumerate the same elements in the same order, cut at different places.
    ahead = runs(shared, target)
    at, left = 0, 0
    for begin, length in runs(shared, source):
        first, count = begin, length
        while count:
            if not left:
                at, left = next(ahead)
            step = min(count, left)
            yield first, at, step
            first, at, count, left = first + step, at + step, count - step, left - step


def tiles(boxes: list[Box], shape: tuple[int, ...]) -> bool:
    """Whether boxes inside a shape cover each of its elements exactly once.

    Looks for cuts through the whole layout, then for cuts through each side, at most MAX_CUTS deep: O(n log n) for any
    boxes. Layouts without such cuts (a pinwheel) are refused; this project never writes them.
    """
    full = [b for b in boxes if b.volume]
    if sum(b.volume for b in full) != math.prod(shape):
        return False
    return _apart(full, len(shape), MAX_CUTS)


def _apart(boxes: list[Box], dims: int, depth: int) -> bool:
    """Whether no two boxes share an element. No box may be empty."""
    if len(boxes) <= 1:
        return True
    if depth == 0:
        return False
    for d in range(dims):
        groups = _cut(boxes, d)
        if len(groups) > 1:
            return all(_apart(group, dims, depth - 1) for group in groups)
    return False


def _cut(boxes: list[Box], d: int) -> list[list[Box]]:
    """The boxes in groups that follow each other along dimension d without overlap."""
    groups: list[list[Box]] = []
    reached = -1
    for box in sorted(boxes, key=lambda b: b.offsets[d]):
        if box.offsets[d] >= reached:
            groups.append([])
        groups[-1].append(box)
        reached = max(reached, box.offsets[d] + box.sizes[d])
    return groups
