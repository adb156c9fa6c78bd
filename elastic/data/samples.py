"""Samples by id, each drawn under a seed of its own, so that it does not matter which others are fetched beside it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, StackDataset, Subset

from elastic.seeds import seed_all

_MOST_PARTS = 64  # datasets in a list that are looked at one by one


def fetches_together(data: Any) -> bool:
    """Whether a dataset has a way of its own to fetch several samples in one call.

    torch's Subset and StackDataset have the method only to pass the call on.
    """
    method = getattr(type(data), "__getitems__", None)
    if isinstance(data, Subset) and method is Subset.__getitems__:
        return fetches_together(data.dataset)
    if isinstance(data, StackDataset) and method is StackDataset.__getitems__:
        parts = data.datasets.values() if isinstance(data.datasets, dict) else data.datasets
        return any(map(fetches_together, parts))
    return callable(getattr(data, "__getitems__", None))


def fetch_each(data: Any, ids: Sequence[int], seed_of: Callable[[int], int]) -> list[Any]:
    """Samples one by one, that at `place` of `ids` under `seed_of(place)`."""
    samples = []
    for place, sample in enumerate(ids):
        seed_all(seed_of(place))
        samples.append(data[sample])
    return samples


def draws(work: Callable[[], object]) -> bool:
    """Whether some work, which is done once under a seed, takes random numbers."""
    seed_all(0)
    before = random_state()
    work()
    return random_state() != before


def random_state() -> tuple[object, ...]:
    """Where Python's, numpy's and torch's random numbers are; to be compared and hashed."""
    _, keys, *rest = tuple(np.random.get_state(legacy=True))
    return random.getstate(), np.asarray(keys).tobytes(), *rest, torch.get_rng_state().numpy().tobytes()


def untouched(data: Any) -> Any:
    """A dataset to try samples of, without a trace in the one that is sent to other processes later.

    Many open their files at the first sample, once in each process, and keep on themselves what cannot be sent. Of
    datasets, and of those they are made of, the copy has its own attributes; what these hold is shared.
    """
    try:
        return _copied(data) if _is_dataset(data) else data
    except Exception:  # what its class makes of being copied: then it is tried itself
        return data


def parts(data: Any) -> list[Any]:
    """A dataset, and those that it is made of."""
    found, seen = [data], {id(data)}
    for one in found:
        values = list(getattr(one, "__dict__", {}).values())
        lists = [v for v in values if isinstance(v, (list, tuple)) and len(v) <= _MOST_PARTS]
        for value in [*values, *(inner for some in lists for inner in some)]:
            if _is_dataset(value) and id(value) not in seen:
                seen.add(id(value))
                found.append(value)
    return found


def _copied(data: Any) -> Any:
    changed = copy.copy(data)
    for name, value in list(vars(changed).items()):
        if isinstance(value, (list, tuple)) and len(value) <= _MOST_PARTS and any(map(_is_dataset, value)):
            setattr(changed, name, type(value)([untouched(part) for part in value]))
        elif _is_dataset(value):
            setattr(changed, name, untouched(value))
    return changed


def _is_dataset(value: Any) -> bool:
    if isinstance(value, Dataset):
        return True
    library = type(value).__module__.partition(".")[0]
    indexed = hasattr(type(value), "__getitem__") and hasattr(type(value), "__len__") and hasattr(value, "__dict__")
    return indexed and library not in ("torch", "numpy", "pandas", "builtins", "collections")


def halves(samples: list[Any]) -> list[list[Any]]:
    """The first and the other half of at least two samples; of fewer there are none."""
    middle = len(samples) // 2
    return [samples[:middle], samples[middle:]] if middle else []
