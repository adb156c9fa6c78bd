"""Seeds from what they are for."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.seeds import derive, seed_all

part = st.integers(-(2**70), 2**70) | st.text(st.characters(exclude_characters="/"), max_size=8)


@given(st.lists(part, min_size=1, max_size=5))
def test_a_seed_fits_every_generator_and_is_the_same_again(key):
    seed = derive(*key)

    assert 0 <= seed < 2**63
    assert derive(*key) == seed


@given(st.lists(part, min_size=1, max_size=4), st.lists(part, min_size=1, max_size=4))
def test_another_key_gives_another_seed(one, other):
    assert (derive(*one) == derive(*other)) == (list(map(str, one)) == list(map(str, other)))


def test_neighbouring_steps_and_microbatches_have_seeds_of_their_own():
    seeds = {derive("step", 0, step, microbatch) for step in range(100) for microbatch in range(100)}

    assert len(seeds) == 10_000


def test_the_seeds_are_those_of_every_version():
    assert derive("model", 0) == 961444092178583723
    assert derive("step", 1, 2, 3) == 8720757617900768857


def test_seeding_reaches_python_numpy_and_torch():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        seed_all(5)
        first = draw()
        seed_all(6)
        other = draw()
        seed_all(5)
        assert draw() == first
        assert all(a != b for a, b in zip(first, other, strict=True))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@pytest.mark.processes
def test_torch_is_seeded_when_it_is_imported_later():
    program = """
import importlib.util, sys
from elastic.seeds import derive, seed_all, seed_job
seed_all(1)
seed_job()
importlib.util.find_spec("torch")  # only asked for
assert "torch" not in sys.modules
import torch
later = torch.rand(3)
torch.manual_seed(derive("job"))
assert torch.equal(later, torch.rand(3))
seed_all(1)
assert torch.initial_seed() == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
