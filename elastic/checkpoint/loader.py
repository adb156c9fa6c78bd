"""Loading: reads exactly the wanted bytes, many requests at a time, into their destination, and verifies every
block."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from elastic.checkpoint.blocks import Partial, hash_pieces, unproven
from elastic.checkpoint.chunks import find_chunks
from elastic.checkpoint.downloads import RangeReader
from elastic.checkpoint.format import Manifest, TensorEntry, pack_path
from elastic.checkpoint.plan import BlockPart, Read, plan_load, plan_reads, read_bytes, read_limit, wanted_bytes
from elastic.checkpoint.reader import missing_objects
from elastic.checkpoint.tensors import DTYPES, Shard, dtype_name
from elastic.errors import CheckpointError, DamagedCheckpoint
from elastic.storage import Storage

IN_FLIGHT = 32
STAGED_BYTES = 256 << 20  # host memory at a time, for boxes that cannot be read straight into their destination


@dataclass
class LoadReport:
    """What a load took.

    Args:
        wanted_bytes: of the boxes that were asked for.
        read_bytes: that were requested.
        refetched: the blocks ("object@start") that had to be read twice.
        partials: checksums of parts of blocks, for `unproven`, together with those of the ranks that read the other
            parts.
    """

    wanted_bytes: int = 0
    read_bytes: int = 0
    requests: int = 0
    refetched: list[str] = field(default_factory=list)
    partials: list[Partial] = field(default_factory=list)


def load(
    storage: Storage,
    folder: str,
    manifest: Manifest,
    shards: Sequence[Shard],
    *,
    convert: bool = False,
    alone: bool = True,
    in_flight: int = IN_FLIGHT,
) -> LoadReport:
    """Fill the shards' tensors from the checkpoint in `folder`.

    A block of which only a part is wanted cannot be verified by itself. Such a block is read whole if `alone`. If not,
    only the part is read, and all readers' partials together tell whether the bytes are those that were written (see
    `load_together`).

    Args:
        convert: let a destination have another dtype than the saved tensor.
        in_flight: requests at a time.

    Raises:
        CheckpointError: a tensor is missing or has another shape or dtype.
        DamagedCheckpoint: the bytes of a block are not those that were written.
    """
    report = LoadReport()
    for shard in shards:
        _check(folder, manifest.tensors.get(shard.name), shard, convert)
    tensors = find_chunks(storage, folder, manifest, [shard.wanted for shard in shards])
    reader = RangeReader(storage)
    try:
        with ThreadPoolExecutor(in_flight, "checkpoint-read") as pool:
            for batch in _batches(tensors, shards):
                _Batch(reader, pool, in_flight, folder, tensors, batch, alone, report).run()
    finally:
        reader.close()
    return report


def fill(storage: Storage, entries: Mapping[str, TensorEntry], shards: Sequence[Shard]) -> LoadReport:
    """Fill the shards from objects without checksums, converting dtypes.

    Args:
        entries: by name; their packs are paths from the root of the storage.

    Raises:
        CheckpointError: a tensor has another shape, or an object is missing or short.
    """
    report = LoadReport()
    for shard in shards:
        _check(storage.url, entries.get(shard.name), shard, True)
    reader = RangeReader(storage)
    try:
        with ThreadPoolExecutor(IN_FLIGHT, "initial-read") as pool:
            for batch in _batches(entries, shards):
                _Batch(reader, pool, IN_FLIGHT, "", entries, batch, False, report, proven=False).run()
    finally:
        reader.close()
    return report


def load_together(
    storage: Storage,
    folder: str,
    manifest: Manifest,
    shards: Sequence[Shard],
    gather: Callable[[Any], list[Any]],
    *,
    convert: bool = False,
    in_flight: int = IN_FLIGHT,
) -> LoadReport:
    """Load like `load`, on all ranks of a world, which want different boxes: no byte is read twice, and every block is
    verified.

    Args:
        gather: a collective that takes a JSON value and returns those of all ranks.

    Raises:
        CheckpointError: on all ranks, if one of them could not load.
    """
    report, problem = LoadReport(), None
    try:
        report = load(storage, folder, manifest, shards, convert=convert, alone=False, in_flight=in_flight)
    except CheckpointError as error:
        problem = error_json(error)
    everyone = gather([problem, [p.to_json() for p in report.partials]])
    bad = unproven(Partial.from_json(raw) for _, partials in everyone for raw in partials)
    if bad and not any(found for found, _ in everyone):
        tensors = find_chunks(storage, folder, manifest, [shard.wanted for shard in shards])
        mine = [s for s in shards if _touches(tensors, folder, s, bad)]
        # Read whole blocks now, each verified by itself. That finds the damage, unless the bytes were damaged on their
        # way.
        try:
            again = load(storage, folder, manifest, mine, convert=convert, in_flight=in_flight)
            report.refetched += [f"{where}@{start}" for where, start in sorted(bad)] + again.refetched
            report.read_bytes += again.read_bytes
            report.requests += again.requests
        except CheckpointError as error:
            problem = error_json(error)
        everyone = gather([problem, []])
    raise_first(found for found, _ in everyone)
    return report


def error_json(error: CheckpointError) -> list[Any]:
    """Return an error as JSON, as all ranks gather it."""
    return [str(error), isinstance(error, DamagedCheckpoint)]


def raise_first(told_by_all: Iterable[list[Any] | None]) -> None:
    """Raise the first error that a rank told; damage goes before errors of another kind, which other ranks may not
    have."""
    problems = sorted((found for found in told_by_all if found), key=lambda found: not found[1])
    if problems:
        text, damaged = problems[0]
        raise DamagedCheckpoint(text) if damaged else CheckpointError(text)


def load_all(
    storage: Storage, folder: str, manifest: Manifest, names: Sequence[str] | None = None
) -> dict[str, torch.Tensor]:
    """Load whole tensors to the CPU, by name: all, or those named.

    Raises:
        CheckpointError: as `load`; objects that are too short are found before memory is taken.
    """
    chosen = {name: manifest.tensors[name] for name in (manifest.tensors if names is None else names)}
    check_objects(storage, folder, replace(manifest, tensors=chosen))
    found = {name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype]) for name, entry in chosen.items()}
    load(storage, folder, manifest, [Shard.whole(name, tensor) for name, tensor in found.items()])
    return found


def check_objects(storage: Storage, folder: str, manifest: Manifest) -> None:
    """Check, before memory is taken for tensors, that all objects of a checkpoint are there and long enough.

    Raises:
        DamagedCheckpoint: one is missing or too short; the message names it and a tensor that needs it.
    """
    for path, size, least in missing_objects(storage, folder, manifest):
        if size is None:
            raise DamagedCheckpoint(f"{path} is missing, which holds {_user(manifest, folder, path, -1)}")
        user = _user(manifest, folder, path, size)
        raise DamagedCheckpoint(f"{path} is too short for {user}: it has {size} of {least} bytes")


def _user(manifest: Manifest, folder: str, path: str, size: int) -> str:
    """Describe what has bytes of an object beyond `size`."""
    for name, entry in manifest.tensors.items():
        if any(pack_path(folder, chunk.pack) == path and chunk.end > size for chunk in entry.chunks):
            return f"the tensor {name!r}"
    placement = manifest.placement
    if placement is not None and path.endswith(".pack"):
        own = placement.packs.get(path.removeprefix(f"{folder}/"))
        first = placement.tensor_in(own) if own is not None else None
        return f"the tensor {first!r}" if first is not None else "a tensor that did not change"
    return "the places of tensors"


def _check(folder: str, entry: TensorEntry | None, shard: Shard, convert: bool) -> None:
    if entry is None:
        raise CheckpointError(f"the checkpoint in {folder} has no tensor {shard.name!r}")
    mine = dtype_name(shard.name, shard.tensor)
    if entry.shape != tuple(shard.shape) or (entry.dtype != mine and not convert):
        fix = "give --checkpoint.convert" if entry.shape == tuple(shard.shape) else "use the code that saved it"
        raise CheckpointError(
            f"the saved {shard.name} is {entry.dtype} {entry.shape}, this one is {mine} {tuple(shard.shape)}; start "
            f"another run, or {fix}"
        )


def _touches(tensors: Mapping[str, TensorEntry], folder: str, shard: Shard, blocks: set[tuple[str, int]]) -> bool:
    return any((p.object, p.start) in blocks for p in plan_load(tensors, folder, [shard.wanted]))


def _direct(entry: TensorEntry, tensor: torch.Tensor) -> bool:
    """Whether bytes can be read straight into the tensor."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dtype == DTYPES[entry.dtype]


