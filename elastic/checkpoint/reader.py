"""Finding checkpoints: which are committed, and what their manifests say. Reads no tensors and imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from elastic.checkpoint.format import (
    ATTEMPT,
    FOLDER,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    attempt_folder,
    parse_manifest,
    parse_step,
    step_folder,
)
from elastic.checkpoint.transfer import patiently
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


def attempts(storage: Storage, step: int) -> list[str]:
    """The attempts of a step, committed or not, highest generation first."""
    found = [m for m in map(ATTEMPT.match, storage.names(step_folder(step))) if m]
    return [m[0] for m in sorted(found, key=lambda m: (int(m[1]), int(m[2]), m[3]), reverse=True)]


def newest_first(storage: Storage) -> Iterator[Committed]:
    """All committed checkpoints: highest step first, then highest generation."""
    for step in reversed(patiently(steps_with_attempts, storage)):
        for attempt in patiently(attempts, storage, step):
            folder = attempt_folder(step, attempt)
            if patiently(storage.exists, f"{folder}/{MANIFEST}"):
                yield Committed(step, attempt)


def read_manifest(storage: Storage, checkpoint: Committed) -> Manifest:
    """The validated manifest of a committed checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or of a newer format.
    """
    where = f"{checkpoint.folder}/{MANIFEST}"
    try:
        data = patiently(storage.read, where, 0, MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{where} is missing") from error
    manifest = parse_manifest(data, where)
    if manifest.step != checkpoint.step:
        raise CheckpointError(f"{where} is of step {manifest.step}")
    return manifest
