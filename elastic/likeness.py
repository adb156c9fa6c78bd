"""What the workers of one world, and the sessions of one run, must have in common; and where two differ, in words.

A worker describes itself as JSON: its data by the length and a few samples, everything else by lines of text for each
subject. Lines are sent compressed, so that the first difference can be named; too many are sent as a digest only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any

MAX_PACKED_BYTES = 6000
#: Samples in floating point may be computed on other machines: they count as equal if they differ by at most this
#: share.
TOLERANCE = 1e-3
DATA = "data"  # the name of the training data in --run.allow-change

#: Names of the fields of a device description, for people.
DEVICE = {
    "type": "device type",
    "name": "kernels or device name",
    "torch": "torch build",
    "threads": "thread count",
    "precision": "precision of float32 products",
    "driver": "NVIDIA driver",
    "nccl": "NCCL",
    "cudnn": "cuDNN",
    "cublas": "cuBLAS",
}


def packed(lines: Sequence[str]) -> dict[str, Any]:
    """Lines of text in the form in which a worker sends them."""
    found: dict[str, Any] = {"digest": digest_of(lines), "count": len(lines)}
    small = base64.b85encode(zlib.compress("\n".join(lines).encode(), 9)).decode()
    return {**found, "lines": small} if len(small) <= MAX_PACKED_BYTES else found


def digest_of(lines: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _unpacked(one: Mapping[str, Any]) -> list[str] | None:
    if "lines" not in one:
        return None
    text = zlib.decompress(base64.b85decode(one["lines"])).decode()
    return text.split("\n") if one["count"] else []


@lru_cache(maxsize=4096)
def device_difference(mine: str, other: str) -> str:
    """How the devices of two workers differ, each described as JSON; empty if they do not."""
    if mine == other:
        return ""
    try:
        one, two = json.loads(mine), json.loads(other)
        key = next(k for k in sorted({*one, *two}) if one.get(k) != two.get(k))
    except (ValueError, TypeError, AttributeError, StopIteration):
        return "its device, torch build or thread count differs from the world's"
    return f"its device differs: {DEVICE.get(key, key)} {one.get(key)!r}, the world's {two.get(key)!r}"


@lru_cache(maxsize=4096)
def difference(mine: str, other: str, exact: bool) -> str:
    """The first difference between a worker and another, which is in the world; empty if there is none.

    Args:
        mine, other: descriptions as JSON; an empty one matches any other.
        exact: samples must be equal to the last bit.
    """
    if mine == other or not mine or not other:
        return ""
    one, two = json.loads(mine), json.loads(other)
    for name in sorted(one.get("data", {}).keys() | two.get("data", {}).keys()):
        found = _data(name, one.get("data", {}).get(name), two.get("data", {}).get(name), exact)
        if found:
            return found
    for subject, a in one.get("lines", {}).items():
        b = two.get("lines", {}).get(subject)
        if b is not None and a["digest"] != b["digest"]:
            return _lines(subject, a, b)
    return ""


def _data(name: str, mine: Mapping[str, Any] | None, other: Mapping[str, Any] | None, exact: bool) -> str:
    if mine is None or other is None:
        return f"it has {'no ' if mine is None else ''}{name}, the world has {'it' if mine is None else 'none'}"
    if mine["samples"] != other["samples"]:
        return f"its {name} has {mine['samples']} samples, the world's {other['samples']}"
    place = changed_sample(mine, other, exact=exact)
    if place is not None:
        return f"its {name} has another sample {place} than the world's"
    moved = changed_order(mine, other)
    return "" if moved is None else f"its sampler() gives another sample than the world's at position {moved}"


def _lines(subject: str, mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    a, b = _unpacked(mine), _unpacked(other)
    if a is None or b is None:
        return f"its {subject} differs from the world's: {mine['count']} and {other['count']} entries"
    one, two = next((x, y) for x, y in zip_longest(a, b) if x != y)
    if two is None:
        return f"its {subject} has {one}, which the world's has not"
    return f"its {subject} has {one or 'nothing'}, the world's {two}"


def changed_sample(mine: Mapping[str, Any], other: Mapping[str, Any], *, exact: bool) -> int | None:
    """The first sample, of those in both descriptions of data, that differs; None if none does.

    Samples in floating point that were computed on another machine may differ in their last bits. That counts as a
    difference only with `exact`.
    """
    for place in sorted(mine["found"].keys() & other["found"].keys(), key=int):
        (bits, shape, figures), (their_bits, their_shape, their_figures) = mine["found"][place], other["found"][place]
        if bits != their_bits and (exact or shape != their_shape or not _close(figures, their_figures)):
            return int(place)
    return None


def changed_order(mine: Mapping[str, Any], other: Mapping[str, Any]) -> int | None:
    """The first position, of those in both descriptions of data, at which another sample is; None if none is, or if
    another --run.seed, which is compared with the options, makes another order."""
    if mine.get("seed") != other.get("seed"):
        return None
    one, two = mine.get("order", {}), other.get("order", {})
    return next((int(at) for at in sorted(one.keys() & two.keys(), key=int) if one[at] != two[at]), None)


def _close(mine: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two samples are close. The first figure of each is the mean size of its numbers, the scale for all."""
    if len(mine) != len(other):
        return False
    scale = max((abs(figures[0]) for figures in (mine, other) if figures), default=0.0)
    return all(abs(a - b) <= TOLERANCE * scale for a, b in zip(mine, other, strict=True))


def data_change(data: Mapping[str, Any], before: Any, when: str, *, exact: bool = False) -> str:
    """How the data differ from what they were, in words; empty if they do not, or if that is unknown."""
    if not isinstance(before, dict) or not isinstance(before.get("found"), dict):
        return ""
    if data["samples"] != before.get("samples"):
        return f"train_data() has {data['samples']} samples, and had {before.get('samples')} {when}"
    place = changed_sample(data, before, exact=exact)
    if place is not None:
        return f"sample {place} of train_data() is not what it was {when}"
    moved = changed_order(data, before)
    return "" if moved is None else f"the sample at position {moved} of the order is not the one that it was {when}"


def refusal(change: str) -> str:
    """The error for data that must not change."""
    return f"{change}; give the same data, another --run.name, or --run.allow-change {DATA}"
