"""A description of a dataset: its length and fingerprints of a few samples, which workers and the claims of a run
compare.

Each sample is fetched under a seed of its own, so that random augmentation does not change it. A fingerprint has a hash
of the sample's bits, a hash of its structure (types, shapes, whole numbers, texts), and a few figures of its
floating-point numbers, because machines may compute these with different last bits.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import hashlib
import pathlib
import time
import uuid
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import torch

from elastic.data.samples import Told, untouched
from elastic.seeds import derive, seed_all

SOME, POINTS = 4, 5
MOST_NUMBERS = 1 << 20  # the most elements of one array from which figures are made
MAX_DEPTH = 20
BUDGET_S = 5.0  # after this time no further sample is fetched
_BY_TEXT = (
    datetime.date,
    datetime.time,
    datetime.timedelta,
    decimal.Decimal,
    fractions.Fraction,
    uuid.UUID,
    range,
    slice,
    torch.dtype,
    torch.device,
    np.dtype,
)


class _NotComparableError(Exception):
    """A value that has no bits to be compared."""


def places(count: int, some: int = SOME) -> list[int]:
    """Return the ids of the samples that represent `count` samples: the first, the last, and `some` between them."""
    between = (derive("identity", count, i) % count for i in range(some))
    return sorted({0, count - 1, *between}) if count else []


def identify(data: Any, some: int = SOME) -> dict[str, Any]:
    """Describe map-style data: `samples` is their number, `found` has the `fingerprint` of some samples by id.

    `varies` is set if the first sample differs from one fetch to the next under the same seed. A sample that cannot be
    fetched or compared is left out; the step that uses the sample reports the error.
    """
    count, began = len(data), time.monotonic()
    trial = untouched(data)
    found: dict[str, list[Any]] = {}
    chosen = trial.some() if isinstance(trial, Told) else None
    for place in places(count, some) if chosen is None else chosen:
        if time.monotonic() - began > BUDGET_S:
            break
        sample = _fetch(trial, place)
        if sample is None:
            continue
        if not found and sample != _fetch(trial, place):
            return {"samples": count, "found": {}, "varies": True}
        found[str(place)] = sample
    return {"samples": count, "found": found}


def _fetch(data: Any, place: int) -> list[Any] | None:
    seed_all(derive("identity", place))
    try:
        return fingerprint(data[place])
    except Exception:  # raised by the job's data; the step that needs this sample reports it in full
        return None


def fingerprint(sample: Any) -> list[Any] | None:
    """Return (bits, structure, figures) of a sample: two hashes in hexadecimal and a list of floats; None if it
    contains a value that cannot be compared."""
    walk = _Walk()
    try:
        walk.take(sample, 0)
    except _NotComparableError:
        return None
    return [walk.bits.hexdigest(), walk.structure.hexdigest(), walk.figures()]


class _Walk:
    """Walks through a sample, value by value, and hashes it."""

    def __init__(self) -> None:
        self.bits, self.structure = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=4)
        self._floats: list[np.ndarray] = []

    def take(self, value: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise _NotComparableError
        if isinstance(value, torch.Tensor):
            self._tensor(value, depth)
        elif isinstance(value, (np.ndarray, np.generic)):
            self._array(np.asarray(value), depth)
        elif isinstance(value, enum.Enum):
            self._hash(f"{type(value).__name__}.{value.name}")
        elif value is None or isinstance(value, (bool, int)):
            self._hash(f"{type(value).__name__} {value}")
        elif isinstance(value, float):
            self._numbers("float", np.asarray([value]))
        elif isinstance(value, complex):
            self._numbers("complex", np.asarray([value.real, value.imag]))
        elif isinstance(value, (str, pathlib.PurePath)):  # a path may have another folder on another machine
            text = str(value)
            self._hash(f"text {pathlib.PurePath(text).name if text.startswith('/') else text}")
        elif isinstance(value, (bytes, bytearray, memoryview)):
            self._hash("bytes", bytes(value))
        elif isinstance(value, _BY_TEXT):
            self._hash(f"{type(value).__name__} {value!r}")
        elif isinstance(value, Mapping):
            self._named(value, sorted(value, key=repr), depth)
        elif isinstance(value, (list, tuple)):
            self._hash(f"{type(value).__name__} {len(value)}")
            for item in value:
                self.take(item, depth + 1)
        elif isinstance(value, AbstractSet):
            self._hash(f"set {sorted(map(_bits_of, value))}")
        elif all(hasattr(value, name) for name in ("tobytes", "mode", "size")):  # an image of PIL's
            self._hash(f"image {value.mode} {value.size}", value.tobytes())
        elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
            self._object(value, depth)
        else:
            raise _NotComparableError

    def figures(self) -> list[float]:
        """Return the mean absolute value, the mean, and a few of all floating-point numbers; empty if there are
        none."""
        if not self._floats:
            return []
        numbers = np.concatenate(self._floats)
        chosen = numbers[np.linspace(0, len(numbers) - 1, POINTS).astype(int)] if len(numbers) else numbers
        means = [np.abs(numbers).mean(), numbers.mean()] if len(numbers) else []
        return [float(f"{x:.6g}") for x in (*means, *chosen)]

    def _hash(self, text: str, more: bytes = b"") -> None:
        head = f"{text}\n".encode()
        for digest in (self.bits, self.structure):
            digest.update(head)
            digest.update(more)

    def _numbers(self, kind: str, values: np.ndarray) -> None:
        self.bits.update(values.tobytes())
        step = max(1, values.size // MOST_NUMBERS)
        flat = np.ascontiguousarray(values).reshape(-1)[::step].astype(np.float64)
        finite = np.isfinite(flat)
        self._hash(f"{kind} {values.shape} {int(finite.sum())}")
        self._floats.append(np.where(finite, flat, 0.0))

    def _tensor(self, value: torch.Tensor, depth: int) -> None:
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise _NotComparableError
        value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        value = value.detach().cpu().resolve_neg()
        wide = value.float() if value.dtype.is_floating_point and value.dtype.itemsize < 4 else value
        self._hash(f"tensor {value.dtype}")
        self._array(wide.numpy(), depth)

    def _array(self, value: np.ndarray, depth: int) -> None:
        if value.dtype == object:
            self.take(value.tolist(), depth + 1)
        elif value.dtype.kind == "c":
            self._array(np.ascontiguousarray(value).view(value.real.dtype), depth)
        elif value.dtype.kind == "f":
            self._numbers(str(value.dtype), value)
        else:
            self._hash(f"{value.dtype} {value.shape}", np.ascontiguousarray(value).tobytes())

    def _object(self, value: Any, depth: int) -> None:
        if callable(value) or isinstance(value, type):
            raise _NotComparableError
        named = dict(getattr(value, "__dict__", {}))
        if dataclasses.is_dataclass(value):
            named |= {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
        self._hash(type(value).__qualname__)
        self._named(named, sorted(named), depth)

    def _named(self, values: Mapping[Any, Any], names: Iterable[Any], depth: int) -> None:
        self._hash(f"{len(values)} named")
        for name in names:
            self.take(name, depth + 1)
            self.take(values[name], depth + 1)


def _bits_of(value: Any) -> str:
    found = fingerprint(value)
    if found is None:
        raise _NotComparableError
    return str(found[0])
