"""The format of torch.distributed.checkpoint (DCP), written and read on any storage, one tensor at a time, without
unpickling anything but data classes.

A checkpoint is a folder of files `__0_N.distcp`, in which each chunk of a tensor is its own `torch.save`, and of
`.metadata`, which is written last: the pickle of a `Metadata` that says where each chunk lies. The names are those that
`dcp.load({"model": ...})` asks for. `.metadata` is read by an unpickler that accepts only the few data classes of the
format, and chunks are read by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from elastic.checkpoint.downloads import RangeReader
from elastic.checkpoint.patience import patiently
from elastic.checkpoint.tensors import NAMES
from elastic.compat.torch_checkpoint import PICKLED, StorageInfo
from elastic.errors import CheckpointError
from elastic.placement import Box, narrowed, tiles
from elastic.storage import Storage
from elastic.tools.output import Output

METADATA = ".metadata"
MOST_METADATA_BYTES = 256 << 20
_FILE = re.compile(r"^[A-Za-z0-9_.-]+\Z")
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "TensorProperties",
        "StorageMeta",
    },
    "torch": {"Size"} | {str(dtype).removeprefix("torch.") for dtype in NAMES},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
}


def exported_name(saved: str) -> str:
    """Return torch's flat name of a saved tensor: `model.a.b` for `model/a.b`, `optimizer.state.a.b.exp_avg` for
    `optimizer/a.b/exp_avg`."""
    kind, _, rest = saved.partition("/")
    return f"optimizer.state.{rest.replace('/', '.')}" if kind == "optimizer" else f"{kind}.{rest}"


def write(output: Output, batches: Iterable[list[tuple[str, torch.Tensor]]], note: str, text: str) -> list[str]:
    """Write tensors, and `text` as the entry `note`; returns the names of the files, `.metadata` last."""
    entries: dict[str, Any] = {}
    places: dict[MetadataIndex, StorageInfo] = {}
    files: list[str] = []

    def put(saved: list[tuple[MetadataIndex, object]]) -> None:
        name, whole = f"__0_{len(files)}.distcp", io.BytesIO()
        for index, value in saved:
            start = whole.tell()
            piece = io.BytesIO()
            torch.save(value, piece)
            whole.write(piece.getbuffer())
            places[index] = StorageInfo(name, start, whole.tell() - start)
        output.put(name, whole.getvalue())
        files.append(name)

    for batch in batches:
        for name, tensor in batch:
            origin = torch.Size([0] * tensor.dim())
            chunk = ChunkStorageMetadata(origin, tensor.size())
            entries[name] = TensorStorageMetadata(TensorProperties.create_from_tensor(tensor), tensor.size(), [chunk])
        put([(MetadataIndex(name, [0] * tensor.dim()), tensor) for name, tensor in batch])
    entries[note] = BytesStorageMetadata()
    put([(MetadataIndex(note), text)])
    paths = {name: tuple(name.split(".", 1)) for name in entries}
    output.put(METADATA, pickle.dumps(Metadata(entries, planner_data=paths, storage_data=places)))
    return [*files, METADATA]


# ---- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """A checkpoint of DCP: its tensors, and the names of its other entries."""

    storage: Storage
    tensors: Mapping[str, TensorStorageMetadata]
    others: frozenset[str]
    places: Mapping[MetadataIndex, StorageInfo]

    def text(self, name: str) -> str:
        """Read an entry that is a string.

        Raises:
            CheckpointError: the entry is something else, or cannot be read.
        """
        found = self._load(name, self._place(MetadataIndex(name)))
        if not isinstance(found, str):
            raise CheckpointError(f"the entry {name!r} is a {type(found).__name__}, not a text")
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """Read a whole tensor from its chunks, on the CPU.

        Raises:
            CheckpointError: a chunk is missing, damaged, or of another dtype or shape than `.metadata` says.
        """
        entry = self.tensors[name]
        places = [self._place(MetadataIndex(name, chunk.offsets)) for chunk in entry.chunks]
        least = entry.size.numel() * entry.properties.dtype.itemsize
        if sum(place.length for place in places) < least:
            raise CheckpointError(f"the chunks of the tensor {name!r} have fewer bytes than its {least}")
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk, place in zip(entry.chunks, places):
            found = self._load(name, place)
            if not isinstance(found, torch.Tensor) or (found.dtype, found.size()) != (whole.dtype, chunk.sizes):
                raise CheckpointError(f"a chunk of the tensor {name!r} is not what {METADATA} says")
            box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
            narrowed(whole, box, Box.whole(tuple(entry.size))).copy_(found)
        return whole

    def _place(self, index: MetadataIndex) -> StorageInfo:
        place = self.places.get(index)
        if not isinstance(place, StorageInfo) or not _FILE.match(str(place.relative_path)) or place.length < 0:
            raise CheckpointError(f"{METADATA} does not say where {index.fqn!r} lies")
        if place.transform_descriptors:
            raise CheckpointError(f"{index.fqn!r} is stored as {place.transform_descriptors}, which is not read here")
        return place

    def _load(self, name: str, place: StorageInfo) -> Any:
        size = patiently(self.storage.size, place.relative_path)
        if place.offset < 0 or place.offset + place.length > size:
            raise CheckpointError(f"{place.relative_path} is too short for {name!r}")
        data, reader = bytearray(place.length), RangeReader(self.storage)
        try:
            reader.read(place.relative_path, place.offset, [memoryview(data)])
        finally:
            reader.close()
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # torch may raise anything on bytes that are no saved tensor
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{place.relative_path}: {name!r} cannot be read: {reason}") from error


def is_dcp(storage: Storage) -> bool:
    return patiently(storage.exists, METADATA)


def open_dcp(storage: Storage) -> Opened:
    """Read and check `.metadata`.

    Raises:
        CheckpointError: it holds something else than DCP's data classes, or impossible shapes or chunks.
    """
    size = patiently(storage.size, METADATA)
    if size > MOST_METADATA_BYTES:
        raise CheckpointError(f"{METADATA} has {size} bytes, more than such a file can have")
    try:
        found = _Unpickler(io.BytesIO(patiently(storage.read, METADATA))).load()
        if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
            raise CheckpointError(f"{METADATA} is no metadata of torch.distributed.checkpoint")
        tensors, others = {}, set()
        for name, entry in found.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                _check(name, entry)
                tensors[name] = entry
            else:
                others.add(name)
    except CheckpointError:
        raise
    except Exception as error:  # a hostile or incomplete pickle may lead to any error
        raise CheckpointError(f"{METADATA} cannot be read: {' '.join(str(error).split())[:200]}") from error
    return Opened(storage, tensors, frozenset(others), found.storage_data)


def _check(name: str, entry: TensorStorageMetadata) -> None:
    shape = tuple(entry.size)
    boxes = [Box(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks]
    inside = all(box.is_in(shape) for box in boxes)
    if entry.properties.dtype not in NAMES or not inside or not tiles(boxes, shape):
        raise CheckpointError(f"{METADATA}: tensor {name!r} has a dtype, a shape or chunks that cannot be")


class _Unpickler(pickle.Unpickler):
    """Finds only the data classes of DCP, so that a pickle cannot call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in (*_CLASSES.get(module, ()), *PICKLED.get(module, ())):
            raise CheckpointError(f"{METADATA} wants {module}.{name}, which is not one of the format's data classes")
        return super().find_class(module, name)
