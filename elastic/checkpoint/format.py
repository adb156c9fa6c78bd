"""The manifest of a checkpoint: plain JSON, validated before any of it is used. No pickle, and no torch.

checkpoints/step-00000120/<epoch>-<n>-<id>/rank-0003.pack   raw little-endian bytes of boxes of tensors
checkpoints/step-00000120/<epoch>-<n>-<id>/rank-0003.index  where in the pack each tensor lies, and checksums of blocks
checkpoints/step-00000120/<epoch>-<n>-<id>/manifest.json    written last, create-if-absent: that is the commit

The manifest says how tensors are sharded and which pack has which part, and has a hash of each index. Until format 3
there were no indexes: the manifest listed all chunks, each with its place and its checksums.

The first entry of the manifest is its own checksum. Each block has a crc32 beside its xxh3_128: crc32s of parts can be
combined, so readers that each need a part of a block verify it together. A chunk may lie in a pack of an earlier
checkpoint. Format 1 had none of this.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import xxhash

from elastic.checkpoint.families import Placement
from elastic.checkpoint.fields import ITEM_BYTES
from elastic.placement import Box

if TYPE_CHECKING:
    from elastic.checkpoint.pack_index import PackIndex

#: Format 2 added checksums that can be combined; 3 writes values as `elastic.values` does; 4 describes chunks by a
#: formula, and lists the rest in indexes.
FORMAT = 4
READABLE = (1, 2, 3, 4)
BLOCK_BYTES = 16 << 20
MAX_MANIFEST_BYTES = 256 << 20
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
ATTEMPT = re.compile(r"^(\d{1,9})-(\d{1,9})-([A-Za-z0-9]{1,40})\Z")
ELSEWHERE = re.compile(r"^step-\d{8,18}/\d{1,9}-\d{1,9}-[A-Za-z0-9]{1,40}/rank-\d{4,9}\.pack\Z")
OWN_PACK = re.compile(r"^rank-\d{4,9}\.pack\Z")
XXH3 = re.compile(r"^[0-9a-f]{32}\Z")
_STEP = re.compile(r"^step-(\d{8,18})\Z")
SEAL = re.compile(rb'\{"checksum": "([0-9a-f]{32})", ')


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and where its bytes lie: `pack[start:end]`.

    Args:
        offsets, sizes: the box, in elements.
        pack: a name in the checkpoint's own folder, or `step-.../<attempt>/<name>` of the earlier checkpoint that wrote
            the same bytes.
        start, end: bytes.
        hashes: the xxh3_128 of each block of BLOCK_BYTES, as hexadecimal digits.
        crcs: the crc32 of each block; none in format 1.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    pack: str
    start: int
    end: int
    hashes: tuple[str, ...]
    crcs: tuple[int, ...] = ()

    @property
    def box(self) -> Box:
        return Box(self.offsets, self.sizes)


@dataclass(frozen=True)
class TensorEntry:
    """A tensor: its dtype, its global shape, and those of its chunks that are known. Together the chunks tile it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Manifest:
    """Everything of a checkpoint that is not tensor bytes.

    Args:
        world: the world that wrote it.
        values: the state beside tensors, as `elastic.values` encodes it.
        tensors: by name; until format 3 with all their chunks.
        metrics: the figures of the evaluation at this step.
        nonce: a random text, drawn for each commit: a keeper that reads the manifest back knows whose commit it was.
        placement: which pack has which part of the tensors; None until format 3.
        indexes: the indexes that were read so far, by the names of their packs.
    """

    step: int
    seed: int
    config_digest: str
    world: dict[str, Any]
    values: dict[str, Any]
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    nonce: str = ""
    format: int = FORMAT
    placement: Placement | None = field(default=None, repr=False)
    indexes: dict[str, PackIndex] = field(default_factory=dict, compare=False, repr=False)

    @property
    def head(self) -> dict[str, Any]:
        """All fields but the tensors, as JSON."""
        names = ("step", "seed", "config_digest", "world", "values", "metrics", "nonce", "format")
        return {name: getattr(self, name) for name in names}

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def objects(self, folder: str) -> dict[str, int]:
        """Return every object that the checkpoint in `folder` reads from, and the least size that it must have, in
        bytes."""
        found: dict[str, int] = {}
        if self.placement is not None:
            for pack in self.placement.packs.values():
                found.update({f"{folder}/{pack.name}": pack.size} if pack.size else {})
                found.update({f"{folder}/{pack.index_name}": pack.index[0]} if pack.index[0] else {})
                for name, (_, end) in pack.elsewhere.items():
                    path = pack_path(folder, name)
                    found[path] = max(found.get(path, 0), end)
        for entry in self.tensors.values():
            for chunk in entry.chunks:
                path = pack_path(folder, chunk.pack)
                found[path] = max(found.get(path, 0), chunk.end)
        return found


def seal(data: bytes) -> bytes:
    """Put the xxh3_128 of a JSON object's other bytes in as its first entry."""
    return b'{"checksum": "%s", %s' % (xxhash.xxh3_128_hexdigest(data).encode(), data[1:])


def is_sealed(data: bytes) -> bool:
    """Return whether the checksum at the beginning of a JSON object is that of its other bytes."""
    match = SEAL.match(data)
    return match is not None and xxhash.xxh3_128_hexdigest(b"{" + data[match.end() :]).encode() == match[1]


def step_folder(step: int) -> str:
    """Return the folder of a step, from the root of the storage."""
    return f"{FOLDER}/step-{step:08d}"


def attempt_folder(step: int, attempt: str) -> str:
    """Return the folder of one attempt to save a step, from the root of the storage."""
    return f"{step_folder(step)}/{attempt}"


def pack_path(folder: str, pack: str) -> str:
    """Return the path of a pack, from the root of the storage, as the checkpoint in `folder` names it."""
    if "/" in pack:
        return f"{FOLDER}/{pack}"
    return f"{folder}/{pack}" if folder else pack


def parse_step(name: str) -> int | None:
    """Return the step of a folder name, or None for a foreign name."""
    match = _STEP.match(name)
    return int(match[1]) if match else None


def block_count(length: int) -> int:
    """Return the number of blocks in a chunk of `length` bytes; an empty chunk has one empty block."""
    return max(1, -(-length // BLOCK_BYTES))
