"""Writing a checkpoint: each rank one pack with its share of the tensors, the manifest last."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from elastic import fault
from elastic.checkpoint.format import (
    ALIGNMENT,
    Chunk,
    Manifest,
    TensorEntry,
    attempt_folder,
    check_name,
    hash_blocks,
    parse_manifest,
    tensor_bytes,
)
from elastic.errors import CheckpointError
from elastic.storage import Storage


def share(tensors: dict[str, torch.Tensor], world_size: int) -> list[list[str]]:
    """Spread replicated tensors over ranks by size: the largest first, to the rank with the fewest bytes so far."""
    load = [0] * world_size
    names: list[list[str]] = [[] for _ in range(world_size)]
    for name in sorted(tensors, key=lambda n: (-tensors[n].nbytes, n)):
        rank = load.index(min(load))
        names[rank].append(name)
        load[rank] += tensors[name].nbytes
    return names


def write_pack(
    storage: Storage, step: int, attempt: str, rank: int, tensors: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """Write one rank's pack.

    Returns:
        its index: name -> tensor entry, as plain JSON values.
    """
    pack = f"rank-{rank:04d}.pack"
    data, index = bytearray(), {}
    for name, tensor in tensors.items():
        check_name(name)
        data += b"\0" * (-len(data) % ALIGNMENT)
        piece = tensor_bytes(tensor)
        start = len(data)
        data += piece
        chunk = Chunk((0,) * tensor.dim(), tuple(tensor.shape), pack, start, len(data), hash_blocks(piece))
        index[name] = asdict(TensorEntry(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), (chunk,)))
    storage.create(f"{attempt_folder(step, attempt)}/{pack}", bytes(data))
    return index


def commit(storage: Storage, attempt: str, manifest: Manifest, indexes: list[dict[str, Any]]) -> Manifest:
    """Create the manifest from all ranks' indexes. Only the keeper of a run calls this.

    Raises:
        FileExistsError: this attempt is committed already.
        CheckpointError: two ranks claim one tensor, or an index is not one.
    """
    tensors: dict[str, Any] = {}
    for index in indexes:
        twice = set(tensors) & set(index)
        if twice:
            raise CheckpointError(f"two ranks wrote the tensor {sorted(twice)[0]!r}")
        tensors.update(index)
    name = f"{attempt_folder(manifest.step, attempt)}/manifest.json"
    data = replace(manifest, tensors=tensors).to_json()
    whole = parse_manifest(data, name)  # nothing is committed that could not be read again
    fault.point("checkpoint.before_manifest", -1, manifest.step)
    storage.create(name, data)
    fault.point("checkpoint.after_manifest", -1, manifest.step)
    return whole
