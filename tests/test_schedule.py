"""Learning-rate factors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.worker.schedule import factor


def _all(total, **options):
    return [factor(step, total, **options) for step in range(total)]


def test_warm_up_rises_in_equal_steps_to_the_full_rate():
    assert _all(6, schedule="constant", warmup_steps=4, final=0.1) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_cosine_goes_from_the_full_rate_through_the_middle_to_the_final_one():
    factors = _all(5, schedule="cosine", warmup_steps=0, final=0.2)

    assert factors[0] == 1.0
    assert factors[2] == pytest.approx(0.6)
    assert factors[4] == pytest.approx(0.2)


@given(st.integers(1, 500), st.integers(0, 600), st.floats(0, 1), st.sampled_from(["constant", "cosine"]))
def test_after_the_warm_up_the_rate_never_rises_and_stays_between_final_and_full(total, warmup, final, schedule):
    factors = _all(total, schedule=schedule, warmup_steps=warmup, final=final)

    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert all(0 < f <= 1 for f in factors[:warmup])
    assert all(final - 1e-12 <= f <= 1 for f in factors[warmup:])
