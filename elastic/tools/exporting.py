"""Exports a checkpoint to files that other programs read: safetensors (Hugging Face), or
torch.distributed.checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elastic.checkpoint.fields import ITEM_BYTES
from elastic.checkpoint.format import Manifest, TensorEntry
from elastic.checkpoint.initial import SUFFIX
from elastic.checkpoint.loader import load
from elastic.checkpoint.reader import Committed, read_manifest
from elastic.checkpoint.tensors import DTYPES, Shard, tensor_bytes
from elastic.errors import ConfigError
from elastic.storage import Storage
from elastic.tools import dcp
from elastic.tools.output import Output
from elastic.tools.pretrained import Pretrained

WEIGHTS = "model/"
NOTE = "elastic"  # the name under which a full export has the values of the checkpoint
BATCH_BYTES = 256 << 20
CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


@dataclass(frozen=True)
class Item:
    """A tensor to export: its name there, its name in the checkpoint, and its dtype."""

    name: str
    saved: str
    entry: TensorEntry
    dtype: str

    @property
    def nbytes(self) -> int:
        """The bytes of the exported tensor."""
        return math.prod(self.entry.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Exported:
    """What was written: the step, the files, and the number and bytes of tensors."""

    step: int
    files: list[str]
    tensors: int
    bytes: int


def export(
    storage: Storage,
    checkpoint: Committed,
    out: str,
    *,
    kind: str = "safetensors",
    full: bool = False,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    pretrained: Pretrained | None = None,
    on_total: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None,
) -> Exported:
    """Write a checkpoint to `out`: a file *.safetensors, or else a folder that does not exist yet.

    Every byte is verified on the way. Memory is bounded by the largest tensor plus BATCH_BYTES and some parts.

    Args:
        kind: "safetensors", or "dcp", which is always full.
        full: export the whole state, from which an import can resume, instead of the weights alone.
        dtype: convert floating-point weights to this dtype.
        max_shard_bytes: begin another file of safetensors when one would have more bytes of tensors.
        pretrained: make a folder that `from_pretrained` opens.
        on_total: as in `inspecting.verify`, for bytes of tensors written.

    Raises:
        ConfigError: options that do not go together, or `out` exists.
        CheckpointError: the checkpoint is damaged; the message names the object and the block.
    """
    full = full or kind == "dcp"
    if full and dtype is not None:
        raise ConfigError(f"--dtype is {dtype!r}, but a full state is exported as it is; leave --dtype or --full out")
    if dtype is not None and (dtype not in DTYPES or not DTYPES[dtype].is_floating_point):
        names = ", ".join(n for n, d in DTYPES.items() if d.is_floating_point)
        raise ConfigError(f"--dtype is {dtype!r}; give one of {names}")
    if max_shard_bytes is not None and (kind == "dcp" or out.endswith(SUFFIX)):
        raise ConfigError(f"--max-shard-size cuts a folder of safetensors, but OUT is {out!r} as {kind}; leave it out")
    if kind == "dcp" and out.endswith(SUFFIX):
        raise ConfigError(f"OUT is {out!r}, but dcp is a folder; give the name of one")
    if pretrained is not None and (full or out.endswith(SUFFIX)):
        raise ConfigError(
            f"OUT is {out!r} as {'all of a state' if full else 'one file'}, but --hf and --adapter make a folder of "
            "weights; give the name of one, without --full"
        )
    manifest = read_manifest(storage, checkpoint)
    named: Callable[[str], str | None] = dcp.exported_name if kind == "dcp" else lambda name: name
    files: Mapping[str, bytes] = {}
    if pretrained is not None:
        named, files = pretrained.named(manifest, WEIGHTS), pretrained.files(manifest, dtype)
    items = _items(manifest, full, dtype, named)
    note = _note(manifest, items) if full else None
    with Output(out, folder=not out.endswith(SUFFIX), option="OUT") as output:
        on_bytes = on_total(sum(item.nbytes for item in items))
        source = _Source(storage, checkpoint.folder, manifest, on_bytes)
        if kind == "dcp":
            assert note is not None
            written = dcp.write(output, source.batches(items), NOTE, json.dumps(note))
        else:
            for name, data in files.items():
                output.put(name, data)
            stem = pretrained.stem if pretrained is not None else "model"
            written = _write_safetensors(output, source, items, manifest.step, note, max_shard_bytes, stem)
    return Exported(manifest.step, [*files, *written], len(items), sum(item.nbytes for item in items))


def _items(manifest: Manifest, full: bool, dtype: str | None, named: Callable[[str], str | None]) -> list[Item]:
    found = []
    for saved, entry in sorted(manifest.tensors.items()):
        if not full and not saved.startswith(WEIGHTS):
            continue
        name = named(saved if full else saved.removeprefix(WEIGHTS))
        if name is None:
            continue
        converted = dtype if dtype is not None and DTYPES[entry.dtype].is_floating_point else entry.dtype
        found.append(Item(name, saved, entry, converted))
    if not found:
        raise ConfigError(
            f"the checkpoint of step {manifest.step} has no tensor {WEIGHTS}..., so no weights; give --full"
        )
    return found


def _note(manifest: Manifest, items: Sequence[Item]) -> dict[str, Any]:
    """Return what a full export has beside tensors; `names` leads back to the names in the checkpoint."""
    return {
        "format": 1,
        "step": manifest.step,
        "seed": manifest.seed,
        "config_digest": manifest.config_digest,
        "values": manifest.values,
        "metrics": manifest.metrics,
        "names": {i.name: i.saved for i in items},
    }


class _Source:
    """Reads the tensors of a checkpoint, many small ones at a time."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest, on_bytes: Callable[[int], None]):
        self._storage, self._folder, self._manifest, self._on_bytes = storage, folder, manifest, on_bytes

    def batches(self, items: Sequence[Item]) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """Yield lists of (name, tensor) in the order of `items`: at most BATCH_BYTES at a time, or one larger
        tensor."""
        for some in grouped(items, [item.nbytes for item in items], BATCH_BYTES):
            tensors = [torch.empty(i.entry.shape, dtype=DTYPES[i.dtype]) for i in some]
            shards = [Shard.whole(i.saved, tensor) for i, tensor in zip(some, tensors)]
            load(self._storage, self._folder, self._manifest, shards, convert=True)
            yield [(item.name, tensor) for item, tensor in zip(some, tensors)]
            self._on_bytes(sum(item.nbytes for item in some))