def _batches(tensors: Mapping[str, TensorEntry], shards: Sequence[Shard]) -> list[list[Shard]]:
    """Group the shards that are read together: all that need no staging, and STAGED_BYTES at a time of the others."""
    direct = [s for s in shards if _direct(tensors[s.name], s.tensor)]
    batches, room = [direct], 0
    for shard in (s for s in shards if not _direct(tensors[s.name], s.tensor)):
        size = shard.box.volume * DTYPES[tensors[shard.name].dtype].itemsize
        if room < size or len(batches) == 1:
            batches.append([])
            room = STAGED_BYTES
        batches[-1].append(shard)
        room -= size
    return [b for b in batches if b]


class _Batch:
    """Reads that run at the same time. Each block is verified when its last byte is there."""

    def __init__(
        self,
        reader: RangeReader,
        pool: ThreadPoolExecutor,
        in_flight: int,
        folder: str,
        tensors: Mapping[str, TensorEntry],
        shards: Sequence[Shard],
        alone: bool,
        report: LoadReport,
        *,
        proven: bool = True,
    ):
        self._reader, self._pool, self._report, self._proven = reader, pool, report, proven
        self._in_flight = in_flight
        wanted = [s.wanted for s in shards]
        self._shards = shards
        self._homes: list[torch.Tensor] = [  # each box: contiguous, on the CPU, in the saved dtype
            s.tensor.detach()
            if _direct(tensors[s.name], s.tensor)
            else torch.empty(s.tensor.shape, dtype=DTYPES[tensors[s.name].dtype])
            for s in shards
        ]
        self._views = [_memory(home) for home in self._homes]
        self._parts = plan_load(tensors, folder, wanted)
        # Without a crc32 (format 1) or without other readers, a part of a block is verified by reading the whole block.
        self._scratch = [p for p in self._parts if proven and not p.whole and (alone or p.crc is None)]
        lone = {id(p) for p in self._scratch}
        self._others = [p for p in self._parts if id(p) not in lone]
        self._missing = [sum(s.length for s in p.segments) for p in self._others]
        self._lock = threading.Lock()
        report.wanted_bytes += wanted_bytes(tensors, wanted)

    def run(self) -> None:
        """Read and verify everything, then copy what was staged to its destination."""
        reads = plan_reads(self._others, read_limit(self._others, self._in_flight))
        jobs = [self._pool.submit(self._read, read) for read in reads]
        jobs += [self._pool.submit(self._read_whole, part) for part in self._scratch]
        self._report.read_bytes += read_bytes(reads) + sum(p.end - p.start for p in self._scratch)
        self._report.requests += len(jobs)
        problem: BaseException | None = None
        for job in jobs:
            try:
                job.result()
            except BaseException as error:
                problem = problem or error
                for other in jobs:
                    other.cancel()
        if problem is not None:
            raise problem
        with torch.no_grad():
            for shard, home in zip(self._shards, self._homes):
                if home.data_ptr() != shard.tensor.data_ptr():
                    shard.tensor.copy_(home)

    def _view(self, wanted: int, at: int, length: int) -> memoryview:
        return self._views[wanted][at : at + length]

    def _read(self, read: Read) -> None:
        views = [self._view(s.wanted, s.at, s.length) for _, s in read.segments]
        self._fetch(self._others[read.segments[0][0]], read.object, read.start, views)
        for index, segment in read.segments:
            with self._lock:
                self._missing[index] -= segment.length
                complete = not self._missing[index]
            if complete and self._proven:
                self._prove(self._others[index])

    def _prove(self, part: BlockPart) -> None:
        views = [self._view(s.wanted, s.at, s.length) for s in part.segments]
        if not part.whole:
            assert part.crc is not None
            self._report.partials += [
                Partial(part.object, (part.start, part.end), part.crc, s.start, s.start + s.length, zlib.crc32(view))
                for s, view in zip(part.segments, views)
            ]
            return
        for attempt in range(2):
            if hash_pieces(_in_order(part, views)) == part.xxh3:
                return
            if attempt == 0:
                self._note(part)
                for segment, view in zip(part.segments, views):
                    self._fetch(part, part.object, segment.start, [view])
        raise _damaged(part)

    def _read_whole(self, part: BlockPart) -> None:
        block = memoryview(bytearray(part.end - part.start))
        for attempt in range(2):
            self._fetch(part, part.object, part.start, [block])
            if hash_pieces([block]) == part.xxh3:
                for s in part.segments:
                    self._view(s.wanted, s.at, s.length)[:] = block[s.start - part.start :][: s.length]
                return
            if attempt == 0:
                self._note(part)
        raise _damaged(part)

    def _note(self, part: BlockPart) -> None:
        self._report.refetched.append(f"{part.object}@{part.start}")

    def _fetch(self, part: BlockPart, path: str, start: int, views: list[memoryview]) -> None:
        try:
            self._reader.read(path, start, views)
        except DamagedCheckpoint as error:
            raise DamagedCheckpoint(f"{error} (tensor {part.name!r})") from error


def _in_order(part: BlockPart, views: Sequence[memoryview]) -> list[memoryview]:
    """Return the block's bytes once each, although several boxes may want them."""
    found, at = [], part.start
    for segment, view in zip(part.segments, views):
        if segment.start + segment.length > at:
            found.append(view[at - segment.start :])
            at = segment.start + segment.length
    return found


def _damaged(part: BlockPart) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        f"{part.object} has other bytes than were written, in the block at {part.start} (tensor {part.name!r})"
    )


def _memory(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(b"")
