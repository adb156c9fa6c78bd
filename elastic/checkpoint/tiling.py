"""Boxes of a tensor: what they share, and whether they tile it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

#: How often one layout may be cut in another direction: replicas inside shards inside shards need few.
MAX_CUTS = 16


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


def common(a: Box, b: Box) -> Box | None:
    """The elements in both boxes, or None where there are none."""
    starts = [max(p, q) for p, q in zip(a.offsets, b.offsets, strict=True)]
    ends = [min(p + m, q + n) for p, m, q, n in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)]
    if any(e <= s for s, e in zip(starts, ends)):
        return None
    return Box(tuple(starts), tuple(e - s for s, e in zip(starts, ends)))


def runs(part: Box, whole: Box) -> Iterator[tuple[int, int]]:
    """The contiguous runs of `part` in the row-major elements of `whole`, which contains it: (first, count)."""
    dims = len(part.sizes)
    inner = dims  # from here on both have the same extent, so that rows follow each other without a gap
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


def tiles(boxes: list[Box], shape: tuple[int, ...]) -> bool:
    """Whether boxes inside a shape cover each of its elements exactly once.

    Looks for cuts through the whole layout, and for cuts through each part, at most MAX_CUTS deep: O(n log n) whatever
    the boxes. Layouts that cannot be cut that way (a pinwheel) are none that this project writes; they are refused.
    """
    full = [b for b in boxes if b.volume]
    if sum(b.volume for b in full) != math.prod(shape):
        return False
    return _apart(full, len(shape), MAX_CUTS)


def _apart(boxes: list[Box], dims: int, depth: int) -> bool:
    """Whether no two of the boxes share an element; no box is empty."""
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
    """The boxes in groups that lie behind each other in dimension d."""
    groups: list[list[Box]] = []
    reached = -1
    for box in sorted(boxes, key=lambda b: b.offsets[d]):
        if box.offsets[d] >= reached:
            groups.append([])
        groups[-1].append(box)
        reached = max(reached, box.offsets[d] + box.sizes[d])
    return groups
