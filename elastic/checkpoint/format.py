"""The manifest of a checkpoint: plain JSON, validated before anything in it is believed. No pickle anywhere.

checkpoints/step-00000120/<epoch>-<n>-<id>/rank-0003.pack   raw little-endian bytes, tensors 64-byte aligned
checkpoints/step-00000120/<epoch>-<n>-<id>/manifest.json    written last, create-if-absent: that is the commit
"""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import xxhash

from elastic.errors import CheckpointError

FORMAT = 1
ALIGNMENT = 64
BLOCK_BYTES = 16 << 20
MAX_MANIFEST_BYTES = 256 << 20
FOLDER = "checkpoints"
ATTEMPT = re.compile(r"^(\d+)-(\d+)-([A-Za-z0-9]+)\Z")
_PACK = re.compile(r"^rank-\d{4,}\.pack\Z")
_STEP = re.compile(r"^step-(\d{8,})\Z")

DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
        torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor and where its bytes lie: `pack[start:end]`, one xxh3_128 for each block of BLOCK_BYTES."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    pack: str
    start: int
    end: int
    hashes: tuple[str, ...]


@dataclass(frozen=True)
class TensorEntry:
    """A tensor: dtype, global shape, and the chunks that tile it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything of a checkpoint that is not tensor bytes."""

    step: int
    seed: int
    config_digest: str
    world: dict[str, Any]
    values: dict[str, Any]
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    format: int = FORMAT

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()


def step_folder(step: int) -> str:
    return f"{FOLDER}/step-{step:08d}"


def attempt_folder(step: int, attempt: str) -> str:
    return f"{step_folder(step)}/{attempt}"


def parse_step(name: str) -> int | None:
    """The step of a folder name, or None if it is something else's."""
    match = _STEP.match(name)
    return int(match[1]) if match else None


def hash_blocks(data: memoryview) -> tuple[str, ...]:
    """xxh3_128 of each block of BLOCK_BYTES."""
    return tuple(xxhash.xxh3_128_hexdigest(data[i : i + BLOCK_BYTES]) for i in range(0, max(len(data), 1), BLOCK_BYTES))


def check_name(name: str) -> None:
    """Refuse tensor names that could climb out of the folder or mean something to a URL.

    Raises:
        CheckpointError: the name is absolute, has an empty or `..` part, or control characters.
    """
    parts = name.split("/")
    if not name or "://" in name or any(p in ("", ".", "..") for p in parts) or any(ord(c) < 32 for c in name):
        raise CheckpointError(f"tensor name {name!r} is not a plain relative name")


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read and validate a manifest.

    Raises:
        CheckpointError: a newer format, or anything in it that cannot be true.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{where} has {len(data)} bytes, more than a manifest can have")
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    try:
        if not isinstance(raw, dict):
            raise CheckpointError(f"{where} is not a JSON object")
        if raw.get("format") != FORMAT:
            raise CheckpointError(
                f"{where} has format {raw.get('format')!r}, this version reads {FORMAT}; install a newer elastic-train"
            )
        tensors = {name: _tensor(name, entry) for name, entry in raw["tensors"].items()}
        manifest = Manifest(
            int(raw["step"]), int(raw["seed"]), str(raw["config_digest"]), dict(raw["world"]), dict(raw["values"]),
            tensors,
        )  # fmt: skip
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{where} does not say what a manifest says: {error!r}") from error
    if manifest.step < 0:
        raise CheckpointError(f"{where} has step {manifest.step}")
    return manifest


def _tensor(name: str, raw: dict[str, Any]) -> TensorEntry:
    check_name(name)
    dtype, shape = raw["dtype"], tuple(map(int, raw["shape"]))
    if dtype not in DTYPES:
        raise CheckpointError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    item = DTYPES[dtype].itemsize
    if any(s < 0 for s in shape) or math.prod(max(s, 1) for s in shape) * item >= 1 << 63:
        raise CheckpointError(f"tensor {name!r} has the shape {shape}")
    chunks = []
    for c in raw["chunks"]:
        chunk = Chunk(
            tuple(map(int, c["offsets"])), tuple(map(int, c["sizes"])), str(c["pack"]), int(c["start"]),
            int(c["end"]), tuple(map(str, c["hashes"])),
        )  # fmt: skip
        if not _PACK.match(chunk.pack):
            raise CheckpointError(f"tensor {name!r} names the pack {chunk.pack!r}")
        inside = len(chunk.offsets) == len(chunk.sizes) == len(shape) and all(
            o >= 0 and s >= 0 and o + s <= n for o, s, n in zip(chunk.offsets, chunk.sizes, shape)
        )
        if not inside:
            raise CheckpointError(f"tensor {name!r} has a chunk outside its shape {shape}")
        length = chunk.end - chunk.start
        if chunk.start < 0 or length != math.prod(chunk.sizes) * item:
            raise CheckpointError(f"tensor {name!r} has a chunk of {length} bytes that should have another length")
        if len(chunk.hashes) != max(1, -(-length // BLOCK_BYTES)):
            raise CheckpointError(f"tensor {name!r} has a chunk with {len(chunk.hashes)} block hashes")
        chunks.append(chunk)
    whole = sum(math.prod(c.sizes) for c in chunks) == math.prod(shape)
    if not whole or any(_overlap(a, b) for a, b in itertools.combinations(chunks, 2)):
        raise CheckpointError(f"tensor {name!r} is not tiled by its chunks")
    return TensorEntry(dtype, shape, tuple(chunks))


def _overlap(a: Chunk, b: Chunk) -> bool:
    return all(max(p, q) < min(p + m, q + n) for p, m, q, n in zip(a.offsets, a.sizes, b.offsets, b.sizes))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's little-endian bytes, without a copy where it is contiguous on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)
