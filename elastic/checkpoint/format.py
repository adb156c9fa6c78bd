"""The manifest of a checkpoint: plain JSON, validated before anything in it is believed. No pickle, and no torch.

checkpoints/step-00000120/<epoch>-<n>-<id>/rank-0003.pack   raw little-endian bytes of boxes of tensors
checkpoints/step-00000120/<epoch>-<n>-<id>/manifest.json    written last, create-if-absent: that is the commit

Format 2 has its own checksum as its first entry. For each block it has, beside the xxh3_128, a crc32: those of parts
can be combined, so readers that each need a part of a block verify it together. A chunk may lie in a pack of an
earlier checkpoint. Format 1 had none of this.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash

from elastic.errors import CheckpointError, DamagedCheckpoint
from elastic.placement import Box, tiles

FORMAT = 3  # 2 has checksums that can be combined; 3 has values as `elastic.values` writes them
READABLE = (1, 2, 3)
_READS = "1, 2 and 3"
BLOCK_BYTES = 16 << 20
MAX_MANIFEST_BYTES = 256 << 20
MAX_NAME = 1000
MAX_DIMS = 32
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
ATTEMPT = re.compile(r"^(\d{1,9})-(\d{1,9})-([A-Za-z0-9]{1,40})\Z")
_PACK = re.compile(r"^(step-\d{8,18}/\d{1,9}-\d{1,9}-[A-Za-z0-9]{1,40}/)?rank-\d{4,9}\.pack\Z")
_STEP = re.compile(r"^step-(\d{8,18})\Z")
_SEAL = re.compile(rb'\{"checksum": "([0-9a-f]{32})", ')
_XXH3 = re.compile(r"^[0-9a-f]{32}\Z")

#: Bytes of an element, by the name of its dtype.
ITEM_BYTES = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}


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
    """A tensor: dtype, global shape, and the chunks that tile it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Manifest:
    """Everything of a checkpoint that is not tensor bytes.

    `metrics` are those of the evaluation at this step. `nonce` is drawn for each commit: who reads it back knows whose
    commit it was.
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

    def to_json(self) -> bytes:
        found = asdict(self)
        found["tensors"] = dict(sorted(found["tensors"].items()))
        return seal(json.dumps(dict(sorted(found.items()))).encode())  # values keep the order of their keys

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def packs(self, folder: str) -> dict[str, int]:
        """Every object that this checkpoint, which lies in `folder`, reads from, and the least size it must have."""
        found: dict[str, int] = {}
        for entry in self.tensors.values():
            for chunk in entry.chunks:
                path = pack_path(folder, chunk.pack)
                found[path] = max(found.get(path, 0), chunk.end)
        return found


def seal(data: bytes) -> bytes:
    """A JSON object with the xxh3_128 of its other bytes as its first entry."""
    return b'{"checksum": "%s", %s' % (xxhash.xxh3_128_hexdigest(data).encode(), data[1:])


def _is_sealed(data: bytes) -> bool:
    match = _SEAL.match(data)
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


def check_name(name: str) -> None:
    """Refuse tensor names that could climb out of the folder or mean something to a URL.

    Raises:
        CheckpointError: the name is absolute or very long, has an empty or `..` part, or control characters.
    """
    parts = name.split("/")
    plain = name and len(name) <= MAX_NAME and "://" not in name
    if not plain or any(p in ("", ".", "..") for p in parts) or any(ord(c) < 32 for c in name):
        raise CheckpointError(f"tensor name {name[:MAX_NAME]!r} is not a plain relative name")


# ---- reading -------------------------------------------------------------------------------------------------------


class _NewerFormat(CheckpointError):
    pass


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read and validate a manifest. Time and memory are bounded by a constant times its size.

    Raises:
        DamagedCheckpoint: anything in it that cannot be true.
        CheckpointError: a newer format.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise DamagedCheckpoint(f"{where} has more than {MAX_MANIFEST_BYTES} bytes, more than a manifest can have")
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where} is not JSON: {error}") from error
    if _SEAL.match(data) and not _is_sealed(data):
        raise DamagedCheckpoint(f"{where} has other bytes than were written")
    try:
        manifest = _manifest(raw, where)
    except _NewerFormat:
        raise
    except CheckpointError as error:
        raise DamagedCheckpoint(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedCheckpoint(f"{where} does not say what a manifest says: {error!r}"[:1000]) from error
    if manifest.format > 1 and not _is_sealed(data):
        raise DamagedCheckpoint(f"{where} has other bytes than were written")
    return manifest


def _manifest(raw: Any, where: str) -> Manifest:
    if not isinstance(raw, dict):
        raise CheckpointError("it is not a JSON object")
    version = raw.get("format")
    if type(version) is not int or version < 1:
        raise CheckpointError(f"it has format {str(version)[:100]}")
    if version not in READABLE:
        raise _NewerFormat(f"{where} has format {version}, this version reads {_READS}; install a newer elastic-train")
    step = _int(raw["step"])
    if step < 0:
        raise CheckpointError(f"it has step {step}")
    tensors = {name: _tensor(name, entry, version) for name, entry in raw["tensors"].items()}
    _check_apart(tensors)
    metrics = {_text(k): float(_number(v)) for k, v in raw.get("metrics", {}).items()}
    for part in ("world", "values"):
        if not isinstance(raw[part], dict):
            raise CheckpointError(f"its {part} is a {type(raw[part]).__name__}, not an object")
    return Manifest(
        step,
        _int(raw["seed"]),
        _text(raw["config_digest"]),
        raw["world"],
        raw["values"],
        tensors,
        metrics,
        _text(raw.get("nonce", "")),
        version,
    )


def _tensor(name: str, raw: Any, version: int) -> TensorEntry:
    check_name(name)
    dtype, shape = raw["dtype"], _ints(raw["shape"])
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"tensor {name!r} has the unknown dtype {str(dtype)[:100]!r}")
    item = ITEM_BYTES[dtype]
    if len(shape) > MAX_DIMS or any(s < 0 for s in shape) or math.prod(max(s, 1) for s in shape) * item >= 1 << 63:
        raise CheckpointError(f"tensor {name!r} has the shape {str(shape)[:200]}")
    chunks = tuple(_chunk(name, c, shape, item, version) for c in raw["chunks"])
    if not tiles([c.box for c in chunks], shape):
        raise CheckpointError(f"tensor {name!r} is not tiled by its chunks")
    return TensorEntry(dtype, shape, chunks)


def _check_apart(tensors: dict[str, TensorEntry]) -> None:
    """No two chunks lie in the same bytes: tensors are no larger than the objects that hold them."""
    places = sorted(
        (chunk.pack, chunk.start, chunk.end, name)
        for name, entry in tensors.items()
        for chunk in entry.chunks
        if chunk.end > chunk.start
    )
    for (pack, _, end, one), (other_pack, start, _, other) in itertools.pairwise(places):
        if pack == other_pack and start < end:
            raise CheckpointError(f"tensors {one!r} and {other!r} lie in the same bytes of {pack}")


def _chunk(name: str, raw: Any, shape: tuple[int, ...], item: int, version: int) -> Chunk:
    offsets, sizes = _ints(raw["offsets"]), _ints(raw["sizes"])
    pack, start, end = _text(raw["pack"]), _int(raw["start"]), _int(raw["end"])
    hashes = tuple(map(_text, _list(raw["hashes"])))
    crcs = _ints(raw["crcs"]) if version > 1 else ()
    if not _PACK.match(pack) or (version == 1 and "/" in pack):
        raise CheckpointError(f"tensor {name!r} names the pack {pack[:200]!r}")
    if not Box(offsets, sizes).is_in(shape):
        raise CheckpointError(f"tensor {name!r} has a chunk outside its shape {shape}")
    length = end - start
    if start < 0 or end >= 1 << 63 or length != math.prod(sizes) * item:
        raise CheckpointError(f"tensor {name!r} has a chunk of {length} bytes that should have another length")
    blocks = block_count(length)
    if len(hashes) != blocks or not all(map(_XXH3.match, hashes)):
        raise CheckpointError(f"tensor {name!r} has a chunk with {len(hashes)} block hashes, or what are none")
    if version > 1 and (len(crcs) != blocks or not all(0 <= c < 1 << 32 for c in crcs)):
        raise CheckpointError(f"tensor {name!r} has a chunk with {len(crcs)} block checksums, or what are none")
    return Chunk(offsets, sizes, pack, start, end, hashes, crcs)


def _int(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{str(value)[:100]!r} should be a whole number")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{str(value)[:100]!r} should be a number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:100]!r} should be a text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{str(value)[:100]!r} should be a list")
    return value


def _ints(value: Any) -> tuple[int, ...]:
    return tuple(map(_int, _list(value)))
