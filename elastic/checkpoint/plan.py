"""Which rank writes which bytes of a checkpoint, and which byte ranges a reader needs. Pure: no tensors, no files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.checkpoint import format
from elastic.checkpoint.families import Family, Point, Stretch, Ways, share_point
from elastic.checkpoint.fields import ITEM_BYTES, check_name
from elastic.checkpoint.format import TensorEntry, pack_path
from elastic.errors import CheckpointError
from elastic.placement import Box, Pieces, copies, cut_box

ALIGNMENT = 64
SPLIT_BYTES = 1 << 20  # larger boxes are written by all replicas together, smaller ones by one of them
READ_BYTES = 16 << 20
# what a connection carries while it waits for a first byte: smaller requests would only wait more often
LEAST_READ_BYTES = 2 << 20


@dataclass(frozen=True)
class Held:
    """A box of a tensor that a rank holds, as one of `replicas` ranks that hold the same list of boxes.

    Args:
        shape: of the whole tensor.
        replica: the index of this rank among those ranks.
        cut: how the box is cut out of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    replica: int = 0
    replicas: int = 1
    cut: Pieces = ()

    @property
    def nbytes(self) -> int:
        """The bytes of the box."""
        return self.box.volume * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Write:
    """A box that this rank writes: a piece of the held box with the index `source`, to bytes `[start, end)` of its
    pack."""

    source: int
    box: Box
    start: int
    end: int


@dataclass(frozen=True)
class Line:
    """The boxes of one family that a rank holds, and the stretch of them that it writes.

    A family is the tensors that are sharded in the same way. All ranks that share a line compute the same line, so they
    exchange no message.

    Args:
        members: indices of the held boxes, in the order of tensor names.
        ways: (dimension, number of shards) of each cut.
        part: the index of this rank's part among all parts of the family.
        replica: the index of this rank among the ranks that hold the same part.
        first, last: where the stretch begins and ends.
    """

    members: tuple[int, ...]
    ways: Ways
    part: int
    replica: int
    first: Point
    last: Point

    def stretch(self) -> Stretch:
        """The stretch that this rank writes, as the manifest describes it."""
        return Stretch(0, self.part, self.first, self.last)

    def family(self, held: Sequence[Held]) -> Family:
        """The family, with the dtype and global shape of each tensor."""
        return Family(self.ways, {held[i].name: (held[i].dtype, held[i].shape) for i in self.members})


def plan_lines(held: Sequence[Held]) -> list[Line]:
    """Sort the boxes that a rank holds into families, and choose which stretch of each this rank writes.

    Raises:
        CheckpointError: an invalid or repeated name, or a box that lies outside of its tensor.
    """
    groups: dict[tuple[Pieces, int, int], list[int]] = {}
    for i, h in enumerate(held):
        check_name(h.name)
        if not h.box.is_in(h.shape):
            raise CheckpointError(f"tensor {h.name!r} of shape {h.shape} has no box {h.box}")
        if h.box.volume and h.box != cut_box(h.shape, h.cut):
            raise CheckpointError(f"tensor {h.name!r} of shape {h.shape}, cut as {h.cut}, has not the box {h.box}")
        groups.setdefault((h.cut, h.replica, h.replicas), []).append(i)
    lines = []
    for (cut, replica, replicas), numbers in groups.items():
        numbers.sort(key=lambda i: held[i].name)
        for one, other in itertools.pairwise(numbers):
            if held[one].name == held[other].name:
                raise CheckpointError(f"tensor {held[one].name!r} is there twice")
        sizes = [held[i].nbytes for i in numbers]
        rows = [_rows(held[i].box, size) for i, size in zip(numbers, sizes)]
        first, last = (share_point(rows, sizes, r, replicas) for r in (replica, replica + 1))
        part = 0
        for _, index, count in cut:
            part = part * count + index
        ways = tuple((dimension, count) for dimension, _, count in cut)
        lines.append(Line(tuple(numbers), ways, part, replica, first, last))
    return lines


