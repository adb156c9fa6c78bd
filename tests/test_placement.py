"""What of a tensor is where, and how it gets from old places to new ones: any mesh, any cut, any shape."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.parallel.layout import moves
from elastic.placement import Box, Cut, Part, common, copies, tiles

AXES = ("tensor", "expert", "shard")


def part_of(sizes: dict[str, int], index: int = 0) -> Part:
    first = Part.of((axis, 0, size) for axis, size in sizes.items())
    return first.siblings[index]


@st.composite
def meshes(draw: st.DrawFn) -> Part:
    """The first part of a mesh."""
    return part_of({axis: draw(st.integers(1, 4)) for axis in AXES if draw(st.booleans())})


@st.composite
def tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], Cut]:
    """A shape and how it is cut: along some axes, one dimension several times or not."""
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
    axes = draw(st.lists(st.sampled_from(AXES), unique=True, max_size=3)) if shape else []
    return shape, tuple((axis, draw(st.integers(0, len(shape) - 1))) for axis in axes)


def filled(box: Box, whole: np.ndarray) -> np.ndarray:
    """The elements of a box, one after another."""
    return whole[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes))].reshape(-1).copy()


@given(tensors(), meshes())
def test_the_boxes_of_first_parts_tile_a_tensor_and_all_others_are_copies_of_them(tensor, mesh):
    shape, cut = tensor

    first = {part for part in mesh.siblings if part.first(cut) == part}

    assert tiles([part.box(shape, cut) for part in first], shape)
    assert {part.first(cut) for part in mesh.siblings} == first
    assert all(part.box(shape, cut) == part.first(cut).box(shape, cut) for part in mesh.siblings)


@given(tensors(), meshes(), meshes())
def test_every_element_of_every_new_box_comes_once_from_the_old_ones(tensor, old, new):
    shape, cut = tensor
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    sources = {part: filled(part.box(shape, cut), whole) for part in old.siblings if part.first(cut) == part}

    for part in new.siblings:
        box = part.box(shape, cut)
        came, times = np.full(box.volume, -1), np.zeros(box.volume, int)
        for source, data in sources.items():
            for at, to, count in copies(source.box(shape, cut), box):
                came[to : to + count] = data[at : at + count]
                times[to : to + count] += 1

        assert (times == 1).all()
        assert (came == filled(box, whole)).all()


@given(tensors(), meshes(), meshes(), st.lists(st.integers(1, 3), min_size=64, max_size=64), st.data())
def test_every_rank_takes_each_element_once_from_one_that_holds_it(tensor, old, new, counts, data):
    shape, cut = tensor
    found, rank = {}, 0
    for part, count in zip(old.siblings, counts):
        found[part] = list(range(rank, rank + count))
        rank += count
    ranks = data.draw(st.permutations(range(rank + 2)))[: len(new.siblings)]
    wants = dict(zip(ranks, new.siblings))
    own = {rank: part for part, ranks in found.items() for rank in ranks}

    plan = moves(found, wants, cut)

    for target, part in wants.items():
        mine = [m for m in plan if m.target == target]
        shared = [b for m in mine if (b := common(m.old.box(shape, cut), m.new.box(shape, cut))) is not None]
        box = part.box(shape, cut)
        inside = [Box(tuple(o - b for o, b in zip(s.offsets, box.offsets)), s.sizes) for s in shared]
        assert tiles(inside, box.sizes)
        assert {m.new for m in mine} == {part}
    for m in plan:
        assert own[m.source].first(cut) == m.old, "who gives it holds it"
        if m.target in own and own[m.target].first(cut) == m.old:
            assert m.source == m.target, "who holds it takes it from itself"


@given(st.integers(1, 9), st.sets(st.integers(0, 8), min_size=1))
def test_who_lacks_a_whole_state_takes_it_from_those_that_have_it_in_turn(size, having):
    having = sorted(having)
    wants = {rank: Part() for rank in range(size) if rank not in having}

    plan = moves({Part(): having}, wants, ())

    assert [m.target for m in plan] == [*wants]
    given_by = [sum(m.source == giver for m in plan) for giver in having]
    assert max(given_by) - min(given_by) <= 1


@given(st.lists(st.integers(0, 6), min_size=1, max_size=3), st.integers(1, 5), st.data())
def test_chunks_are_those_of_torch(shape, count, data):
    dimension = data.draw(st.integers(0, len(shape) - 1))
    box, values = Box.whole(tuple(shape)), torch.arange(int(np.prod(shape))).view(shape)

    found = [box.chunk(dimension, index, count) for index in range(count)]

    assert tiles(found, tuple(shape))
    wanted = [t.reshape(-1).tolist() for t in values.chunk(count, dimension) if t.numel()]
    assert [filled(b, values.numpy()).tolist() for b in found if b.volume] == wanted


@given(meshes())
def test_a_part_has_a_key(mesh):
    for part in mesh.siblings:
        assert Part.parse(part.key) == part
        assert part.siblings == mesh.siblings
        assert part.key.replace("-", "").replace(".", "").isalnum()


@pytest.mark.parametrize(
    "key", ["", "shard", "shard-1", "shard-3-3", "shard--1-3", "shard-0-1", "shard-1-3.", "1", "a-b-c"]
)
def test_what_names_no_part_is_refused(key):
    with pytest.raises(ValueError, match=r"part|unpack|literal"):
        Part.parse(key)