def grouped(items: Sequence[Any], sizes: Sequence[int], most: int) -> Iterator[list[Any]]:
    """Yield runs of neighbours of at most `most` bytes; a larger item comes alone."""
    group: list[Any] = []
    room = most
    for item, size in zip(items, sizes, strict=True):
        if group and size > room:
            yield group
            group, room = [], most
        group.append(item)
        room -= size
    if group:
        yield group


def _write_safetensors(
    output: Output,
    source: _Source,
    items: list[Item],
    step: int,
    note: dict[str, Any] | None,
    most: int | None,
    stem: str,
) -> list[str]:
    for item in items:
        if item.dtype not in CODES:
            raise ConfigError(
                f"tensor {item.saved!r} is {item.dtype}, which safetensors cannot hold; give --format dcp"
            )
    total = sum(item.nbytes for item in items)
    shards = list(grouped(items, [item.nbytes for item in items], most or max(total, 1)))
    if output.name:
        names = [output.name]
    elif len(shards) == 1:
        names = [stem + SUFFIX]
    else:
        names = [f"{stem}-{n:05d}-of-{len(shards):05d}{SUFFIX}" for n in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        metadata = {"format": "pt", "step": str(step)}
        if note is not None and name == names[0]:
            metadata[NOTE] = json.dumps(note)
        # The widest elements first, so that each tensor lies at a multiple of its element size.
        ordered = sorted(shard, key=lambda i: (-ITEM_BYTES[i.dtype], i.name))
        header = _header(ordered, metadata)
        with output.stream(name, len(header) + sum(i.nbytes for i in ordered)) as stream:
            stream.write(memoryview(header))
            for batch in source.batches(ordered):
                for _, tensor in batch:
                    if tensor.numel():
                        stream.write(tensor_bytes(tensor))
    if len(names) > 1:
        places = {item.name: name for name, shard in zip(names, shards) for item in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        names.append(f"{stem}{SUFFIX}.index.json")
        output.put(names[-1], (json.dumps(index, indent=2) + "\n").encode())
    return names


def _header(items: Sequence[Item], metadata: dict[str, str]) -> bytes:
    """Return the length and the JSON of a safetensors header, padded so that the tensors begin at a multiple of 8
    bytes."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for item in items:
        places = [at, at + item.nbytes]
        entries[item.name] = {"dtype": CODES[item.dtype], "shape": list(item.entry.shape), "data_offsets": places}
        at += item.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
