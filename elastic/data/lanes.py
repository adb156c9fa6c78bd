"""Streams whose length nobody knows, as data: `elastic.Lanes`.

A stream is cut into lanes, one for each microbatch of a step, fixed for the run. Step s takes the next samples of each
lane, whoever runs its microbatch: the sample at a position is that of a lane and a count, so that where a lane is
follows from the step. Nothing of it is saved. A worker that is dealt a lane goes there by skipping.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from elastic.data.samples import Told
from elastic.errors import ConfigError
from elastic.job import Plan
from elastic.seeds import unseeded
from elastic.units import ENDLESS

MOST_TIMES = 4  # that each part of a dataset may be read, where it has fewer parts than there are lanes
_TRIED = 6


class Lanes(Told):
    """A stream of samples, in as many lanes as a step has microbatches.

    A lane that ends begins again. Durations are in steps or tokens. Each lane has its own order: what is shuffled is
    shuffled inside it.

    Args:
        open: from the number of a lane and the number of lanes to its samples: an iterable that gives the same ones
            whenever it is opened. If it has a method `skip(count)`, as the streams of datasets have, a lane that is not
            at its begin is opened by that; else samples are made and dropped.
    """

    def __init__(self, open: Callable[[int, int], Iterable[Any]]):
        self.open = open
        self._plan = Plan(1, 1, ENDLESS)
        self._lanes: dict[int, _Lane] = {}

    @classmethod
    def of(cls, dataset: Any) -> Lanes:
        """The lanes of an `IterableDataset` of datasets (`load_dataset(..., streaming=True)`), cut by its shards.

        Where it has fewer shards than there are lanes, several lanes read one, and each takes its share of it.
        """
        return cls(_OfShards(dataset))

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Any:
        """The sample at this position of the run.

        Raises:
            ValueError: its lane has no samples.
        """
        plan = self._plan
        size, lanes = plan.microbatch_size, plan.batch_size // plan.microbatch_size
        step, place = divmod(index, plan.batch_size)
        lane, within = divmod(place, size)
        if lane not in self._lanes:
            self._lanes[lane] = _Lane(self.open, lane, lanes, keeps=size if plan.phases else 0)
        return self._lanes[lane].at(step * size + within)

    def order(self, positions: np.ndarray, plan: Plan) -> np.ndarray:
        """Samples are numbered by their positions."""
        return positions

    def bind(self, plan: Plan) -> None:
        self._plan, self._lanes = plan, {}

    def some(self) -> list[int]:
        size, lanes = self._plan.microbatch_size, self._plan.batch_size // self._plan.microbatch_size
        return [lane * size for lane in range(min(lanes, _TRIED))]

    def close(self) -> None:
        self._lanes = {}

    def __copy__(self) -> Lanes:
        other = type(self)(self.open)
        other.bind(self._plan)
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {"open": self.open, "_plan": self._plan, "_lanes": {}}


class _Lane:
    """One lane, read on from where it was asked for last.

    Args:
        keeps: the newest samples of which copies are kept, for the next phase, which takes the same.
    """

    def __init__(self, open: Callable[[int, int], Iterable[Any]], lane: int, lanes: int, keeps: int = 0):
        self._kept, self._keeps = dict[int, Any](), keeps
        self._open, self._lane, self._lanes = open, lane, lanes
        self._length: int | None = None  # of one turn, once its end was seen
        self._samples: Iterator[Any] | None = None
        self._next = 0  # how many samples come before the one that is next
        self._skipped = False  # to there, and nothing was seen since

    def at(self, count: int) -> Any:
        """The sample that `count` samples come before."""
        if count in self._kept:
            return copy.deepcopy(self._kept[count])
        if self._samples is None or count != self._next:
            with unseeded():  # a sample's random numbers do not go by what was skipped
                self._go_to(count)
        sample = self._take()
        if self._keeps:
            self._kept.pop(count - self._keeps, None)
            self._kept[count] = copy.deepcopy(sample)
        return sample

    def _go_to(self, count: int) -> None:
        if self._samples is None or count < self._next:
            opened = self._open(self._lane, self._lanes)
            skip = getattr(opened, "skip", None)
            within = count % self._length if self._length else count
            self._skipped = callable(skip) and within > 0
            self._samples = iter(skip(within) if self._skipped else opened)  # type: ignore[misc]
            self._next = count if self._skipped else count - within
        while self._next < count:
            self._take()

    def _take(self) -> Any:
        for _ in range(3):  # after what was skipped, after the end of a turn, and at the begin of one
            assert self._samples is not None
            for sample in self._samples:
                self._next, self._skipped = self._next + 1, False
                return sample
            if self._skipped:  # a turn ends before that: how long it is must be known
                self._again()
            else:
                self._length = self._length or self._next
                self._samples = iter(self._open(self._lane, self._lanes))
        raise ValueError(
            f"lane {self._lane} of {self._lanes} of the stream has no samples; give a smaller --batch.microbatches, or "
            "a stream that has some for each lane"
        )

    def _again(self) -> None:
        count, self._skipped, self._next = self._next, False, 0
        self._samples = iter(self._open(self._lane, self._lanes))
        with unseeded():
            while self._next < count:
                self._take()


class _OfShards:
    """Opens a lane of a dataset that has shards."""

    def __init__(self, dataset: Any):
        if not (callable(getattr(dataset, "shard", None)) and isinstance(getattr(dataset, "num_shards", None), int)):
            raise ConfigError(
                f"Lanes.of() was given a {type(dataset).__name__}, which has no shard() and num_shards; give an "
                "IterableDataset of datasets, or elastic.Lanes(open) with a function of (lane, lanes)"
            )
        self._dataset = dataset

    def __call__(self, lane: int, lanes: int) -> Iterable[Any]:
        parts = self._dataset.num_shards
        if parts >= lanes:
            return self._dataset.shard(num_shards=lanes, index=lane)
        times = -(-lanes // parts)
        if times > MOST_TIMES:
            raise ConfigError(
                f"the stream has {parts} shards for {lanes} lanes, so that each would be read {times} times; give at "
                f"most --batch.microbatches {parts * MOST_TIMES}, or a stream with more shards, as "
                "IterableDataset.reshard() may make it"
            )
        part = lane % parts
        sharing = len(range(part, lanes, parts))  # lanes that read this shard
        return _Every(self._dataset.shard(num_shards=parts, index=part), lane // parts, sharing)


class _Every:
    """Each `every`-th sample of an iterable, from one on."""

    def __init__(self, samples: Iterable[Any], first: int, every: int):
        self._samples, self._first, self._every = samples, first, every

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._samples, self._first, None, self._every)
