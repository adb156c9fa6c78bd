"""Fetching samples by id, each under a seed of its own, so that a sample does not depend on which others are
fetched."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, StackDataset, Subset

from elastic.job import Plan
from elastic.seeds import seed_all

_MOST_INNER = 64  # longer lists are not searched for inner datasets


class Told:
    """A dataset that is told which positions it is asked for next, so that it can read ahead."""

    def bind(self, plan: Plan) -> None:
        """Called first, with the run's plan."""

    def upcoming(self, first: int, count: int) -> None:
        """The samples at positions `[first, first + count)` are fetched next, in this process."""

    def some(self) -> list[int] | None:
        """The ids of a few samples that stand for all of them; None for any."""
        return None

    def close(self) -> None:
        """Nothing more is fetched in this process."""


def fetches_together(data: Any) -> bool:
    """Whether a dataset has its own method to fetch several samples in one call.

    The method of torch's Subset and StackDataset only passes the call on, so their inner datasets decide.
    """
    method = getattr(type(data), "__getitems__", None)
    if isinstance(data, Subset) and method is Subset.__getitems__:
        return fetches_together(data.dataset)
    if isinstance(data, StackDataset) and method is StackDataset.__getitems__:
        inner = data.datasets.values() if isinstance(data.datasets, dict) else data.datasets
        return any(map(fetches_together, inner))
    return callable(getattr(data, "__getitems__", None))


def fetch_each(data: Any, ids: Sequence[int], seed_of: Callable[[int], int]) -> list[Any]:
    """Fetch samples one by one; the one at index `i` of `ids` under the seed `seed_of(i)`."""
    samples = []
    for place, sample in enumerate(ids):
        seed_all(seed_of(place))
        samples.append(data[sample])
    return samples


def draws(work: Callable[[], object]) -> bool:
    """Whether `work` draws random numbers. It is called once, under a fixed seed."""
    seed_all(0)
    before = random_state()
    work()
    return random_state() != before


def random_state() -> tuple[object, ...]:
    """Return the states of Python's, numpy's and torch's global generators; they can be compared and hashed."""
    _, keys, *rest = tuple(np.random.get_state(legacy=True))
    return random.getstate(), np.asarray(keys).tobytes(), *rest, torch.get_rng_state().numpy().tobytes()


def untouched(data: Any) -> Any:
    """Return a copy of a dataset from which samples can be tried, so that the original, which is sent to other
    processes later, stays as it is.

    Many datasets open their files at the first sample and then hold what cannot be sent to another process. The copy is
    shallow: it, and every dataset in it, has its own attributes, but shares their values.
    """
    try:
        return _copied(data) if is_dataset(data) else data
    except Exception:  # its class does not allow copies, so the dataset itself is tried
        return data


def nested_datasets(data: Any) -> list[Any]:
    """Return a dataset and, at any depth, the datasets that it holds."""
    found, seen = [data], {id(data)}
    for dataset in found:
        values = list(getattr(dataset, "__dict__", {}).values())
        lists = [v for v in values if isinstance(v, (list, tuple)) and len(v) <= _MOST_INNER]
        for value in [*values, *(inner for some in lists for inner in some)]:
            if is_dataset(value) and id(value) not in seen:
                seen.add(id(value))
                found.append(value)
    return found


def _copied(data: Any) -> Any:
    changed = copy.copy(data)
    for name, value in list(vars(changed).items()):
        if isinstance(value, (list, tuple)) and len(value) <= _MOST_INNER and any(map(is_dataset, value)):
            setattr(changed, name, type(value)([untouched(item) for item in value]))
        elif is_dataset(value):
            setattr(changed, name, untouched(value))
    return changed


def is_dataset(value: Any) -> bool:
    if isinstance(value, Dataset):
        return True
    library = type(value).__module__.partition(".")[0]
    indexed = hasattr(type(value), "__getitem__") and hasattr(type(value), "__len__") and hasattr(value, "__dict__")
    return indexed and library not in ("torch", "numpy", "pandas", "builtins", "collections")


def halves(samples: list[Any]) -> list[list[Any]]:
    """Return the first and the second half of the samples; an empty list for fewer than two samples."""
    middle = len(samples) // 2
    return [samples[:middle], samples[middle:]] if middle else []
