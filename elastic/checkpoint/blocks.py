"""Checksums of blocks: xxh3_128 for blocks that one worker reads whole, and crc32 for blocks of which several workers
read pieces, because crc32 of a block can be computed from those of its pieces."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import xxhash

from elastic.checkpoint import format

_POLYNOMIAL = 0xEDB88320  # of crc32, reflected


def hash_blocks(data: memoryview | bytes) -> tuple[str, ...]:
    """Return xxh3_128, in hexadecimal, of each block of BLOCK_BYTES."""
    size = format.BLOCK_BYTES
    return tuple(xxhash.xxh3_128_hexdigest(data[i : i + size]) for i in range(0, max(len(data), 1), size))


def hash_pieces(pieces: Iterable[memoryview]) -> str:
    """Return xxh3_128, in hexadecimal, of a block whose bytes lie in several pieces."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def crc_blocks(data: memoryview | bytes) -> tuple[int, ...]:
    """Return crc32 of each block of BLOCK_BYTES."""
    size = format.BLOCK_BYTES
    return tuple(zlib.crc32(data[i : i + size]) for i in range(0, max(len(data), 1), size))


def combine_crcs(first: int, second: int, second_length: int) -> int:
    """Return crc32 of two adjacent pieces of data from their crc32s and the length of the second piece in bytes. This
    is the algorithm of zlib's crc32_combine: multiplication modulo the polynomial."""
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
    """Return x^(8 length) modulo the polynomial."""
    power, k = 1 << 31, 3
    while length:
        if length & 1:
            power = _times(_SQUARES[k], power)
        length, k = length >> 1, k + 1
    return power


@dataclass(frozen=True)
class Partial:
    """A piece of a block, `object[start:end]`, that one reader read.

    Args:
        object: the name of the object.
        block: where the block begins and ends in the object, in bytes.
        crc: the crc32 of the whole block according to the manifest.
        found: the crc32 of the bytes that were read.
    """

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
    """Return the blocks (object, start) whose pieces do not combine to the block's checksum.

    This includes blocks whose pieces differ between readers, overlap, or do not cover the block.
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
