"""The manifest of a checkpoint: plain JSON, validated before anything in it is believed. No pickle, and no torch.

checkpoints/step-00000120/<epoch>-<n>-<id>/rank-0003.pack   raw little-endian bytes of boxes of tensors
checkpoints/step-00000120/<epoch>-<n>-<id>/rank-0003.index  where in the pack each tensor lies, and checksums of blocks
checkpoints/step-00000120/<epoch>-<n>-<id>/manifest.json    written last, create-if-absent: that is the commit

The manifest says how tensors are cut, which pack has which part, and has a hash of each index. Until format 3 there
were no indexes: it listed all chunks, each with its place and its checksums.

Its own checksum is its first entry. For each block there is, beside the xxh3_128, a crc32: those of parts can be
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

#: 2 has checksums that can be combined; 3 has values as `elastic.values` writes them; 4 has chunks by formula, and
#: what is listed of them in indexes.
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

    Each block of BLOCK_BYTES has an xxh3_128 in `hashes` and a crc32 in `crcs` (none in format 1). `pack` is a name in
    the checkpoint's own folder, or `step-.../<attempt>/<name>` of the checkpoint that wrote the same bytes before.
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
    """A tensor: dtype, global shape, and the chunks that tile it, as far as they are known."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Manifest:
    """Everything of a checkpoint that is not tensor bytes.

    Args:
        tensors: by name; until format 3 with all their chunks.
        metrics: those of the evaluation at this step.
        nonce: is drawn for each commit: who reads it back knows whose commit it was.
        placement: which pack has what of them; None until format 3.
        indexes: those that were read so far, by the names of their packs.
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
        """All but the tensors, as JSON."""
        names = ("step", "seed", "config_digest", "world", "values", "metrics", "nonce", "format")
        return {name: getattr(self, name) for name in names}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def objects(self, folder: str) -> dict[str, int]:
        """Every object that this checkpoint, which lies in `folder`, reads from, and the least size it must have."""
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
    """A JSON object with the xxh3_128 of its other bytes as its first entry."""
    return b'{"checksum": "%s", %s' % (xxhash.xxh3_128_hexdigest(data).encode(), data[1:])


def is_sealed(data: bytes) -> bool:
    match = SEAL.match(data)
    return match is not None and xxhash.xxh3_128_hexdigest(b"{" + data[match.end() :]).encode() == match[1]


def step_folder(step: int) -> str:
    return f"{FOLDER}/step-{step:08d}"


def attempt_folder(step: int, attempt: str) -> str:
    return f"{step_folder(step)}/{attempt}"


def pack_path(folder: str, pack: str) -> str:
    """Where a chunk's pack lies, as the checkpoint in `folder` names it."""
    if "/" in pack:
        return f"{FOLDER}/{pack}"
    return f"{folder}/{pack}" if folder else pack


def parse_step(name: str) -> int | None:
    """The step of a folder name, or None if it is something else's."""
    match = _STEP.match(name)
    return int(match[1]) if match else None


def block_count(length: int) -> int:
    """Blocks of a chunk of `length` bytes; an empty one has one, which is empty."""
    return max(1, -(-length // BLOCK_BYTES))
