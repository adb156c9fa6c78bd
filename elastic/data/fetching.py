"""Fetching one span of microbatches by its key, under seeds from (seed, epoch, sample id).

The result depends on the key alone, not on the process, the rank or what was fetched before.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import xxhash

from elastic.data.order import sample_ids
from elastic.data.samples import Told, draws, fetch_each, fetches_together, halves
from elastic.errors import one_line
from elastic.job import Job
from elastic.phases import NO_PHASES, Cycle
from elastic.seeds import derive, seed_all

SHOWN = 16  # the most sample ids that are shown in a message


@dataclass(frozen=True)
class Span:
    """Consecutive microbatches of one step.

    Args:
        step: from 0.
        first: the index of the first microbatch in the step.
        first_position: the position of the first sample in the endless order.
        ids: int64 [microbatches x microbatch size], the sample ids.
        digests: for each microbatch xxh3_64 over its little-endian int64 sample ids, as a signed 64-bit integer.
        batch: one collated batch of all samples, once it is fetched.
        error: why a loader process has no batch.
    """

    step: int
    first: int
    first_position: int
    ids: np.ndarray
    digests: tuple[int, ...]
    batch: Any = None
    error: ItemError | None = None


NO_SPAN = Span(-1, 0, 0, np.empty(0, dtype=np.int64), ())  # fetches nothing


class Order:
    """The samples of a run's microbatches, by step and index of the microbatch.

    Args:
        ids: the job's own order, from int64 positions to sample ids; by default each epoch is a new permutation.
        cycle: of phases, of which several take one batch.
    """

    def __init__(
        self,
        *,
        seed: int,
        dataset_size: int,
        global_size: int,
        microbatches: int,
        ids: Callable[[np.ndarray], np.ndarray] | None = None,
        cycle: Cycle = NO_PHASES,
    ):
        self.seed, self.dataset_size = seed, dataset_size
        self.ids = ids or partial(sample_ids, seed, dataset_size)
        self.own, self.cycle = ids is not None, cycle
        self.global_size, self.microbatches = global_size, microbatches
        self.size = global_size // microbatches
        self._batch, self._ids = -1, np.empty(0, dtype=np.int64)

    def span(self, step: int, first: int, count: int) -> Span:
        """Return the microbatches `first` to `first + count - 1` of `step` (from 0), not fetched."""
        batch = self.cycle.batch(step)
        if batch != self._batch:  # the ids of all its microbatches take no longer than those of one
            positions = np.arange(batch * self.global_size, (batch + 1) * self.global_size, dtype=np.int64)
            self._batch, self._ids = batch, self.ids(positions)
        begin = first * self.size
        position, ids = batch * self.global_size + begin, self._ids[begin : begin + count * self.size]
        rows = ids.astype("<i8").reshape(count, self.size)
        digests = (xxhash.xxh3_64_intdigest(row.tobytes()) for row in rows)
        return Span(step, first, position, ids, tuple(d - (1 << 64) if d >= 1 << 63 else d for d in digests))


class ItemError(Exception):
    """An exception that the job's data raised.

    Args:
        kind: the name of the exception's type.
        line: the last line of its traceback.
        text: the whole traceback.
        samples: the ids of the sample that was fetched, or of all samples that were fetched or collated together.
    """

    def __init__(self, kind: str, line: str, text: str, samples: tuple[int, ...]):
        super().__init__(line)
        self.kind, self.line, self.text, self.samples = kind, line, text, samples

    @classmethod
    def of(cls, error: BaseException, samples: Sequence[int]) -> ItemError:
        """Wrap an exception that was raised while these samples were fetched or collated."""
        text = "".join(traceback.format_exception(error)).rstrip()
        return cls(type(error).__name__, one_line(error), text, tuple(samples))

    def __reduce__(self) -> tuple[type[ItemError], tuple[str, str, str, tuple[int, ...]]]:
        return type(self), (self.kind, self.line, self.text, self.samples)


class Fetcher:
    """Fetches and collates the samples of a span, under seeds that depend on the samples alone.

    Args:
        data: a map-style dataset.
        seed: the seed of the run.
        by_position: an epoch may have a sample several times: what is drawn for it goes by its position too.

    `at` has the ids of the samples that are being fetched or collated.
    """

    def __init__(
        self,
        data: Any,
        collate_fn: Callable[[Any], Any],
        seed: int,
        dataset_size: int,
        *,
        by_position: bool = False,
    ):
        self.data, self.collate_fn, self.seed, self.dataset_size = data, collate_fn, seed, dataset_size
        self.by_position = by_position
        self._fetches_together = fetches_together(data)
        self._makes_batches: bool | None = None  # whether `__getitems__` returns no list; unknown before the first call
        self.at: Sequence[int] = ()

    def __getitem__(self, span: Span) -> Span:
        """Fetch a span and return it with its batch.

        Raises:
            ItemError: the dataset or collate_fn raised.
        """
        try:
            if not len(span.ids):
                return span
            if isinstance(self.data, Told):
                self.data.upcoming(span.first_position, len(span.ids))
            samples = self._together(span) if self._fetches_together else self._one_by_one(span)
            self.at = span.ids.tolist()
            seed_all(derive("collate", self.seed, self._when(span, 0), span.digests[0]))
            return replace(span, batch=self.collate_fn(samples))
        except (Exception, SystemExit) as error:
            raise ItemError.of(error, self.at) from error
        finally:
            self.at = ()

    def _one_by_one(self, span: Span) -> list[Any]:
        ids = span.ids.tolist()

        def seed(i: int) -> int:  # called right before the sample is fetched
            self.at = ids[i : i + 1]
            return derive("item", self.seed, self._when(span, i), ids[i])

        return fetch_each(self.data, ids, seed)

    def _together(self, span: Span) -> Any:
        """Fetch by the dataset's `__getitems__`, called for one microbatch at a time, because the number of
        microbatches in a span depends on the world.

        If the method returns whole batches instead of lists of samples, it is called once for the span.
        """
        if self._makes_batches is None:
            self._makes_batches = not isinstance(self._fetch(span, 0, 1), list)
        if self._makes_batches:
            return self._fetch(span, 0, len(span.digests))
        return [sample for i in range(len(span.digests)) for sample in self._fetch(span, i, 1)]

    def _fetch(self, span: Span, first: int, count: int) -> Any:
        size = len(span.ids) // len(span.digests)
        seed_all(derive("items", self.seed, self._when(span, first * size), span.digests[first]))
        ids = span.ids[first * size : (first + count) * size].tolist()
        self.at = tuple(ids)
        return self.data.__getitems__(ids)

    def _when(self, span: Span, place: int) -> int:
        position = span.first_position + place
        return position if self.by_position else position // self.dataset_size

    # ---- trials before training --------------------------------------------------------------------------------

    @property
    def collates_plainly(self) -> bool:
        """Whether batches are made by torch's `default_collate`."""
        return getattr(self.collate_fn, "__func__", None) is Job.collate_fn

    @property
    def makes_batches(self) -> bool:
        """Whether the dataset makes whole batches; False before the first fetch."""
        return bool(self._makes_batches)

    def one(self, sample: int) -> Any:
        """Fetch one sample under its seed of the first epoch; by `__getitems__` if the dataset has it."""
        seed_all(derive("item", self.seed, 0, sample))
        if not self._fetches_together:
            return self.data[sample]
        found = self.data.__getitems__([sample])
        self._makes_batches = not isinstance(found, list)
        return found if self._makes_batches else found[0]

    def collate(self, samples: list[Any]) -> Any:
        """Collate samples under a fixed seed."""
        seed_all(derive("collate", self.seed, 0))
        return self.collate_fn(samples)

    def with_halves(self, span: Span) -> list[tuple[int, Any]]:
        """Return (number of samples, their batch) for a span, its first half and its second half; without the halves if
        the dataset makes whole batches."""
        samples = self._together(span) if self._fetches_together else self._one_by_one(span)
        if self._makes_batches:
            return [(len(span.ids), self.collate_fn(samples))]
        batches = []
        for chosen in [samples, *halves(samples)]:
            seed_all(derive("collate", self.seed, self._when(span, 0), span.digests[0]))
            batches.append((len(chosen), self.collate_fn(list(chosen))))
        return batches

    def draws_together(self, span: Span) -> bool:
        """Whether `collate_fn`, or a dataset that makes whole batches, draws random numbers for several samples at
        once. If so, a sample depends on those beside it in the batch.

        Args:
            span: one microbatch, on which this is tried.
        """
        default = self.collates_plainly
        if default and not self._fetches_together:
            return False
        samples: Any = self._together(span) if self._fetches_together else self._one_by_one(span)
        if self._makes_batches and draws(lambda: self.data.__getitems__(span.ids.tolist())):
            return True
        return not default and draws(lambda: self.collate_fn(samples))
