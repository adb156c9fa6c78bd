"""What data are: their length and a few samples, in numbers that workers and the parts of a run can compare.

Each sample is fetched under a seed of its own, so that augmentation does not matter. Its bits are hashed, and beside
them its structure (types, shapes, whole numbers, texts) and a few figures of its floating-point numbers, which may be
computed on machines that differ in the last bits.
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

from elastic.data.samples import untouched
from elastic.seeds import derive, seed_all

SOME, POINTS = 4, 5
MOST_NUMBERS = 1 << 20  # of one array that figures are made from
MAX_DEPTH = 20
BUDGET_S = 5.0  # no further sample is fetched after it
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


class _CannotTellError(Exception):
    """A value of which nothing is known but that it is there."""


def places(count: int, some: int = SOME) -> list[int]:
    """The samples that stand for `count`: first, last, and some between."""
    between = (derive("identity", count, i) % count for i in range(some))
    return sorted({0, count - 1, *between}) if count else []


def identify(data: Any, some: int = SOME) -> dict[str, Any]:
    """Describe map-style data: `samples`, their number; `found`, by place: bits, structure and figures.

    `varies` is there where a sample is another one each time, though under one seed. A sample that cannot be fetched,
    or is made of what cannot be compared, is left out: that is said where it is used.
    """
    count, began = len(data), time.monotonic()
    trial = untouched(data)
    found: dict[str, list[Any]] = {}
    for place in places(count, some):
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
    except Exception:  # of the job's data: the step that needs this sample says it with all there is to know
        return None


def fingerprint(sample: Any) -> list[Any] | None:
    """(bits, structure, figures) of a sample; None where it is made of what cannot be compared."""
    walk = _Walk()
    try:
        walk.take(sample, 0)
    except _CannotTellError:
        return None
    return [walk.bits.hexdigest(), walk.structure.hexdigest(), walk.figures()]


class _Walk:
    """Goes through a sample, part by part."""

    def __init__(self) -> None:
        self.bits, self.structure = hashlib.blake2b(digest_size=8), hashlib.blake2b(digest_size=4)
        self._floats: list[np.ndarray] = []

    def take(self, value: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise _CannotTellError
        if isinstance(value, torch.Tensor):
            self._tensor(value, depth)
        elif isinstance(value, (np.ndarray, np.generic)):
            self._array(np.asarray(value), depth)
        elif isinstance(value, enum.Enum):
            self._say(f"{type(value).__name__}.{value.name}")
        elif value is None or isinstance(value, (bool, int)):
            self._say(f"{type(value).__name__} {value}")
        elif isinstance(value, float):
            self._numbers("float", np.asarray([value]))
        elif isinstance(value, complex):
            self._numbers("complex", np.asarray([value.real, value.imag]))
        elif isinstance(value, (str, pathlib.PurePath)):  # a folder may have another name on another machine
            text = str(value)
            self._say(f"text {pathlib.PurePath(text).name if text.startswith('/') else text}")
        elif isinstance(value, (bytes, bytearray, memoryview)):
            self._say("bytes", bytes(value))
        elif isinstance(value, _BY_TEXT):
            self._say(f"{type(value).__name__} {value!r}")
        elif isinstance(value, Mapping):
            self._named(value, sorted(value, key=repr), depth)
        elif isinstance(value, (list, tuple)):
            self._say(f"{type(value).__name__} {len(value)}")
            for part in value:
                self.take(part, depth + 1)
        elif isinstance(value, AbstractSet):
            self._say(f"set {sorted(map(_of_one, value))}")
        elif all(hasattr(value, name) for name in ("tobytes", "mode", "size")):  # an image of PIL's
            self._say(f"image {value.mode} {value.size}", value.tobytes())
        elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
            self._object(value, depth)
        else:
            raise _CannotTellError

    def figures(self) -> list[float]:
        """Mean size, mean and a few of all floating-point numbers, if there are any."""
        if not self._floats:
            return []
        numbers = np.concatenate(self._floats)
        chosen = numbers[np.linspace(0, len(numbers) - 1, POINTS).astype(int)] if len(numbers) else numbers
        means = [np.abs(numbers).mean(), numbers.mean()] if len(numbers) else []
        return [float(f"{x:.6g}") for x in (*means, *chosen)]

    def _say(self, text: str, more: bytes = b"") -> None:
        head = f"{text}\n".encode()
        for digest in (self.bits, self.structure):
            digest.update(head)
            digest.update(more)

    def _numbers(self, kind: str, values: np.ndarray) -> None:
        self.bits.update(values.tobytes())
        step = max(1, values.size // MOST_NUMBERS)
        flat = np.ascontiguousarray(values).reshape(-1)[::step].astype(np.float64)
        finite = np.isfinite(flat)
        self._say(f"{kind} {values.shape} {int(finite.sum())}")
        self._floats.append(np.where(finite, flat, 0.0))

    def _tensor(self, value: torch.Tensor, depth: int) -> None:
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise _CannotTellError
        value = torch.view_as_real(value.resolve_conj()) if value.is_complex() else value
        value = value.detach().cpu().resolve_neg()
        wide = value.float() if value.dtype.is_floating_point and value.dtype.itemsize < 4 else value
        self._say(f"tensor {value.dtype}")
        self._array(wide.numpy(), depth)

    def _array(self, value: np.ndarray, depth: int) -> None:
        if value.dtype == object:
            self.take(value.tolist(), depth + 1)
        elif value.dtype.kind == "c":
            self._array(np.ascontiguousarray(value).view(value.real.dtype), depth)
        elif value.dtype.kind == "f":
            self._numbers(str(value.dtype), value)
        else:
            self._say(f"{value.dtype} {value.shape}", np.ascontiguousarray(value).tobytes())

    def _object(self, value: Any, depth: int) -> None:
        if callable(value) or isinstance(value, type):
            raise _CannotTellError
        named = dict(getattr(value, "__dict__", {}))
        if dataclasses.is_dataclass(value):
            named |= {f.name: getattr(value, f.name, None) for f in dataclasses.fields(value)}
        self._say(type(value).__qualname__)
        self._named(named, sorted(named), depth)

    def _named(self, values: Mapping[Any, Any], names: Iterable[Any], depth: int) -> None:
        self._say(f"{len(values)} named")
        for name in names:
            self.take(name, depth + 1)
            self.take(values[name], depth + 1)


def _of_one(value: Any) -> str:
    found = fingerprint(value)
    if found is None:
        raise _CannotTellError
    return str(found[0])
