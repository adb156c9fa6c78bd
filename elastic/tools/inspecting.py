"""Inspects the checkpoints of a run: lists them, describes one, and verifies every byte.

It needs no model, and no torch.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import xxhash

from elastic.checkpoint import format
from elastic.checkpoint.chunks import all_chunks, unreadable
from elastic.checkpoint.downloads import RangeReader
from elastic.checkpoint.families import index_name
from elastic.checkpoint.format import ATTEMPT, MANIFEST, Manifest, TensorEntry, pack_path
from elastic.checkpoint.patience import patiently
from elastic.checkpoint.reader import (
    Committed,
    attempts,
    marked,
    missing_objects,
    problem_of,
    read_manifest,
    steps_with_attempts,
    with_manifest,
)
from elastic.checkpoint.retention import pins
from elastic.errors import CheckpointError
from elastic.storage import Storage

IN_FLIGHT = 16


@dataclass(frozen=True)
class Listed:
    """A committed checkpoint in a list.

    Args:
        bytes: of its tensors.
        age_s: seconds since it was committed.
        state: "complete", "damaged" or "verified".
        problem: what is wrong with it.
    """

    step: int
    generation: str
    attempt: str
    bytes: int
    age_s: float
    pinned: bool
    state: str
    problem: str = ""


@dataclass(frozen=True)
class Damage:
    """One fault of a checkpoint: the object, and the bytes [start, end) if one block of it is wrong."""

    step: int
    attempt: str
    object: str
    problem: str
    start: int | None = None
    end: int | None = None
    tensor: str | None = None

    def __str__(self) -> str:
        block = "" if self.start is None else f", block at {self.start} to {self.end}"
        tensor = "" if self.tensor is None else f" (tensor {self.tensor!r})"
        return f"step {self.step}, attempt {self.attempt}: {self.object}{block}: {self.problem}{tensor}"


@dataclass(frozen=True)
class Verified:
    """What was read, and the faults that were found."""

    checkpoints: int
    blocks: int
    bytes: int
    damages: tuple[Damage, ...]


@dataclass(frozen=True)
class _Block:
    object: str
    start: int
    end: int
    xxh3: str
    crc: int | None


def generation_of(attempt: str) -> str:
    """Return the generation of the world that an attempt belongs to, from its name."""
    match = ATTEMPT.match(attempt)
    assert match is not None
    return f"{match[1]}-{match[2]}"


def list_checkpoints(storage: Storage) -> list[Listed]:
    """List all committed checkpoints, newest first, and check that their objects are there and long enough.

    Those that a live run prunes meanwhile are left out. Those that are marked as damaged are listed, with the reason.
    """
    pinned, marks, now = pins(storage), marked(storage), time.time()

    def look(checkpoint: Committed) -> Listed | None:
        manifest, found = _outside(storage, checkpoint)
        problem = f"{found[0].object}: {found[0].problem}" if found else ""
        if checkpoint in marks:
            problem = problem_of(storage, checkpoint)
        try:
            modified = patiently(storage.modified, f"{checkpoint.folder}/{MANIFEST}")
        except FileNotFoundError:
            return None
        return Listed(
            checkpoint.step,
            generation_of(checkpoint.attempt),
            checkpoint.attempt,
            manifest.nbytes if manifest else 0,
            round(now - modified, 1),
            checkpoint.step in pinned,
            "damaged" if problem else "complete",
            problem,
        )

    with ThreadPoolExecutor(IN_FLIGHT, "list") as pool:
        return [found for found in pool.map(look, with_manifest(storage)) if found is not None]


def unfinished(storage: Storage) -> list[str]:
    """Return the folders of attempts that are not committed."""
    committed = set(with_manifest(storage))
    found = [Committed(s, a) for s in steps_with_attempts(storage) for a in attempts(storage, s)]
    return [c.folder for c in found if c not in committed]


def describe(storage: Storage, checkpoint: Committed) -> dict[str, Any]:
    """Return everything that a manifest says, without checksums.

    Raises:
        CheckpointError: it cannot be read.
    """
    manifest = read_manifest(storage, checkpoint)
    found = all_chunks(storage, checkpoint.folder, manifest)
    tensors = {
        name: {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "bytes": entry.nbytes,
            "chunks": [
                {
                    "offsets": list(c.offsets),
                    "sizes": list(c.sizes),
                    "object": pack_path(checkpoint.folder, c.pack),
                    "start": c.start,
                    "end": c.end,
                }
                for c in entry.chunks
            ],
        }
        for name, entry in sorted(found.items())
    }
    head = {"attempt": checkpoint.attempt, "folder": checkpoint.folder, "bytes": manifest.nbytes}
    return {**head, **manifest.head, "tensors": tensors}


# ---- verifying -----------------------------------------------------------------------------------------------------


def verify(
    storage: Storage,
    checkpoints: Sequence[Committed],
    on_total: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None,
) -> Verified:
    """Read every block that the checkpoints refer to, once each, and compare it with its checksums.

    A wrong block is read a second time before it is called damaged. A checkpoint that a live run prunes meanwhile is
    not damaged.

    Args:
        on_total: called with the bytes that will be read; returns a function that is called with each amount of bytes
            read.
    """
    damages: list[Damage] = []
    users: dict[_Block, dict[Committed, str]] = {}
    for checkpoint in checkpoints:
        manifest, found = _outside(storage, checkpoint)
        damages += found
        lost = {d.object for d in found}
        for name, entry in sorted(_chunks(storage, checkpoint, manifest, lost, damages).items()) if manifest else ():
            for chunk in entry.chunks:
                path = pack_path(checkpoint.folder, chunk.pack)
                for number, xxh3 in enumerate(chunk.hashes) if path not in lost else ():
                    start = chunk.start + number * format.BLOCK_BYTES
                    end = min(start + format.BLOCK_BYTES, chunk.end)
                    crc = chunk.crcs[number] if chunk.crcs else None
                    users.setdefault(_Block(path, start, end, xxh3, crc), {}).setdefault(checkpoint, name)
    on_bytes = on_total(sum(b.end - b.start for b in users))
    lock, reader = threading.Lock(), RangeReader(storage)

    def look(block: _Block) -> str | None:
        problem = _problem(reader, block) and _problem(reader, block)
        with lock:
            on_bytes(block.end - block.start)
        return problem

    blocks = sorted(users, key=lambda b: (b.object, b.start))
    try:
        with ThreadPoolExecutor(IN_FLIGHT, "verify") as pool:
            try:
                problems = list(pool.map(look, blocks))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        reader.close()
    for block, problem in zip(blocks, problems, strict=True):
        for checkpoint, name in users[block].items() if problem else ():
            at = (block.object, str(problem), block.start, block.end, name)
            damages.append(Damage(checkpoint.step, checkpoint.attempt, *at))
    damaged = {Committed(d.step, d.attempt) for d in damages}
    pruned = {c for c in damaged if not patiently(storage.exists, f"{c.folder}/{MANIFEST}")}
    damages = [d for d in damages if Committed(d.step, d.attempt) not in pruned]
    total = sum(b.end - b.start for b in blocks)
    return Verified(len(checkpoints) - len(pruned), len(blocks), total, tuple(damages))


def _outside(storage: Storage, checkpoint: Committed) -> tuple[Manifest | None, list[Damage]]:
    """Read a manifest, and find what is wrong with it or with the presence and length of its objects."""

    def damage(name: str, problem: str) -> Damage:
        return Damage(checkpoint.step, checkpoint.attempt, name, problem)

    where = f"{checkpoint.folder}/{MANIFEST}"
    try:
        manifest = read_manifest(storage, checkpoint)
    except CheckpointError as error:
        return None, [damage(where, str(error).removeprefix(where).lstrip(": "))]
    found = []
    world = manifest.world.get("generation")
    if world is not None and world != generation_of(checkpoint.attempt):
        found.append(damage(where, f"it is of world {world}: moved here from another attempt"))
    for path, there, least in missing_objects(storage, checkpoint.folder, manifest):
        found.append(damage(path, "is missing" if there is None else f"has {there} bytes of at least {least}"))
    return manifest, found


def _chunks(
    storage: Storage, checkpoint: Committed, manifest: Manifest, lost: Collection[str], damages: list[Damage]
) -> Mapping[str, TensorEntry]:
    """Return all tensors with their chunks, as far as these are known, and add the damage of indexes that are not in
    `lost`."""
    problems = unreadable(storage, checkpoint.folder, manifest)
    for pack, problem in problems.items():
        path = f"{checkpoint.folder}/{index_name(pack)}"
        if path not in lost:
            said = problem.removeprefix(path).lstrip(": ")
            damages.append(Damage(checkpoint.step, checkpoint.attempt, path, said))
    return all_chunks(storage, checkpoint.folder, manifest, skip=problems)


def _problem(reader: RangeReader, block: _Block) -> str | None:
    data = memoryview(bytearray(block.end - block.start))
    try:
        reader.read(block.object, block.start, [data])
    except CheckpointError as error:
        return str(error).removeprefix(block.object).strip()
    if xxhash.xxh3_128_hexdigest(data) != block.xxh3 or (block.crc is not None and zlib.crc32(data) != block.crc):
        return "has other bytes than were written"
    return None
