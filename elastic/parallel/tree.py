"""The order in which the leaves of a step (one for each microbatch) are summed, the same at every world size.

The tree over n leaves splits at the largest power of two below n, so every aligned block of `2**k` leaves is a node of
it. A rank sums the aligned blocks inside its own range of leaves. The blocks of all ranks are then summed in the same
tree, so the result has the same bits as if one process had summed all leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")
Block = tuple[int, int]  # (first leaf, number of leaves: a power of two that divides the first leaf)


def blocks(run: range) -> list[Block]:
    """Divide a contiguous range of leaves into the largest aligned blocks, in order."""
    found, start = [], run.start
    while start < run.stop:
        size = start & -start if start else 1 << (run.stop - 1).bit_length()
        while start + size > run.stop:
            size //= 2
        found.append((start, size))
        start += size
    return found


class TreeSum(Generic[T]):
    """Sums leaves or blocks that are given in order. It keeps at most one partial sum for each power of two.

    Args:
        add: returns left + right; it may reuse the memory of left.
    """

    def __init__(self, add: Callable[[T, T], T]):
        self._add = add
        self._stack: list[tuple[Block, T]] = []

    def push(self, block: Block, value: T) -> None:
        """Add the next block. Siblings in the tree are summed as soon as both have been pushed."""
        start, size = block
        while self._stack:
            (left, left_size), left_value = self._stack[-1]
            if left_size != size or left % (2 * size) or left + left_size != start:
                break
            self._stack.pop()
            value, start, size = self._add(left_value, value), left, 2 * size
        self._stack.append(((start, size), value))

    def parts(self) -> list[tuple[Block, T]]:
        """Return the partial sums, by block. After a contiguous range of leaves the blocks are exactly
        `blocks(range)`."""
        return list(self._stack)

    def map(self, function: Callable[[T], T]) -> TreeSum[T]:
        """Return a copy with the function applied to each partial sum."""
        found = TreeSum(self._add)
        found._stack = [(block, function(value)) for block, value in self._stack]
        return found

    def total(self) -> T:
        """Return the sum of everything that was pushed, which must be all leaves from 0 on."""
        assert self._stack, "nothing was pushed"
        assert self._stack[0][0][0] == 0, "a total starts at leaf 0"
        value = self._stack[-1][1]
        for _, left in reversed(self._stack[:-1]):
            value = self._add(left, value)
        return value


def tree_sum_of_rows(rows: np.ndarray) -> np.ndarray:
    """Sum the rows of an array [n, width], n at least 1, in the order of `TreeSum`, and so with the same bits. It needs
    one addition for each level of the tree instead of one for each row.

    Returns:
        an array [width] of the same dtype.
    """
    size = 1 << (len(rows) - 1).bit_length()
    if size > len(rows):
        return tree_sum_of_rows(rows[: size // 2]) + tree_sum_of_rows(rows[size // 2 :])
    while len(rows) > 1:
        rows = rows[0::2] + rows[1::2]
    return rows[0]
