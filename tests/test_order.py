"""The order of samples: a permutation an epoch, from nothing but (seed, epoch, position)."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.data import order
from elastic.data.fetching import Order
from elastic.data.order import permute, sample_ids

seeds = st.integers(0, 2**63 - 1)
lengths = st.integers(1, 3000)


@given(lengths, seeds, st.integers(0, 10**9))
def test_an_epoch_takes_every_sample_exactly_once(n, seed, epoch):
    ids = permute(seed, epoch, n, np.arange(n))

    assert ids.dtype == np.int64
    assert sorted(ids.tolist()) == list(range(n))


@given(st.integers(1, 500), seeds, st.integers(1, 4), st.integers(0, 3))
def test_positions_of_several_epochs_take_every_sample_once_an_epoch(n, seed, epochs, first_epoch):
    positions = np.arange(first_epoch * n, (first_epoch + epochs) * n)

    ids = sample_ids(seed, n, positions)

    for epoch in range(epochs):
        assert sorted(ids[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@given(st.integers(2, 3000), seeds, st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_a_position_gives_the_same_sample_alone_as_among_others(n, seed, positions):
    together = sample_ids(seed, n, np.array(positions))

    alone = [int(sample_ids(seed, n, np.array([p]))[0]) for p in positions]

    assert together.tolist() == alone


@given(st.integers(50, 3000), seeds, st.integers(0, 1000))
def test_another_seed_or_another_epoch_gives_another_order(n, seed, epoch):
    here = permute(seed, epoch, n, np.arange(n)).tolist()

    assert permute(seed, epoch + 1, n, np.arange(n)).tolist() != here
    assert permute((seed + 1) % 2**63, epoch, n, np.arange(n)).tolist() != here


def test_every_order_of_four_samples_occurs():
    orders = {tuple(permute(0, epoch, 4, np.arange(4)).tolist()) for epoch in range(1000)}

    assert len(orders) == 24


@pytest.mark.parametrize("seed", range(5))
def test_a_sample_s_place_says_nothing_about_its_number(seed):
    n = 10_000
    ids = permute(seed, 0, n, np.arange(n))

    # Four standard deviations of the correlation of a random permutation are 0.04.
    assert abs(np.corrcoef(ids, np.arange(n))[0, 1]) < 0.04
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.04


def test_a_position_among_a_trillion_samples_costs_what_it_costs_among_a_thousand(monkeypatch):
    walked = []
    real = order._feistel

    def counting(x, bits, keys):
        walked.append(len(x))
        return real(x, bits, keys)

    monkeypatch.setattr(order, "_feistel", counting)
    n = 10**12
    positions = np.arange(7 * n - 500, 7 * n + 500)
    tracemalloc.start()
    try:
        ids = sample_ids(3, n, positions)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(set(ids.tolist())) >= 999  # two epochs meet here: one number may occur in both
    assert ids.min() >= 0
    assert ids.max() < n
    # 2**40 / 10**12 = 1.1 walks a position are expected; the worst length has just under 2.
    assert sum(walked) < 1.2 * len(positions)
    assert peak_bytes < 1_000_000


@given(st.integers(2, 3000), seeds)
def test_cycle_walking_takes_fewer_than_two_walks_a_position(n, seed):
    walked = []
    real = order._feistel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "_feistel", lambda x, bits, keys: walked.append(len(x)) or real(x, bits, keys))
        permute(seed, 0, n, np.arange(n))

    # All n positions together walk over each of the 2**k < 2n values at most once.
    assert sum(walked) <= max(4, 2 * n)


def test_the_order_is_the_one_of_every_version():
    """Stored runs are resumed by newer versions: these values may never change."""
    assert permute(0, 0, 10, np.arange(10)).tolist() == [6, 9, 4, 1, 7, 5, 0, 8, 2, 3]
    assert permute(1, 0, 10, np.arange(10)).tolist() == [7, 0, 8, 1, 2, 6, 3, 5, 4, 9]
    assert permute(0, 1, 10, np.arange(10)).tolist() == [2, 4, 0, 5, 9, 7, 1, 6, 3, 8]
    assert sample_ids(7, 1000, np.array([0, 999, 1000, 1001, 123456])).tolist() == [644, 900, 839, 768, 407]
    far = permute(2**63 - 1, 999, 10**12, np.array([0, 1, 10**12 - 1])).tolist()
    assert far == [949855016280, 557864472065, 770571610329]


@given(seeds, st.integers(1, 6), st.integers(1, 5), st.integers(0, 50), st.data())
def test_a_span_is_the_same_samples_however_a_step_is_cut_into_spans(seed, size, microbatches, step, data):
    run_order = Order(seed=seed, dataset_size=37, global_size=size * microbatches, microbatches=microbatches)
    cut = data.draw(st.integers(0, microbatches))
    whole = run_order.span(step, 0, microbatches)

    pieces = [run_order.span(step, first, n) for first, n in ((0, cut), (cut, microbatches - cut)) if n]

    assert [i for p in pieces for i in p.ids.tolist()] == whole.ids.tolist()
    assert [d for p in pieces for d in p.digests] == list(whole.digests)
    assert whole.first_position == step * size * microbatches
    assert all(-(2**63) <= d < 2**63 for d in whole.digests)