def plan_save(
    held: Sequence[Held], last: Callable[[int, Box], bool] | None = None, lines: Sequence[Line] | None = None
) -> list[Write]:
    """Plan what one rank writes, and where in its pack.

    Boxes that several ranks hold are written once: their bytes, in the order of names, are cut into as many equal
    stretches as there are replicas, at rows. That takes no message, since all replicas cut alike.

    The pack has no gaps, so that neighbours are read with one request. Boxes whose bytes are a multiple of 64 come
    first, at multiples of 64; the others follow, sorted by the size of their elements, at multiples of it. Boxes at the
    end may lie anywhere.

    Args:
        last: returns whether a piece (index of the held box, box) is to lie at the end of the pack.
        lines: those of `plan_lines`, if they are known already.

    Raises:
        CheckpointError: as `plan_lines`.
    """
    mine = []
    for line in plan_lines(held) if lines is None else lines:
        stretch = line.stretch()
        for tensor in range(line.first[0], min(line.last[0] + 1, len(line.members))):
            source = line.members[tensor]
            piece = stretch.piece(held[source].box, tensor)
            mine += [(source, piece)] if piece is not None else []

    def place(item: tuple[int, Box]) -> tuple[bool, int, str, tuple[int, ...]]:
        h, box = held[item[0]], item[1]
        item_bytes = ITEM_BYTES[h.dtype]
        aligned = box.volume * item_bytes % ALIGNMENT == 0
        return last is not None and last(*item), 0 if aligned else 1 + ALIGNMENT - item_bytes, h.name, box.offsets

    writes, at = [], 0
    for source, box in sorted(mine, key=place):
        end = at + box.volume * ITEM_BYTES[held[source].dtype]
        writes.append(Write(source, box, at, end))
        at = end
    return writes


def numbers_of(lines: Sequence[Line], writes: Sequence[Write]) -> list[int]:
    """Return the number of each write's tensor among the tensors of all lines: the index of a pack counts them so."""
    number = {source: n for n, source in enumerate(i for line in lines for i in line.members)}
    return [number[write.source] for write in writes]


def statement(
    pack: str,
    index: Sequence[Any],
    used: Mapping[str, Sequence[int]],
    lines: Sequence[Line],
    held: Sequence[Held],
) -> dict[str, Any]:
    """Return what a rank tells the keeper about its pack, as JSON. The first rank of each family lists its tensors.

    Args:
        index: [size, hash] of the pack's index.
        used: [bytes, end] of each pack that the index names.
    """
    families = [line.family(held) for line in lines]
    return {
        "pack": pack,
        "bytes": used.get(pack, (0, 0))[0],
        "index": list(index),
        "families": [f.to_json() for f, line in zip(families, lines) if not line.part and not line.replica],
        "stretches": [[f.digest, *line.stretch().to_json()[1:]] for f, line in zip(families, lines)],
        "elsewhere": {path: list(found) for path, found in used.items() if path != pack},
    }


def _rows(box: Box, size: int) -> int:
    """Return into how many pieces a box can be cut: the rows of its first dimension that has several, or 1."""
    return box.sizes[box.divided] if size >= SPLIT_BYTES and box.sizes else 1


# ---- loading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wanted:
    """A box of a tensor that a reader wants."""

    name: str
    box: Box


@dataclass(frozen=True)
class Segment:
    """Bytes `[start, start + length)` of an object.

    Args:
        wanted: the index of the wanted box that they belong to.
        at: the first of these bytes within that box.
    """

    start: int
    length: int
    wanted: int
    at: int


@dataclass(frozen=True)
class BlockPart:
    """What a reader needs of one block of one object, and the checksums of the whole block."""

    object: str
    start: int
    end: int
    name: str
    xxh3: str
    crc: int | None
    segments: tuple[Segment, ...]

    @property
    def whole(self) -> bool:
        """Whether the reader needs the whole block."""
        at = self.start
        for segment in self.segments:
            if segment.start > at:
                return False
            at = max(at, segment.start + segment.length)
        return at == self.end


@dataclass(frozen=True)
class Read:
    """One request: bytes `[start, end)` of an object.

    Args:
        segments: (index of the part, segment of it) for all that the request reads.
    """

    object: str
    start: int
    end: int
    segments: tuple[tuple[int, Segment], ...]


