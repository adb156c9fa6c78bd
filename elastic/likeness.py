"""What the workers of one world, and the parts of one run, must have in common; where two differ, in words.

A worker describes itself as plain JSON: of its data the length and a few samples, of all else lines of text by subject.
Lines go packed, so that the first one that differs can be named, unless they are too many: then only their digest does.
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
#: Floating-point samples may be computed on other machines: they are equal if they differ by no more than this share.
TOLERANCE = 1e-3
DATA = "data"  # what --run.allow-change calls a change of it

#: What a device is, in words.
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
    """Lines as a worker sends them."""
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
    """How the devices of two workers differ, each described as JSON; empty where they do not."""
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
    """The first thing in which a worker differs from another, whose world it is; empty where they are alike.

    Args:
        mine, other: descriptions as JSON; an empty one says nothing, and is like any.
        exact: samples must be the same to the last bit.
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
    return "" if place is None else f"its {name} has another sample {place} than the world's"


def _lines(subject: str, mine: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    a, b = _unpacked(mine), _unpacked(other)
    if a is None or b is None:
        return f"its {subject} differs from the world's: {mine['count']} and {other['count']} entries"
    one, two = next((x, y) for x, y in zip_longest(a, b) if x != y)
    if two is None:
        return f"its {subject} has {one}, which the world's has not"
    return f"its {subject} has {one or 'nothing'}, the world's {two}"


def changed_sample(mine: Mapping[str, Any], other: Mapping[str, Any], *, exact: bool) -> int | None:
    """The first sample of those that both descriptions of data know which is not the same; None where all are.

    Floating-point samples that were computed on another machine may differ in the last bits: that is no change, unless
    it is asked for `exact` ones.
    """
    for place in sorted(mine["found"].keys() & other["found"].keys(), key=int):
        (bits, shape, figures), (their_bits, their_shape, their_figures) = mine["found"][place], other["found"][place]
        if bits != their_bits and (exact or shape != their_shape or not _close(figures, their_figures)):
            return int(place)
    return None


def _close(mine: Sequence[float], other: Sequence[float]) -> bool:
    """The first figure is the mean size of all numbers of a sample, the scale of the others."""
    if len(mine) != len(other):
        return False
    scale = max((abs(figures[0]) for figures in (mine, other) if figures), default=0.0)
    return all(abs(a - b) <= TOLERANCE * scale for a, b in zip(mine, other, strict=True))


def data_change(data: Mapping[str, Any], before: Any, when: str, *, exact: bool = False) -> str:
    """How data differ from what they were, in words; empty where they do not, or where that is not known."""
    if not isinstance(before, dict) or not isinstance(before.get("found"), dict):
        return ""
    if data["samples"] != before.get("samples"):
        return f"train_data() has {data['samples']} samples, and had {before.get('samples')} {when}"
    place = changed_sample(data, before, exact=exact)
    return "" if place is None else f"sample {place} of train_data() is not what it was {when}"


def refusal(change: str) -> str:
    """The sentence for data that may not change."""
    return f"{change}; give the same data, another --run.name, or --run.allow-change {DATA}"
