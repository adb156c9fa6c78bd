"""Batches of every type go to the device whole, and stay what they are. The device is meta: what moved shows it."""

from __future__ import annotations

import array
import types
from collections import OrderedDict, UserDict, defaultdict, deque
from dataclasses import dataclass, field

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from elastic.worker.batches import to_device
from tests.identity_jobs import Mover, Pair, Record

META = torch.device("meta")


def tensor() -> torch.Tensor:
    return torch.ones(2)


class Output(OrderedDict):
    """A mapping with attributes, which refuses `update`."""

    def __init__(self, *arguments, note=""):
        super().__init__(*arguments)
        self.note = note

    def update(self, *_):
        raise TypeError("it cannot be updated")


class Bunch(dict):
    """Its items are its attributes, and it knows no others."""

    def __getattr__(self, name):
        return self[name]


@dataclass(slots=True)
class Slotted:
    x: torch.Tensor
    unset: torch.Tensor = field(init=False)


@dataclass
class Lengths:
    x: torch.Tensor

    def __post_init__(self):
        self.beside = self.x + 1


@pytest.mark.parametrize(
    "batch",
    [
        tensor(),
        {"x": tensor()},
        OrderedDict(x=tensor()),
        UserDict(x=tensor()),
        Output({"x": tensor()}),
        types.MappingProxyType({"x": tensor()}),
        Bunch(x=tensor()),
        Bunch({"to": tensor(), "from": tensor()}),
        [tensor()],
        (tensor(),),
        deque([tensor()]),
        Pair(tensor(), tensor()),
        Record(tensor(), tensor()),
        Slotted(tensor()),
        torch.max(torch.ones(2, 2), 0),
        pack_sequence([torch.ones(3), torch.ones(2)]),
        {"a": [Pair((tensor(), {"b": Record([tensor()], None)}), 5)]},
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_every_tensor_is_moved_and_the_type_is_kept(batch):
    moved = to_device(batch, META)

    assert type(moved) is type(batch)
    assert devices(moved) == {"meta"}
    assert devices(batch) == {"cpu"}


def devices(batch: object) -> set[str]:
    if isinstance(batch, torch.Tensor):
        return {batch.device.type}
    if isinstance(batch, PackedSequence):
        return devices(batch.data)  # its lengths stay on the CPU
    if hasattr(batch, "items"):
        parts = [value for _, value in batch.items()]
    elif isinstance(batch, (list, tuple, deque)):
        parts = list(batch)
    else:
        parts = [getattr(batch, name) for name in ("x", "y") if hasattr(batch, name)]
    return {device for part in parts for device in devices(part)}


def test_what_a_batch_carries_beside_tensors_comes_along():
    counts = defaultdict(list, x=tensor())
    record, lengths = Record(tensor(), tensor(), "a note"), Lengths(tensor())

    assert to_device(counts, META)["missing"] == []
    assert to_device(Output({"x": tensor()}, note="kept"), META).note == "kept"
    assert to_device(record, META).note == "a note"
    assert to_device(lengths, META).beside.device.type == "meta"
    assert lengths.beside.device.type == "cpu"


def test_what_moves_itself_does_even_where_it_returns_nothing():
    mover = Mover(tensor(), tensor())

    assert to_device([mover], META)[0] is mover
    assert mover.moved
    assert mover.x.device.type == "meta"


@pytest.mark.parametrize("batch", ["text", 5, None, b"bytes", array.array("d", [1.0]), object(), Record, range(3)])
def test_all_else_is_left_alone(batch):
    assert to_device(batch, META) is batch