def plan_load(tensors: Mapping[str, TensorEntry], folder: str, wanted: Sequence[Wanted]) -> list[BlockPart]:
    """Return the parts of blocks that hold the wanted boxes, by object and place.

    Args:
        folder: the folder of the checkpoint, from which its packs are named.

    Raises:
        CheckpointError: a tensor that is not in the checkpoint, or a box that lies outside of it.
    """
    parts: dict[tuple[str, int, int], tuple[BlockPart, list[Segment]]] = {}
    for index, want in enumerate(wanted):
        entry = tensors.get(want.name)
        if entry is None:
            raise CheckpointError(f"the checkpoint in {folder} has no tensor {want.name!r}")
        if not want.box.is_in(entry.shape):
            raise CheckpointError(f"tensor {want.name!r} has the shape {entry.shape}, not a box {want.box}")
        item = ITEM_BYTES[entry.dtype]
        for chunk in entry.chunks:
            path = pack_path(folder, chunk.pack)
            for source, target, count in copies(chunk.box, want.box):
                for number, segment in _by_block(chunk.start, source * item, count * item, index, target * item):
                    begin = chunk.start + number * format.BLOCK_BYTES
                    key = (path, begin, min(begin + format.BLOCK_BYTES, chunk.end))
                    if key not in parts:
                        crc = chunk.crcs[number] if chunk.crcs else None
                        parts[key] = (BlockPart(*key, want.name, chunk.hashes[number], crc, ()), [])
                    parts[key][1].append(segment)
    return [
        BlockPart(p.object, p.start, p.end, p.name, p.xxh3, p.crc, tuple(sorted(s, key=lambda s: s.start)))
        for _, (p, s) in sorted(parts.items())
    ]


def _by_block(base: int, offset: int, length: int, wanted: int, at: int) -> Iterator[tuple[int, Segment]]:
    """Cut the bytes `[offset, offset + length)` of a chunk at its blocks."""
    while length:
        number, inside = divmod(offset, format.BLOCK_BYTES)
        step = min(length, format.BLOCK_BYTES - inside)
        yield number, Segment(base + offset, step, wanted, at)
        offset, at, length = offset + step, at + step, length - step


def read_limit(parts: Sequence[BlockPart], in_flight: int) -> int:
    """Return the most bytes of a request: few enough that all `in_flight` have work, from LEAST_READ_BYTES to
    READ_BYTES."""
    total = sum(s.length for p in parts for s in p.segments)
    return min(READ_BYTES, max(LEAST_READ_BYTES, -(-total // in_flight)))


def plan_reads(parts: Sequence[BlockPart], limit: int = READ_BYTES) -> list[Read]:
    """Plan the requests for all segments: neighbours are read together, in equal pieces of at most `limit` bytes.

    A byte that several wanted boxes need is requested once for each of them.
    """
    order = sorted(
        ((i, s) for i, part in enumerate(parts) for s in part.segments),
        key=lambda c: (parts[c[0]].object, c[1].start, c[1].length, c[1].wanted, c[1].at),
    )
    runs: list[list[tuple[int, Segment]]] = []
    path, end = "", -1
    for i, segment in order:
        if parts[i].object != path or segment.start != end:
            runs.append([])
        runs[-1].append((i, segment))
        path, end = parts[i].object, segment.start + segment.length
    return [read for run in runs for read in _cut(parts[run[0][0]].object, run, limit)]


def _cut(path: str, run: list[tuple[int, Segment]], limit: int) -> Iterator[Read]:
    """Cut a run of adjacent segments into requests of equal size."""
    start = run[0][1].start
    length = run[-1][1].start + run[-1][1].length - start
    count = -(-length // limit)
    at = 0
    for n in range(count):
        first, last = start + length * n // count, start + length * (n + 1) // count
        found = []
        while at < len(run):
            i, segment = run[at]
            low, high = max(first, segment.start), min(last, segment.start + segment.length)
            found.append((i, Segment(low, high - low, segment.wanted, segment.at + low - segment.start)))
            if high < segment.start + segment.length:
                break
            at += 1
            if high == last:
                break
        yield Read(path, first, last, tuple(found))


def read_bytes(reads: Sequence[Read]) -> int:
    """Return the bytes that these requests ask for."""
    return sum(r.end - r.start for r in reads)


def wanted_bytes(tensors: Mapping[str, TensorEntry], wanted: Sequence[Wanted]) -> int:
    """Return the bytes of the wanted boxes."""
    return sum(math.prod(w.box.sizes) * ITEM_BYTES[tensors[w.name].dtype] for w in wanted)
