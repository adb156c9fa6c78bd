"""Dealing a step's microbatches to ranks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.data.deal import batch_line, batch_table, check_microbatches, choose_microbatches, deal, efficiency, rounds
from elastic.errors import ConfigError


@given(st.integers(1, 2000), st.integers(1, 300))
def test_every_microbatch_goes_to_exactly_one_rank_in_contiguous_runs(v, w):
    runs = deal(v, w)

    assert len(runs) == w
    assert [m for run in runs for m in run] == list(range(v))


@given(st.integers(1, 2000), st.integers(1, 300))
def test_no_rank_has_two_more_than_another(v, w):
    lengths = [len(run) for run in deal(v, w)]

    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) == rounds(v, w)
    assert efficiency(v, w) == pytest.approx(v / (max(lengths) * w))


@given(st.integers(1, 4096), st.integers(1, 64))
def test_the_chosen_cut_divides_the_batch_and_gives_every_worker_something(b, w):
    if b < w:
        with pytest.raises(ConfigError, match=rf"--batch.global-size is {b}, .*--scaling.max-workers {w}; give at lea"):
            choose_microbatches(b, w)
        return

    v = choose_microbatches(b, w)

    assert b % v == 0
    check_microbatches(v, w)
    if b >= 4 * w:
        smaller = [d for d in range(4 * w, v) if b % d == 0]
        assert v >= 4 * w
        assert smaller == []
    else:
        assert v == b  # no divisor reaches 4 W, and B itself is the largest one that reaches W


@pytest.mark.parametrize(
    ("b", "w", "v"), [(512, 16, 64), (64, 2, 8), (60, 4, 20), (7, 2, 7), (8, 8, 8), (1, 1, 1), (97, 3, 97)]
)
def test_examples_of_the_chosen_cut(b, w, v):
    assert choose_microbatches(b, w) == v


def test_fewer_microbatches_than_workers_are_refused_by_name():
    check_microbatches(4, 4)

    with pytest.raises(ConfigError, match=r"--batch\.microbatches is 3, less than --scaling\.max-workers 4"):
        check_microbatches(3, 4)


def test_the_table_says_what_each_world_size_would_do():
    assert batch_table(12, 5) == [
        (1, 12, 1.0),
        (2, 6, 1.0),
        (3, 4, 1.0),
        (4, 3, 1.0),
        (5, 3, pytest.approx(0.8)),
    ]
    assert batch_line(512, 64, 16) == "global 512 = 64 microbatches x 8; 16 workers -> 4 rounds"


def test_cells_are_told_and_counted_instead_of_workers():
    assert batch_line(512, 64, 16, 4) == (
        "global 512 = 64 microbatches x 8; 16 workers = 4 cells x 4 tensor, 0 spare -> 16 rounds"
    )
    assert batch_table(8, 6, 2) == [(2, 8, 1.0), (4, 4, 1.0), (6, 3, 8 / 9)]
    assert choose_microbatches(64, 16, 4) == 16
    with pytest.raises(ConfigError) as refused:
        check_microbatches(3, 8, 2)
    assert str(refused.value) == (
        "--batch.microbatches is 3, less than the 4 cells of --scaling.max-workers 8 (--parallel.tensor 2); every cell "
        "needs at least one microbatch of each step"
    )


def test_with_pipelines_there_may_be_fewer_microbatches_than_workers_but_not_than_pipelines():
    check_microbatches(2, 9, 2, stages=2)
    assert choose_microbatches(3, 6, stages=2) == 3
    assert choose_microbatches(64, 4, stages=2) == choose_microbatches(64, 4), "they should reach no bit"
    with pytest.raises(ConfigError) as refused:
        check_microbatches(2, 12, 2, stages=2)
    assert str(refused.value) == (
        "--batch.microbatches is 2, less than the 3 pipelines of --scaling.max-workers 12 (--parallel.pipeline 2 "
        "--parallel.tensor 2); every pipeline needs at least one microbatch of each step"
    )
    with pytest.raises(ConfigError, match=r"global-size is 2, less than the 3 pipelines .* give at least 3"):
        choose_microbatches(2, 6, stages=2)
