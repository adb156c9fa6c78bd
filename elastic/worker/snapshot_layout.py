"""The bytes of a worker's part of a snapshot: what lies where, and what of old parts makes a new one. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from elastic.checkpoint.format import ITEM_BYTES
from elastic.placement import Part, TensorSpec, copies

ALIGNMENT = 64


def starts(specs: Sequence[TensorSpec], part: Part) -> list[int]:
    """Where each tensor's box begins in a part, in bytes; and at the end, the part's size. What several parts have is
    in the first of them alone."""
    found, at = [], 0
    for spec in specs:
        found.append(at)
        if part.first(spec.cut) == part:
            at += spec.box(part).volume * ITEM_BYTES[spec.dtype]
            at += -at % ALIGNMENT
    return [*found, at]


def pieces(specs: Sequence[TensorSpec], old: Part, new: Part) -> Iterator[tuple[int, int, int, int]]:
    """What of an old part belongs into a new one: index of the tensor, and bytes of its box.

    Yields:
        tensor, where the piece starts in the old part, where it starts in the new box, and its length.
    """
    for i, (spec, start) in enumerate(zip(specs, starts(specs, old), strict=False)):
        if old.first(spec.cut) == old:
            item = ITEM_BYTES[spec.dtype]
            for source, target, count in copies(spec.box(old), spec.box(new)):
                yield i, start + source * item, target * item, count * item
