"""The one summation tree: the same expression, hence the same bits, however its leaves are spread over ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.data.deal import deal
from elastic.parallel.canonical import buckets_of, canonical_norm, row_sums, sums_by_halves, sums_per_row
from elastic.parallel.tree import TreeSum, blocks, tree_sum_of_rows


def _join(left: str, right: str) -> str:
    return f"({left}+{right})"


def _specified(first: int, count: int) -> str:
    """The tree as the specification says it: split at the largest power of two below the number of leaves."""
    if count == 1:
        return str(first)
    half = 1
    while half * 2 < count:
        half *= 2
    return _join(_specified(first, half), _specified(first + half, count - half))


def tree_sum(leaves, add):
    total = TreeSum(add)
    for i, leaf in enumerate(leaves):
        total.push((i, 1), leaf)
    return total.total()


def _summed_by_ranks(leaves, runs, add):
    """Each rank sums its own run; the blocks of all ranks are then folded, as `CanonicalSum` does it."""
    total = TreeSum(add)
    for run in runs:
        mine = TreeSum(add)
        for i in run:
            mine.push((i, 1), leaves[i])
        assert [block for block, _ in mine.parts()] == blocks(run)
        for block, value in mine.parts():
            total.push(block, value)
    return total.total()


@given(st.integers(1, 200))
def test_one_process_sums_in_the_specified_tree(count):
    assert tree_sum([str(i) for i in range(count)], _join) == _specified(0, count)


def test_the_tree_of_seven_leaves():
    assert tree_sum(list("abcdefg"), _join) == "(((a+b)+(c+d))+((e+f)+g))"


@given(st.integers(1, 200), st.integers(1, 40))
def test_dealt_to_any_number_of_ranks_the_expression_is_the_same(count, world_size):
    leaves = [str(i) for i in range(count)]

    found = _summed_by_ranks(leaves, deal(count, world_size), _join)

    assert found == _specified(0, count)


@given(st.integers(1, 100), st.data())
def test_cut_anywhere_into_contiguous_runs_the_expression_is_the_same(count, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=12)))
    bounds = [0, *cuts, count]
    runs = [range(a, b) for a, b in itertools.pairwise(bounds)]

    found = _summed_by_ranks([str(i) for i in range(count)], runs, _join)

    assert found == _specified(0, count)


@given(st.integers(0, 500), st.integers(0, 500))
def test_blocks_are_aligned_powers_of_two_that_make_up_the_run(start, length):
    found = blocks(range(start, start + length))

    assert [i for first, size in found for i in range(first, first + size)] == list(range(start, start + length))
    for first, size in found:
        assert size & (size - 1) == 0
        assert first % size == 0
    assert len(found) <= 2 * max(1, length).bit_length()


@given(st.integers(1, 64), st.integers(1, 8), st.integers(0, 2**31))
def test_float32_sums_have_the_same_bits_at_every_world_size(count, world_size, seed):
    generator = torch.Generator().manual_seed(seed)
    leaves = list(torch.randn(count, 33, generator=generator) * 10 ** torch.randint(-6, 6, (count, 1)))
    expected = tree_sum(leaves, torch.add)

    found = _summed_by_ranks(leaves, deal(count, world_size), torch.add)

    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


def test_summing_in_another_order_would_have_other_bits():
    """Otherwise the tests above would prove nothing."""
    leaves = list(torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)))

    one_after_another = sum(leaves[1:], leaves[0])

    assert not torch.equal(one_after_another, tree_sum(leaves, torch.add))


def test_a_total_that_does_not_start_at_the_first_leaf_is_an_error():
    part = TreeSum(_join)
    part.push((4, 1), "e")

    with pytest.raises(AssertionError, match="leaf 0"):
        part.total()


shapes = st.one_of(
    st.tuples(st.integers(2, 40), st.integers(1, 5000)),
    st.tuples(st.integers(2, 20000)),
    st.tuples(st.integers(2, 9), st.integers(1, 30), st.integers(1, 5), st.integers(1, 5)),
)


@given(st.integers(1, 300), st.integers(1, 4), st.integers(0, 2**31))
def test_rows_are_summed_in_the_same_tree(count, width, seed):
    rows = np.random.default_rng(seed).normal(size=(count, width)) * 10.0 ** np.arange(count)[:, None] % 1e9

    assert tree_sum_of_rows(rows).tobytes() == tree_sum(list(rows), np.add).tobytes()


@given(shapes, st.integers(0, 2**31), st.data())
def test_the_norm_has_the_same_bits_however_dimension_0_is_cut(shape, seed, data):
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    cut = data.draw(st.integers(1, shape[0] - 1))
    others = [torch.full((3, 3), 0.25), torch.tensor(2.0)]
    expected = canonical_norm([*others, whole])

    found = canonical_norm([*others, whole[:cut], whole[cut:].clone()])

    assert found.dtype == torch.float64
    assert found.item() == expected.item()


def test_the_norm_of_long_rows_has_the_same_bits_whether_a_row_is_alone_or_among_others():
    """Rows longer than torch's grain for threads (32,768): the sum must not be split for one row only."""
    whole = torch.randn(4, 300_000, generator=torch.Generator().manual_seed(1))

    assert canonical_norm([row.clone().unsqueeze(0) for row in whole]).item() == canonical_norm([whole]).item()


@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 7, 64, 129])), min_size=1, max_size=5),
    st.integers(1, 3000),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_sums_by_halves_have_the_same_bits_whatever_rows_are_summed_together(sizes, together, dtype, seed):
    """As on CUDA, where a kernel that sums goes by the number of rows."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.randn(rows, width, generator=generator).to(dtype) for rows, width in sizes]

    found = sums_by_halves(pieces, together)

    assert [len(sums) for sums in found] == [rows for rows, _ in sizes]
    for piece, sums in zip(pieces, found):
        assert torch.equal(sums, torch.cat([sums_by_halves([row.unsqueeze(0)], 1 << 20)[0] for row in piece]))
        torch.testing.assert_close(sums.double(), piece.double().square().sum(1), rtol=1e-5, atol=0)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 7)), min_size=1, max_size=6), st.integers(0, 2**31))
def test_the_norm_is_the_norm(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(a, b, generator=generator) for a, b in sizes]
    if not sum(t.numel() for t in tensors):
        return
    flat = torch.cat([t.double().reshape(-1) for t in tensors])

    assert canonical_norm(tensors).item() == pytest.approx(flat.norm().item(), rel=1e-6)


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=30), st.integers(1, 400))
def test_buckets_hold_every_tensor_once_in_order_and_one_dtype_each(sizes, limit):
    tensors = [torch.zeros(n, dtype=torch.float64 if wide else torch.float32) for n, wide in sizes]

    found = buckets_of(tensors, limit)

    assert [i for part in found for i in range(part.start, part.stop)] == list(range(len(tensors)))
    for part in found:
        inside = tensors[part]
        assert len({t.dtype for t in inside}) == 1
        assert len(inside) == 1 or sum(t.nbytes for t in inside) <= limit


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 40_000)])
def test_the_norm_of_complex_gradients_has_both_their_parts(shape):
    torch.manual_seed(0)
    gradients = [torch.randn(shape, dtype=torch.complex64), torch.randn(3)]

    assert canonical_norm(gradients).item() == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-6)
    sums = row_sums(gradients[:1])
    assert len(sums) == (shape[0] if shape else 1) * sums_per_row(shape, torch.complex64)
