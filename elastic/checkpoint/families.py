"""Which pack has what of a tensor, computed from its shape: a manifest does not list it. Pure.

Tensors that are cut alike and that the same ranks hold are a family. Its cut divides each tensor into parts, along one
dimension after another, as torch.chunk does. The ranks that hold the same part share its writing: the part's boxes, in
the order of names, are one line of rows, and each of those ranks has a stretch of it. So a few numbers for each pack
say all, however many tensors there are.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import xxhash

from elastic.checkpoint.fields import ITEM_BYTES, Head, head_of, ints, items, members
from elastic.errors import CheckpointError
from elastic.placement import Box, common

#: A place in the line of a part: the number of a tensor, and the row of its box along the first dimension that has
#: several.
Point = tuple[int, int]

#: The dimensions that are cut, one after another, and into how many.
Ways = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Family:
    """Tensors, by name and in the order of names, that are cut alike and held by the same ranks."""

    ways: Ways
    tensors: Mapping[str, Head]

    @property
    def parts(self) -> int:
        return math.prod(count for _, count in self.ways)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    @cached_property
    def digest(self) -> str:
        """Equal for ranks that hold parts of the same tensors, cut alike."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.to_json()).encode())

    def box(self, name: str, part: int) -> Box:
        """Return the box of a tensor that belongs to a part; it may be empty."""
        box, left = Box.whole(self.tensors[name][1]), self.parts
        for dimension, count in self.ways:
            left //= count
            index, part = divmod(part, left)
            box = box.chunk(dimension, index, count)
        return box

    def overlapping(self, name: str, wanted: Box) -> Iterator[tuple[int, Box]]:
        """The parts that share elements with a box of a tensor, and what they have of it."""
        yield from _overlapping(self.ways, 0, Box.whole(self.tensors[name][1]), wanted)

    def to_json(self) -> dict[str, Any]:
        return {
            "cut": [list(way) for way in self.ways],
            "tensors": {n: [d, list(s)] for n, (d, s) in self.tensors.items()},
        }

    @staticmethod
    def of(raw: Any) -> Family:
        """From JSON.

        Raises:
            CheckpointError: tensors that cannot be, or that cannot be cut so.
        """
        ways = tuple((dimension, count) for dimension, count in map(ints, items(raw["cut"])))
        tensors = {name: head_of(name, *items(head)) for name, head in sorted(members(raw["tensors"]).items())}
        if not tensors or any(dimension < 0 or count < 1 for dimension, count in ways):
            raise CheckpointError(f"it has {len(tensors)} tensors that are cut as {str(ways)[:200]}")
        for name, (_, shape) in tensors.items():
            if any(dimension >= len(shape) for dimension, _ in ways):
                raise CheckpointError(f"tensor {name!r} of shape {shape} cannot be cut as {str(ways)[:200]}")
        return Family(ways, tensors)


