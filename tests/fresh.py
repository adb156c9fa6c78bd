"""Seeds of random tests: `make test` always takes the same ones, `make test-long` takes some that nobody ever tried."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
from hypothesis import settings

#: The first of this run's fresh seeds, the same in all processes that run tests side by side; what fails says its seed.
VARIABLE = "FRESH_SEEDS"


def choose() -> None:
    """Choose this run's fresh seeds, unless the environment did."""
    os.environ.setdefault(VARIABLE, str(random.SystemRandom().randrange(1_000_000, 1_000_000_000)))


def seeds(fixed: range, fresh: int, variable: str, slow: range = range(0)) -> list[Any]:
    """Parameters of a random test: the fixed seeds, and so many fresh ones, which are marked `long` and `random`.

    Args:
        variable: an environment variable that names other seeds instead, such as "0:500".
        slow: fixed seeds too, which are marked `long`.
    """
    if variable in os.environ:
        start, end = map(int, os.environ[variable].split(":"))
        return list(range(start, end))
    first = int(os.environ[VARIABLE])
    return [
        *fixed,
        *(pytest.param(seed, marks=pytest.mark.long) for seed in slow),
        *(pytest.param(seed, marks=[pytest.mark.long, pytest.mark.random]) for seed in range(first, first + fresh)),
    ]


def examples(usual: int, fresh: int) -> int:
    """How many examples a costly test of hypothesis draws: the usual ones are always the same, and fewer."""
    return usual if settings.default.derandomize else fresh
