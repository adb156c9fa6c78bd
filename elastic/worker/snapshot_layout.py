"""The bytes of a worker's part of a snapshot: what lies where, and what of old parts makes a new one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elastic.checkpoint.format import ITEM_BYTES
from elastic.parallel.layout import shard_range

ALIGNMENT = 64


@dataclass(frozen=True)
class Head:
    """A tensor of the state: its whole shape, and whether it is cut along dimension 0. What is not, is one row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    cut: bool

    @staticmethod
    def of(values: Sequence[Any]) -> Head:
        """From what `TrainState.heads` gives."""
        name, dtype, shape, cut = values
        return Head(name, dtype, tuple(shape), cut)

    @property
    def row_bytes(self) -> int:
        count = ITEM_BYTES[self.dtype]
        for n in self.shape[1:] if self.cut else self.shape:
            count *= n
        return count

    def rows(self, shard: int, shards: int) -> range:
        """The rows that a shard has. What is not cut is in the first part alone."""
        if self.cut:
            return shard_range(self.shape[0], shard, shards)
        return range(int(shard == 0))


def starts(heads: Sequence[Head], shard: int, shards: int) -> list[int]:
    """Where each tensor's rows begin in a part, in bytes; and at the end, the part's size."""
    found, at = [], 0
    for head in heads:
        found.append(at)
        at += len(head.rows(shard, shards)) * head.row_bytes
        at += -at % ALIGNMENT
    return [*found, at]


@dataclass(frozen=True)
class Piece:
    """Bytes of an old part, from `start` on, which are those of a new tensor from `target` on."""

    tensor: int
    start: int
    target: int
    length: int


def pieces(heads: Sequence[Head], shards: int, shard: int, new_shards: int) -> list[list[Piece]]:
    """What of each of `shards` old parts makes shard `shard` of `new_shards`; everyone takes what is not cut."""
    found: list[list[Piece]] = []
    for old in range(shards):
        found.append([])
        for i, (head, start) in enumerate(zip(heads, starts(heads, old, shards), strict=False)):
            have = head.rows(old, shards)
            wanted = head.rows(shard, new_shards) if head.cut else range(1)
            first, last = max(have.start, wanted.start), min(have.stop, wanted.stop)
            length = (last - first) * head.row_bytes
            if length > 0:
                at = start + (first - have.start) * head.row_bytes
                found[old].append(Piece(i, at, (first - wanted.start) * head.row_bytes, length))
    return found
