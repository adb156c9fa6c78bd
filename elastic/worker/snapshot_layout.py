"""The layout of a worker's part of a snapshot: where each tensor's bytes lie, and which bytes of old parts make up a
new part. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from elastic.checkpoint.fields import ITEM_BYTES
from elastic.placement import Part, TensorSpec, copies

ALIGNMENT = 64


def starts(specs: Sequence[TensorSpec], part: Part) -> list[int]:
    """Return the offset in bytes of each tensor's box in a part, and as the last item the size of the part. A box that
    several parts hold takes bytes in the first of them only. Offsets are multiples of ALIGNMENT."""
    found, at = [], 0
    for spec in specs:
        found.append(at)
        if part.first(spec.cut) == part:
            at += spec.box(part).volume * ITEM_BYTES[spec.dtype]
            at += -at % ALIGNMENT
    return [*found, at]


def pieces(specs: Sequence[TensorSpec], old: Part, new: Part) -> Iterator[tuple[int, int, int, int]]:
    """Find the bytes of an old part that belong into a new part.

    Yields:
        the index of the tensor, the offset of the piece in the old part, its offset in the new box of that tensor,
        and its length, all three in bytes.
    """
    for i, (spec, start) in enumerate(zip(specs, starts(specs, old), strict=False)):
        if old.first(spec.cut) == old:
            item = ITEM_BYTES[spec.dtype]
            for source, target, count in copies(spec.box(old), spec.box(new)):
                yield i, start + source * item, target * item, count * item
