"""Finding and loading checkpoints: the newest committed one that verifies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from elastic.checkpoint.format import (
    ATTEMPT,
    BLOCK_BYTES,
    DTYPES,
    FOLDER,
    Chunk,
    Manifest,
    TensorEntry,
    attempt_folder,
    hash_blocks,
    parse_manifest,
    parse_step,
    step_folder,
)
from elastic.errors import CheckpointError
from elastic.storage import Storage


@dataclass(frozen=True)
class Committed:
    """A committed checkpoint: where it is and which world wrote it."""

    step: int
    attempt: str

    @property
    def folder(self) -> str:
        return attempt_folder(self.step, self.attempt)


def steps_with_attempts(storage: Storage) -> list[int]:
    """Steps that have a folder, committed or not, ascending."""
    return sorted(s for s in map(parse_step, storage.names(FOLDER)) if s is not None)


def newest_first(storage: Storage) -> Iterator[Committed]:
    """All committed checkpoints: highest step first, then highest generation."""
    for step in reversed(steps_with_attempts(storage)):
        attempts = [m for m in map(ATTEMPT.match, storage.names(step_folder(step))) if m]
        for match in sorted(attempts, key=lambda m: (int(m[1]), int(m[2]), m[3]), reverse=True):
            if storage.exists(f"{attempt_folder(step, match[0])}/manifest.json"):
                yield Committed(step, match[0])


def read_manifest(storage: Storage, checkpoint: Committed) -> Manifest:
    """The validated manifest of a committed checkpoint.

    Raises:
        CheckpointError: it is damaged, or of a newer format.
    """
    where = f"{checkpoint.folder}/manifest.json"
    manifest = parse_manifest(storage.read(where), where)
    if manifest.step != checkpoint.step:
        raise CheckpointError(f"{where} is of step {manifest.step}")
    return manifest


def read_tensor(storage: Storage, checkpoint: Committed, name: str, entry: TensorEntry) -> torch.Tensor:
    """Read and verify one tensor, on the CPU.

    Raises:
        CheckpointError: an object is missing, short, or has other bytes than were written.
    """
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    for chunk in entry.chunks:
        data = _verified(storage, checkpoint, name, chunk)
        piece = torch.frombuffer(data, dtype=DTYPES[entry.dtype]) if data else torch.empty(0, dtype=tensor.dtype)
        box = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes))
        tensor[box] = piece.view(chunk.sizes)
    return tensor


def _verified(storage: Storage, checkpoint: Committed, name: str, chunk: Chunk) -> bytearray:
    where = f"{checkpoint.folder}/{chunk.pack}"
    try:
        data = bytearray(storage.read(where, chunk.start, chunk.end))
    except FileNotFoundError as error:
        raise CheckpointError(f"{where} is missing, which holds the tensor {name!r}") from error
    if len(data) != chunk.end - chunk.start:
        raise CheckpointError(f"{where} is too short for the tensor {name!r}")
    for i, (found, wanted) in enumerate(zip(hash_blocks(memoryview(data)), chunk.hashes)):
        if found != wanted:
            at = chunk.start + i * BLOCK_BYTES
            raise CheckpointError(f"{where} has other bytes than were written, in the block at {at} (tensor {name!r})")
    return data
