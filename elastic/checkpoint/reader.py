"""Finding checkpoints: which are committed, and what their manifests say. Reads no tensors and imports no torch."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from elastic.checkpoint.format import (
    ATTEMPT,
    FOLDER,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Manifest,
    attempt_folder,
    parse_step,
    step_folder,
)
from elastic.checkpoint.parsing import parse_manifest
from elastic.checkpoint.patience import patiently
from elastic.errors import CheckpointError, DamagedCheckpoint
from elastic.storage import Storage

#: The marks of damaged checkpoints lie in one folder beside the checkpoints: one listing shows all of them.
MARKS = f"{FOLDER}/damaged"
_MARK = re.compile(r"^(step-\d{8,18})\.(.+)\.json\Z")


@dataclass(frozen=True)
class Committed:
    """A committed checkpoint: its step, and the attempt (named by the world that wrote it) which was committed."""

    step: int
    attempt: str

    @property
    def folder(self) -> str:
        """The folder of its objects, from the root of the storage."""
        return attempt_folder(self.step, self.attempt)


def steps_with_attempts(storage: Storage) -> list[int]:
    """Return the steps that have a folder, committed or not, ascending."""
    return sorted(s for s in map(parse_step, storage.names(FOLDER)) if s is not None)


def attempts(storage: Storage, step: int) -> list[str]:
    """Return the attempts of a step, committed or not, those of the newest world first."""
    found = [m for m in map(ATTEMPT.match, storage.names(step_folder(step))) if m]
    return [m[0] for m in sorted(found, key=lambda m: (int(m[1]), int(m[2]), m[3]), reverse=True)]


def newest_first(storage: Storage) -> Iterator[Committed]:
    """Yield the committed checkpoints that are not marked as damaged: highest step first, then newest world."""
    damaged = marked(storage)
    return (checkpoint for checkpoint in with_manifest(storage) if checkpoint not in damaged)


def with_manifest(storage: Storage) -> Iterator[Committed]:
    """Yield all committed checkpoints, marked or not: highest step first, then newest world."""
    for step in reversed(patiently(steps_with_attempts, storage)):
        for attempt in patiently(attempts, storage, step):
            folder = attempt_folder(step, attempt)
            if patiently(storage.exists, f"{folder}/{MANIFEST}"):
                yield Committed(step, attempt)


def read_manifest(storage: Storage, checkpoint: Committed) -> Manifest:
    """Read and validate the manifest of a committed checkpoint.

    Raises:
        DamagedCheckpoint: its bytes are not those that were written.
        CheckpointError: it is missing, or of a newer format.
    """
    where = f"{checkpoint.folder}/{MANIFEST}"
    try:
        data = patiently(storage.read, where, 0, MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        raise CheckpointError(f"{where} is missing") from error
    manifest = parse_manifest(data, where)
    if manifest.step != checkpoint.step:
        raise DamagedCheckpoint(f"{where} is of step {manifest.step}")
    return manifest


def missing_objects(storage: Storage, folder: str, manifest: Manifest) -> Iterator[tuple[str, int | None, int]]:
    """Yield the objects of a checkpoint that are missing or too short: (path, size or None, least size), in bytes."""
    sizes: dict[str, dict[str, int]] = {}
    for path, least in sorted(manifest.objects(folder).items()):
        where, _, name = path.rpartition("/")
        if where not in sizes:
            sizes[where] = patiently(storage.sizes, where)
        size = sizes[where].get(name)
        if size is None:
            with contextlib.suppress(FileNotFoundError):  # the object may be newer than the listing
                size = patiently(storage.size, path)
        if size is None or size < least:
            yield path, size, least


# ---- marks ---------------------------------------------------------------------------------------------------------


def marked(storage: Storage) -> set[Committed]:
    """Return the checkpoints that are marked as damaged; nothing loads or counts them."""
    found = set()
    for name in patiently(storage.names, MARKS):
        match = _MARK.match(name)
        step = parse_step(match[1]) if match else None
        if match and step is not None and ATTEMPT.match(match[2]):
            found.add(Committed(step, match[2]))
    return found


def mark(storage: Storage, checkpoint: Committed, problem: str) -> None:
    """Mark a checkpoint as damaged. Its objects stay, since other checkpoints may refer to some of them."""
    with contextlib.suppress(FileExistsError):
        patiently(storage.create, _mark(checkpoint), json.dumps({"problem": problem, "time": time.time()}).encode())


def unmark(storage: Storage, checkpoint: Committed) -> None:
    """Remove the mark of a checkpoint that is whole again or was removed."""
    patiently(storage.remove, _mark(checkpoint))


def problem_of(storage: Storage, checkpoint: Committed) -> str:
    """Return why a checkpoint was marked."""
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # a foreign or damaged mark
        return str(json.loads(patiently(storage.read, _mark(checkpoint)))["problem"])
    return "was found damaged"


def refuse_to_begin_anew(storage: Storage) -> None:
    """Refuse a fresh start where damaged checkpoints are left: it would lose them without a word.

    Raises:
        CheckpointError: all checkpoints that there are were found damaged.
    """
    damaged = marked(storage)
    left = next((checkpoint for checkpoint in with_manifest(storage) if checkpoint in damaged), None)
    if left is not None:
        raise CheckpointError(
            f"no committed checkpoint can be loaded; the newest problem: {problem_of(storage, left)}; restore that "
            f"object from a copy and give `elastic checkpoints verify {storage.url}`, or remove what is damaged with "
            f"`elastic checkpoints prune {storage.url} --yes` to begin anew"
        )


def _mark(checkpoint: Committed) -> str:
    return f"{MARKS}/{step_folder(checkpoint.step).rpartition('/')[2]}.{checkpoint.attempt}.json"
