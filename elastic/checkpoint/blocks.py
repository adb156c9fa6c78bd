"""Checksums of blocks: xxh3_128 of whole ones, and crc32, which can be put together from parts read by several."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import xxhash

from elastic.checkpoint import format

_POLYNOMIAL = 0xEDB88320  # crc32's, reflected


def hash_blocks(data: memoryview | bytes) -> tuple[str, ...]:
    """xxh3_128 of each block of BLOCK_BYTES."""
    size = format.BLOCK_BYTES
    return tuple(xxhash.xxh3_128_hexdigest(data[i : i + size]) for i in range(0, max(len(data), 1), size))


def hash_pieces(pieces: Iterable[memoryview]) -> str:
    """xxh3_128 of a block that lies in several places."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def crc_blocks(data: memoryview | bytes) -> tuple[int, ...]:
    """crc32 of each block of BLOCK_BYTES."""
    size = format.BLOCK_BYTES
    return tuple(zlib.crc32(data[i : i + size]) for i in range(0, max(len(data), 1), size))


def combine_crcs(first: int, second: int, second_length: int) -> int:
    """crc32 of two pieces of data from those of each; zlib's crc32_combine, by multiplication modulo the polynomial."""
    return _times(_power(second_length), first) ^ second


def _times(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _squares() -> list[int]:
    table = [1 << 30]  # x^1; the highest coefficient comes first
    for _ in range(63):
        table.append(_times(table[-1], table[-1]))
    return table


_SQUARES = _squares()


def _power(length: int) -> int:
    """x^(8 length) modulo the polynomial."""
    power, k = 1 << 31, 3
    while length:
        if length & 1:
            power = _times(_SQUARES[k], power)
        length, k = length >> 1, k + 1
    return power


@dataclass(frozen=True)
class Partial:
    """A piece of a block that one reader has, `object[start:end]`, and the crc32 of what it got."""

    object: str
    block: tuple[int, int]
    crc: int
    start: int
    end: int
    found: int

    def to_json(self) -> list[Any]:
        return [self.object, *self.block, self.crc, self.start, self.end, self.found]

    @staticmethod
    def from_json(raw: list[Any]) -> Partial:
        where, block_start, block_end, crc, start, end, found = raw
        return Partial(where, (block_start, block_end), crc, start, end, found)


def unproven(partials: Iterable[Partial]) -> set[tuple[str, int]]:
    """Blocks (object, start) whose pieces do not add up to the block's checksum.

    Also those that nobody can prove: pieces that differ between readers, overlap, or do not cover the block.
    """
    by_block: dict[tuple[str, int], list[Partial]] = {}
    for partial in partials:
        by_block.setdefault((partial.object, partial.block[0]), []).append(partial)
    return {key for key, pieces in by_block.items() if not _adds_up(pieces)}


def _adds_up(pieces: list[Partial]) -> bool:
    (begin, end), crc = pieces[0].block, pieces[0].crc
    found, at = 0, begin
    for start, stop, piece in sorted({(p.start, p.end, p.found) for p in pieces}):
        if start != at:
            return False
        found, at = combine_crcs(found, piece, stop - start), stop
    return at == end and found == crc
