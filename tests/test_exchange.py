"""Boxes on their way between the ranks of a world: threads in place of processes, any mesh, odd sizes and types."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.parallel.layout import ROWS, SHARD
from elastic.placement import Part, TensorSpec
from elastic.worker import exchange as module

here = threading.local()  # the rank of a thread


class Wire:
    """The two collectives, for as many threads as there are ranks; counts the bytes that each gave."""

    def __init__(self, size: int):
        self.size, self.given, self.calls = size, [0] * size, 0
        self.barrier, self._board = threading.Barrier(size, timeout=20), list[Any]([None] * size)

    def _swap(self, mine: Any) -> list[Any]:
        self._board[here.rank] = mine
        self.barrier.wait()
        board = list(self._board)
        if self.barrier.wait() == 0:
            self.calls += 1
        return board

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        (given,) = [t for rank, t in enumerate(self._swap(tensor.clone())) if rank == source]
        assert given.shape == tensor.shape
        tensor.copy_(given)
        self.given[here.rank] += tensor.numel() * (here.rank == source)

    def all_to_all_single(
        self, received: torch.Tensor, sent: torch.Tensor, coming: list[int], going: list[int]
    ) -> None:
        assert (len(received), len(sent)) == (sum(coming), sum(going))
        board = self._swap(sent.split(going))
        parts = [board[rank][here.rank] for rank in range(self.size)]
        assert [len(part) for part in parts] == coming
        received.copy_(torch.cat(parts))
        self.given[here.rank] += len(sent)


def group(rank: int, size: int) -> Any:
    nothing = {"collective": lambda what: contextlib.nullcontext(), "check": lambda: None}
    return SimpleNamespace(rank=rank, size=size, device=torch.device("cpu"), **nothing)


def box(value: torch.Tensor, spec: TensorSpec, part: Part) -> torch.Tensor:
    one = spec.box(part)
    return value[tuple(slice(o, o + s) for o, s in zip(one.offsets, one.sizes))]


def exchanged(specs, whole, found, wants, size, batch_bytes) -> Wire:
    """Exchange on all ranks, and compare what each has then."""
    wire = Wire(size)

    def rank(rank: int) -> None:
        here.rank = rank
        own = next((part for part, ranks in found.items() if rank in ranks), None)
        held = {} if own is None else {s.name: box(whole[s.name], s, own).clone() for s in specs}
        try:
            into = _places(specs, whole, wants[rank]) if rank in wants else {}
            taken = module.exchange(group(rank, size), specs, held, found, wants, into)
        except BaseException:
            wire.barrier.abort()
            raise
        if rank not in wants:
            assert taken == {}
            return
        for i, spec in enumerate(specs):
            assert torch.equal(taken[spec.name], box(whole[spec.name], spec, wants[rank]))
            assert (taken[spec.name] is into.get(spec.name)) == (i % 4 in (0, 1))

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(size) as pool:
        patch.setattr(module, "dist", wire)
        patch.setattr(module, "BATCH_BYTES", batch_bytes)
        list(pool.map(rank, range(size)))
    return wire


def _places(specs: list[TensorSpec], whole: dict[str, torch.Tensor], part: Part) -> dict[str, torch.Tensor]:
    """Of four tensors in turn, one has a place, one a place with other strides, one a place that does not fit, and
    one has none."""
    places = {}
    for i, spec in enumerate(specs):
        like = box(whole[spec.name], spec, part)
        turned = like.new_zeros(tuple(reversed(like.shape))).permute(tuple(reversed(range(like.dim()))))
        kinds = [torch.zeros_like(like), turned, torch.zeros(7, 7, 7, 7)]
        places |= {spec.name: kinds[i % 4]} if i % 4 < 3 else {}
    return places


@st.composite
def states(draw: st.DrawFn) -> tuple[list[TensorSpec], dict[str, torch.Tensor]]:
    specs, whole = [], {}
    for i in range(draw(st.integers(1, 4))):
        dtype = draw(st.sampled_from(["float32", "uint8", "bfloat16", "float64", "bool"]))
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        specs.append(TensorSpec(f"t{i}", dtype, shape, ROWS if shape and draw(st.booleans()) else ()))
        whole[f"t{i}"] = (torch.rand(shape) * 200).to(getattr(torch, dtype))
    return specs, whole


@settings(max_examples=25, deadline=None)
@given(states(), st.integers(1, 4), st.lists(st.integers(1, 2), min_size=3, max_size=3), st.integers(1, 3), st.data())
def test_every_rank_gets_its_part_from_those_that_have_it(state, old, copies, new, data):
    """From any mesh with copies into any other, spares and newcomers among the ranks."""
    found, rank = {}, 0
    for part, count in zip(Part.of([(SHARD, 0, min(old, 3))]).siblings, copies):
        found[part] = list(range(rank, rank + count))
        rank += count
    size = max(rank, new) + 1
    places = data.draw(st.permutations(range(size)))[:new]
    wants = dict(zip(places, Part.of([(SHARD, 0, new)]).siblings))

    exchanged(*state, found, wants, size, data.draw(st.sampled_from([8, 16, 1 << 20])))


def test_one_that_gives_all_to_all_others_gives_it_once():
    whole = {"w": torch.rand(7, 5), "n": torch.tensor(3)}
    specs = [TensorSpec("w", "float32", (7, 5), ROWS), TensorSpec("n", "int64", ())]

    for giver in (0, 2):
        wants = {rank: Part() for rank in range(4) if rank != giver}
        wire = exchanged(specs, whole, {Part(): [giver]}, wants, 4, 1 << 20)
        assert wire.given == [148 * (rank == giver) for rank in range(4)]
        assert wire.calls == 1

    wire = exchanged(specs, whole, {Part(): [0, 1]}, {2: Part(), 3: Part()}, 4, 40)
    assert wire.given == [148, 148, 0, 0], "those that have it take turns"
    assert wire.calls == 5, "w in four pieces of at most 40 bytes, but for whole rows, and n"