def _overlapping(ways: Ways, part: int, box: Box, wanted: Box) -> Iterator[tuple[int, Box]]:
    if not ways:
        yield part, box
        return
    (dimension, count), *rest = ways
    size, each = box.sizes[dimension], -(-box.sizes[dimension] // count)
    begin = max(0, wanted.offsets[dimension] - box.offsets[dimension])
    end = min(size, wanted.offsets[dimension] + wanted.sizes[dimension] - box.offsets[dimension])
    for index in range(begin // each, -(-end // each)) if end > begin else ():
        yield from _overlapping(tuple(rest), part * count + index, box.chunk(dimension, index, count), wanted)


@dataclass(frozen=True)
class Stretch:
    """The stretch of a part of a family that one pack has: from one point of the part's line to another."""

    family: int
    part: int
    first: Point
    last: Point

    def piece(self, box: Box, tensor: int) -> Box | None:
        """Return the piece of a tensor that lies in this stretch, or None.

        Args:
            box: the part's box of the tensor.
        """
        if not self.first[0] <= tensor <= self.last[0] or not box.volume:
            return None
        rows = _rows(box)
        begin = self.first[1] if tensor == self.first[0] else 0
        end = self.last[1] if tensor == self.last[0] else rows
        if end - begin == rows:
            return box
        return box.rows(box.divided, begin, end) if end > begin else None

    def to_json(self) -> list[int]:
        return [self.family, self.part, *self.first, *self.last]

    @staticmethod
    def of(raw: Any) -> Stretch:
        family, part, tensor, row, last_tensor, last_row = ints(raw)
        return Stretch(family, part, (tensor, row), (last_tensor, last_row))


def _rows(box: Box | None) -> int:
    """Rows along the first dimension that has several: places at which a box can be cut."""
    if box is None or not box.volume:
        return 0
    return box.sizes[box.divided] if box.sizes else 1


def share_point(rows: Sequence[int], sizes: Sequence[int], replica: int, replicas: int) -> Point:
    """Return the point at which a replica's stretch begins, and that of the replica before it ends.

    The replicas that share a line get equal numbers of bytes.

    Args:
        rows: of each tensor; it may be cut between two rows.
        sizes: bytes of each tensor.
    """
    if replica == replicas:
        return len(sizes), 0
    goal = sum(sizes) * replica // replicas
    if not goal:
        return 0, 0
    at = 0
    for tensor, size in enumerate(sizes):
        if at + size > goal:
            row = (2 * (goal - at) * rows[tensor] + size) // (2 * size)
            return (tensor + 1, 0) if row == rows[tensor] else (tensor, row)
        at += size
    return len(sizes), 0


@dataclass(frozen=True)
class Pack:
    """An object with bytes of tensors.

    Args:
        size: of the object; 0 where there is none.
        index: size and xxh3_128 of the object beside it that says where in it each tensor lies; 0 where it has none.
        elsewhere: objects of earlier checkpoints that have the rest of its stretches: how many bytes, and up to where.
    """

    name: str
    size: int
    index: tuple[int, str]
    stretches: tuple[Stretch, ...]
    elsewhere: Mapping[str, tuple[int, int]]

    @property
    def index_name(self) -> str:
        return index_name(self.name)

    def to_json(self) -> list[Any]:
        refers = {path: list(found) for path, found in sorted(self.elsewhere.items())}
        return [self.size, *self.index, [s.to_json() for s in self.stretches], refers]


def index_name(pack: str) -> str:
    """The object that says where in a pack each tensor lies."""
    return f"{pack.removesuffix('.pack')}.index"


@dataclass(frozen=True)
class Placement:
    """Families and packs of a checkpoint. Packs by name."""

    families: tuple[Family, ...]
    packs: Mapping[str, Pack]

    @cached_property
    def tensors(self) -> dict[str, tuple[int, int]]:
        """The family of each tensor, and its number in it."""
        return {name: (f, i) for f, family in enumerate(self.families) for i, name in enumerate(family.names)}

    @cached_property
    def _lines(self) -> dict[tuple[int, int], list[tuple[Stretch, Pack]]]:
        """The stretches of each part of each family, in order."""
        found: dict[tuple[int, int], list[tuple[Stretch, Pack]]] = {}
        for pack in self.packs.values():
            for stretch in pack.stretches:
                found.setdefault((stretch.family, stretch.part), []).append((stretch, pack))
        for line in found.values():
            line.sort(key=lambda one: (one[0].first, one[0].last))
        return found

    def pieces(self, name: str, wanted: Box | None = None) -> Iterator[tuple[Pack, Box]]:
        """The packs that have elements of a tensor (or of a box of it), and what of it they have."""
        number, tensor = self.tensors[name]
        family = self.families[number]
        for part, box in family.overlapping(name, Box.whole(family.tensors[name][1]) if wanted is None else wanted):
            for stretch, pack in self._lines[number, part]:
                piece = stretch.piece(box, tensor)
                if piece is not None and (wanted is None or common(piece, wanted) is not None):
                    yield pack, piece

    def number_in(self, pack: Pack, name: str) -> int:
        """A tensor's number among those of a pack's stretches, as its index counts them."""
        family, tensor = self.tensors[name]
        before = 0
        for stretch in pack.stretches:
            if stretch.family == family:
                return before + tensor
            before += len(self.families[stretch.family].tensors)
        raise KeyError(name)

    def tensor_in(self, pack: Pack) -> str | None:
        """The first tensor of which a pack has elements."""
        for stretch in pack.stretches:
            family = self.families[stretch.family]
            for i, name in enumerate(family.names):
                if stretch.piece(family.box(name, stretch.part), i) is not None:
                    return name
        return None

    def check(self) -> None:
        """
        Raises:
            CheckpointError: a tensor that is in two families, parts that are not tiled, or more bytes of tensors than
                packs have.
        """
        if len(self.tensors) < sum(len(f.tensors) for f in self.families):
            twice = Counter(name for family in self.families for name in family.names).most_common(1)[0][0]
            raise CheckpointError(f"tensor {twice!r} is not tiled by its chunks: it is in two families")
        written = Counter(family for family, _ in self._lines)
        for number, family in enumerate(self.families):
            if written[number] != family.parts:
                raise CheckpointError(f"tensor {family.names[0]!r} is not tiled by its chunks: it has parts in no pack")
        for (number, part), line in self._lines.items():
            self._check_line(number, part, [stretch for stretch, _ in line])
        self._check_sizes()

    def _check_line(self, number: int, part: int, line: Sequence[Stretch]) -> None:
        if not 0 <= number < len(self.families) or not 0 <= part < self.families[number].parts:
            raise CheckpointError(f"a pack has part {part} of family {number}, which there is not")
        family, at = self.families[number], (0, 0)
        for stretch in line:
            tensor, row = stretch.last
            name = family.names[min(max(at[0], 0), len(family.names) - 1)]
            if stretch.first != at or stretch.last < at or row < 0:
                raise CheckpointError(f"tensor {name!r} is not tiled by its chunks")
            if row and row >= _rows(family.box(family.names[tensor], part) if tensor < len(family.names) else None):
                raise CheckpointError(f"tensor {name!r} is not tiled by its chunks: it has no row {row} to cut at")
            at = stretch.last
        if at != (len(family.names), 0):
            name = family.names[min(at[0], len(family.names) - 1)]
            raise CheckpointError(f"tensor {name!r} is not tiled by its chunks")

    def _check_sizes(self) -> None:
        """A checkpoint takes at most as much memory as storage."""
        used: dict[str, int] = {}
        ends: dict[str, int] = {}
        for pack in self.packs.values():
            for path, (size, end) in pack.elsewhere.items():
                used[path], ends[path] = used.get(path, 0) + size, max(ends.get(path, 0), end)
        for path, size in used.items():
            if size > ends[path]:
                raise CheckpointError(f"its tensors have {size} bytes in the first {ends[path]} of {path}")
        stored = sum(pack.size for pack in self.packs.values()) + sum(used.values())
        promised = sum(math.prod(shape) * ITEM_BYTES[d] for f in self.families for d, shape in f.tensors.values())
        if promised != stored:
            raise CheckpointError(f"its tensors have {promised} bytes, its packs {stored}")

    def to_json(self) -> dict[str, Any]:
        return {
            "families": [family.to_json() for family in self.families],
            "packs": {name: pack.to_json() for name, pack in sorted(self.packs.items())},
        }


def merge(statements: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Families and packs, as JSON, of what all ranks say of their packs.

    Raises:
        CheckpointError: ranks say different things of one tensor.
    """
    statements = list(statements)
    listed: dict[str, Family] = {}
    for said in statements:
        for raw in said["families"]:
            family = Family.of(raw)
            listed[family.digest] = family
    _check_heads(listed.values())
    order = sorted(listed, key=lambda digest: listed[digest].names[0])
    packs = {}
    for said in statements:
        stretches = []
        for digest, *where in said["stretches"]:
            if digest not in listed:
                raise CheckpointError(
                    f"what {said['pack']} has differs from what the other packs have, in names, dtypes, shapes or cuts"
                )
            stretches.append([order.index(digest), *where])
        if said["pack"] in packs:
            names = [listed[digest].names[0] for digest, *_ in said["stretches"]]
            raise CheckpointError(
                f"tensor {(*names, '')[0]!r} is not tiled by its chunks: two ranks wrote {said['pack']}"
            )
        packs[said["pack"]] = [said["bytes"], *said["index"], stretches, said["elsewhere"]]
    return {"families": [listed[digest].to_json() for digest in order], "packs": packs}


def _check_heads(families: Iterable[Family]) -> None:
    heads: dict[str, Head] = {}
    for family in families:
        for name, (dtype, shape) in family.tensors.items():
            known, known_shape = heads.setdefault(name, (dtype, shape))
            if (known, known_shape) != (dtype, shape):
                raise CheckpointError(
                    f"ranks differ in the tensor {name!r}: {known} {list(known_shape)} and {dtype} {list(shape)}"
                )
