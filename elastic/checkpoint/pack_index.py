"""The index of a pack: where in it each tensor lies, and the checksums of its blocks. A file beside the pack, which
only those read that read the pack.

    rank-0003.index    {"format": 1, "tensors": [...], "starts": [...], "ends": [...], "packs": [...], ...}

Its lists have an entry for each chunk. `tensors` counts the tensors of the pack's stretches, one stretch after the
other. `packs` is 0 for the pack itself, else a number in `elsewhere`, from 1. `hashes` and `crcs` are hexadecimal
digits, block after block.
"""

from __future__ import annotations

import itertools
import json
import threading
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xxhash

from elastic.checkpoint.families import index_name
from elastic.checkpoint.fields import integer, ints, items, members, text
from elastic.checkpoint.format import ELSEWHERE, XXH3, Chunk, block_count
from elastic.checkpoint.patience import patiently
from elastic.errors import CheckpointError
from elastic.placement import Box
from elastic.storage import Storage

FORMAT = 1
_XXH3_DIGITS, _CRC_DIGITS = 32, 8


@dataclass(frozen=True)
class Place:
    """Where the bytes of a chunk lie: `pack[start:end]`, and the checksums of its blocks."""

    pack: str
    start: int
    end: int
    hashes: tuple[str, ...]
    crcs: tuple[int, ...]


@dataclass(frozen=True)
class PackIndex:
    """The contents of an index, in few objects, since a reader of all packs of a checkpoint holds all its indexes."""

    pack: str
    tensors: array[int]
    starts: array[int]
    ends: array[int]
    packs: array[int]
    elsewhere: tuple[str, ...]
    hashes: str
    crcs: str

    @staticmethod
    def of(pack: str, places: Mapping[int, Place]) -> PackIndex:
        """From the place of each tensor that has one, by its number."""
        order = sorted(places.items())
        elsewhere = tuple(sorted({p.pack for _, p in order} - {pack}))
        number = {pack: 0, **{name: i for i, name in enumerate(elsewhere, start=1)}}
        return PackIndex(
            pack,
            array("q", (n for n, _ in order)),
            array("q", (p.start for _, p in order)),
            array("q", (p.end for _, p in order)),
            array("q", (number[p.pack] for _, p in order)),
            elsewhere,
            "".join(h for _, p in order for h in p.hashes),
            "".join(f"{c:08x}" for _, p in order for c in p.crcs),
        )

    def to_json(self) -> bytes:
        columns = {name: list(getattr(self, name)) for name in ("tensors", "starts", "ends", "packs", "elsewhere")}
        whole = {"format": FORMAT, **columns, "hashes": self.hashes, "crcs": self.crcs}
        return json.dumps(whole, separators=(",", ":")).encode()

    @staticmethod
    def parse(data: bytes, pack: str) -> PackIndex:
        """
        Raises:
            CheckpointError: columns that do not fit each other, or chunks that lie in the same bytes.
            ValueError, KeyError, TypeError, OverflowError: it is no index at all.
        """
        raw = members(json.loads(data))
        if integer(raw["format"]) != FORMAT:
            raise CheckpointError(
                f"it has format {raw['format']}, this version reads {FORMAT}; install a newer elastic-train"
            )
        tensors, starts, ends, packs = (array("q", ints(raw[name])) for name in ("tensors", "starts", "ends", "packs"))
        elsewhere = tuple(map(text, items(raw["elsewhere"])))
        found = PackIndex(pack, tensors, starts, ends, packs, elsewhere, text(raw["hashes"]), text(raw["crcs"]))
        found._check()
        return found

    def _check(self) -> None:
        count = len(self.tensors)
        if any(len(column) != count for column in (self.starts, self.ends, self.packs)):
            raise CheckpointError("its lists have different lengths")
        if any(a >= b for a, b in itertools.pairwise(self.tensors)) or (count and self.tensors[0] < 0):
            raise CheckpointError("its tensors are not in order")
        if not all(map(ELSEWHERE.match, self.elsewhere)) or any(not 0 <= p <= len(self.elsewhere) for p in self.packs):
            raise CheckpointError(f"it names the packs {str(self.elsewhere)[:200]}")
        if any(not 0 <= start <= end for start, end in zip(self.starts, self.ends)):
            raise CheckpointError("it has a chunk that ends before it begins")
        blocks = self._blocks[-1]
        if len(self.hashes) != blocks * _XXH3_DIGITS or len(self.crcs) != blocks * _CRC_DIGITS:
            raise CheckpointError(f"it has not as many checksums as its {blocks} blocks need")
        places = sorted((p, start, end) for p, start, end in zip(self.packs, self.starts, self.ends) if end > start)
        for (one, _, end), (other, start, _) in itertools.pairwise(places):
            if one == other and start < end:
                raise CheckpointError(f"two chunks lie in the same bytes of {self._name(one)}, at {start}")

    @cached_property
    def _blocks(self) -> array[int]:
        """Return the number of blocks before each chunk, and the number of all blocks."""
        counts = (block_count(end - start) for start, end in zip(self.starts, self.ends))
        return array("q", itertools.accumulate(counts, initial=0))

    def _name(self, number: int) -> str:
        return self.elsewhere[number - 1] if number else self.pack

    def ends_by_pack(self) -> dict[str, tuple[int, int]]:
        """The packs that it names: how many bytes of chunks each has, and up to where."""
        found: dict[str, tuple[int, int]] = {}
        for number, start, end in zip(self.packs, self.starts, self.ends):
            size, last = found.get(self._name(number), (0, 0))
            found[self._name(number)] = size + end - start, max(last, end)
        return found

    def chunk(self, tensor: int, box: Box, length: int) -> Chunk:
        """The chunk of a tensor, by its number: `length` bytes of the elements in `box`.

        Raises:
            CheckpointError: it has none, or one of another length.
        """
        at = bisect_left(self.tensors, tensor)
        if at == len(self.tensors) or self.tensors[at] != tensor:
            raise CheckpointError("it does not say where the tensor lies")
        start, end = self.starts[at], self.ends[at]
        if end - start != length:
            raise CheckpointError(f"it has a chunk of {end - start} bytes that should have {length}")
        blocks = range(self._blocks[at], self._blocks[at + 1])
        hashes = tuple(_cut(self.hashes, blocks, _XXH3_DIGITS))
        if not all(map(XXH3.match, hashes)):
            raise CheckpointError("it has invalid block hashes")
        crcs = tuple(int(digits, 16) for digits in _cut(self.crcs, blocks, _CRC_DIGITS))
        return Chunk(box.offsets, box.sizes, self._name(self.packs[at]), start, end, hashes, crcs)


def put_index(
    storage: Storage, folder: str, index: PackIndex, cancelled: threading.Event | None = None
) -> dict[str, Any]:
    """Write the index of a pack into its folder; none where it has no chunks.

    Returns:
        what a rank says of it: its size and hash, and `used`: bytes and end of each pack that it names.
    """
    if not index.tensors:
        return {"index": [0, xxhash.xxh3_128_hexdigest(b"")], "used": {}}
    data = index.to_json()
    patiently(storage.replace, f"{folder}/{index_name(index.pack)}", data, cancelled=cancelled)
    return {"index": [len(data), xxhash.xxh3_128_hexdigest(data)], "used": index.ends_by_pack()}


def _cut(digits: str, blocks: Sequence[int], width: int) -> list[str]:
    return [digits[block * width : (block + 1) * width] for block in blocks]
