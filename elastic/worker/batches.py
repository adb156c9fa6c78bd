"""Moves the batches that a job makes to the device: every object with tensors in it, which keeps its type."""

from __future__ import annotations

import array
import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Mapping, MutableSequence
from typing import Any

import torch

_NUMBERS = (bytearray, array.array)  # mutable sequences that hold no tensors


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with all its tensors on the device.

    An object with a method `to` (a PackedSequence, a graph, a tokenizer's output) moves itself. Mappings, sequences,
    named tuples and dataclasses are rebuilt with their own types, attributes included. Everything else stays as it is.
    """
    if isinstance(batch, torch.Tensor):
        pins = device.type == "cuda" and batch.device.type == "cpu" and not batch.is_pinned()
        # without pinned memory the host waits for the copy, and the copy for all enqueued work
        return (batch.pin_memory() if pins else batch).to(device, non_blocking=True)
    if callable(getattr(type(batch), "to", None)):  # looked up on the class: a mapping may have an item `to`
        moved = batch.to(device)
        return batch if moved is None else moved  # a method that moves in place may return nothing
    if isinstance(batch, Mapping):
        return _mapping(batch, {key: to_device(value, device) for key, value in batch.items()})
    if isinstance(batch, tuple):
        return _tuple(batch, [to_device(value, device) for value in batch])
    if isinstance(batch, MutableSequence) and not isinstance(batch, _NUMBERS):
        found = [to_device(value, device) for value in batch]
        return found if type(batch) is list else _sequence(batch, found)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return _dataclass(batch, device)
    return batch


def _mapping(batch: Mapping[Any, Any], found: dict[Any, Any]) -> Any:
    if type(batch) is dict:
        return found
    make: Any = type(batch)
    for way in (_with_items, lambda batch, found: make(found)):
        with contextlib.suppress(Exception):  # its class may allow neither; the dict below has the items in any case
            return way(batch, found)
    return found


def _with_items(batch: Any, found: dict[Any, Any]) -> Any:
    """A copy with these items, which keeps a default factory and attributes."""
    changed = copy.copy(batch)
    for key, value in found.items():
        changed[key] = value
    return changed


def _tuple(batch: tuple[Any, ...], found: list[Any]) -> Any:
    if type(batch) is tuple:
        return tuple(found)
    make: Any = batch._make if hasattr(batch, "_make") else type(batch)
    return make(found)


def _sequence(batch: MutableSequence[Any], found: Iterable[Any]) -> Any:
    changed = copy.copy(batch)
    for i, value in enumerate(found):
        changed[i] = value
    return changed


def _dataclass(batch: Any, device: torch.device) -> Any:
    """Moves the fields, and attributes that __post_init__ made, without calling it or the constructor."""
    changed = copy.copy(batch)
    names = dict.fromkeys([*(field.name for field in dataclasses.fields(batch)), *getattr(batch, "__dict__", ())])
    for name in names:
        if hasattr(batch, name):  # a field without a default may not be set
            object.__setattr__(changed, name, to_device(getattr(batch, name), device))
    return changed
