"""Data of random jobs: how samples are kept, fetched and augmented, and what a batch is."""

from __future__ import annotations

import dataclasses
import random
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from tests.random_jobs.layers import CLASSES, FEATURES, TOKENS, VOCABULARY

FIELDS = ("x", "tokens", "length", "label", "weight")
Fields = namedtuple("Fields", FIELDS)


@dataclasses.dataclass
class Record:
    """A batch as a dataclass."""

    x: torch.Tensor
    tokens: torch.Tensor
    length: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor


class Bag(Mapping):
    """A batch as a mapping that is no dict."""

    def __init__(self, values: Mapping[str, torch.Tensor]):
        self._values = dict(values)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Movable:
    """A batch that moves itself, as those of other libraries do."""

    def __init__(self, values: Mapping[str, torch.Tensor]):
        self.values = dict(values)

    def to(self, device: Any, non_blocking: bool = False) -> Movable:
        return Movable({k: v.to(device, non_blocking=non_blocking) for k, v in self.values.items()})


def columns(count: int, seed: int) -> list[torch.Tensor]:
    """The data, column by column: a class that the features decide, tokens up to a length, weights of samples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    length = torch.randint(1, TOKENS + 1, (count,), generator=generator)
    tokens = torch.randint(1, VOCABULARY, (count, TOKENS), generator=generator)
    tokens = tokens * (torch.arange(TOKENS) < length.unsqueeze(1))
    label = (x[:, 0] > 0).long() + (x[:, 1] + 0.2 * tokens[:, 0] > 1).long()
    assert int(label.max()) < CLASSES
    return [x, tokens, length, label, torch.rand(count, generator=generator) + 0.1]


class Plain:
    """Samples as tuples."""

    def __init__(self, count: int, seed: int):
        self.columns = columns(count, seed)

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int) -> Any:
        return tuple(column[index] for column in self.columns)


class Augmented(Plain):
    """Noise by torch, numpy and random, drawn when a sample is fetched."""

    def __getitem__(self, index: int) -> Any:
        x, *rest = super().__getitem__(index)
        return x * random.uniform(0.8, 1.2) + float(np.random.randn()) * 0.1 + 0.1 * torch.randn(FEATURES), *rest


class Fetched(Plain):
    """Several samples at a time."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        taken = [column[indices] for column in self.columns]
        return [tuple(column[i] for column in taken) for i in range(len(indices))]


class FetchedAugmented(Fetched):
    """Several samples at a time, with noise that is drawn for all of them."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        noise = 0.1 * torch.randn(len(indices), FEATURES)
        return [(x + n, *rest) for n, (x, *rest) in zip(noise, super().__getitems__(indices))]


class Dicts(Plain):
    def __getitem__(self, index: int) -> Any:
        return dict(zip(FIELDS, super().__getitem__(index)))


class Named(Plain):
    def __getitem__(self, index: int) -> Any:
        return Fields(*super().__getitem__(index))


class Raw(Plain):
    """Numbers and arrays instead of tensors."""

    def __getitem__(self, index: int) -> Any:
        x, tokens, length, label, weight = super().__getitem__(index)
        return x.numpy(), tokens.numpy(), int(length), int(label), float(weight)


def _subset(kind: type[Plain]) -> Callable[[int, int], Any]:
    return lambda count, seed: Subset(kind(count + 5, seed), list(range(count + 4, 4, -1)))


DATA: dict[str, Callable[[int, int], Any]] = {
    "plain": Plain,
    "augmented": Augmented,
    "fetched": Fetched,
    "fetched_augmented": FetchedAugmented,
    "dicts": Dicts,
    "named": Named,
    "raw": Raw,
    "list": lambda count, seed: [tuple(row) for row in zip(*columns(count, seed))],
    "tensors": lambda count, seed: TensorDataset(*columns(count, seed)),
    "subset": _subset(Plain),
    "augmented_subset": _subset(Augmented),
    "joined": lambda count, seed: ConcatDataset([Plain(count // 2, seed), Plain(count - count // 2, seed + 1)]),
}


def _values(samples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Samples of any of the kinds above, stacked; tokens as wide as the longest."""
    rows = [tuple(s.values()) if isinstance(s, dict) else s for s in samples]
    stacked = [torch.stack([torch.as_tensor(value) for value in column]) for column in zip(*rows)]
    found = dict(zip(FIELDS, stacked))
    found["weight"] = found["weight"].float()
    found["tokens"] = found["tokens"][:, : int(found["length"].max())]
    return found


def _mixed(samples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Samples mixed with each other, by shares that are drawn."""
    found = _values(samples)
    share = 0.3 * torch.rand(len(samples), 1)
    return found | {"x": (1 - share) * found["x"] + share * found["x"].flip(0)}


#: By name: what makes a batch; "default" is torch's own collate function.
BATCHES: dict[str, Callable[[Sequence[Any]], Any] | None] = {
    "default": None,
    "padded_dict": _values,
    "mixed": _mixed,
    "list": lambda samples: list(_values(samples).values()),
    "named": lambda samples: Fields(**_values(samples)),
    "dataclass": lambda samples: Record(**_values(samples)),
    "mapping": lambda samples: Bag(_values(samples)),
    "movable": lambda samples: Movable(_values(samples)),
}


def fields(batch: Any) -> Fields:
    """The columns of a batch, whatever it is."""
    if isinstance(batch, Movable):
        return Fields(**batch.values)
    if isinstance(batch, Record):
        return Fields(**vars(batch))
    if isinstance(batch, Mapping):
        return Fields(**batch)
    return Fields(*batch)
