"""Fetching microbatches by key, under seeds from (seed, epoch, sample id), in this process or in loader processes.

The result depends on the key alone. Loader processes outlive a change of the world: their queue of keys can be replaced
at any step, and results for old keys are dropped.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import xxhash

from elastic.data.order import sample_ids
from elastic.data.processes import LoaderProcesses
from elastic.data.samples import Told, draws, fetch_each, fetches_together, halves, untouched
from elastic.errors import ConfigError, one_line
from elastic.job import Job
from elastic.seeds import derive, seed_all

SHOWN = 16  # the most sample ids that are shown in a message
TRIES = 3  # attempts to get one span from loader processes


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
    """

    def __init__(
        self,
        *,
        seed: int,
        dataset_size: int,
        global_size: int,
        microbatches: int,
        ids: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self.seed, self.dataset_size = seed, dataset_size
        self.ids = ids or partial(sample_ids, seed, dataset_size)
        self.own = ids is not None
        self.global_size, self.microbatches = global_size, microbatches
        self.size = global_size // microbatches
        self._step, self._ids = -1, np.empty(0, dtype=np.int64)

    def span(self, step: int, first: int, count: int) -> Span:
        """Return the microbatches `first` to `first + count - 1` of `step` (from 0), not fetched."""
        if step != self._step:  # the ids of all its microbatches take no longer than those of one
            positions = np.arange(step * self.global_size, (step + 1) * self.global_size, dtype=np.int64)
            self._step, self._ids = step, self.ids(positions)
        begin = first * self.size
        position, ids = step * self.global_size + begin, self._ids[begin : begin + count * self.size]
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


class _Served:
    """The dataset that loader processes fetch from. It returns errors as values, because torch would re-raise
    exceptions as others."""

    def __init__(self, fetcher: Fetcher):
        self._fetcher = fetcher

    def __getitem__(self, span: Span) -> Span:
        try:
            return self._fetcher[span]
        except ItemError as error:
            return replace(span, error=error)

    def unsendable(self, span: Span, error: Exception) -> Span:
        """Return the span to send in place of one that cannot be pickled."""
        line = f"what collate_fn() returns cannot be sent from a loader process: {one_line(error)}"
        text = f"{line}; make it of tensors, arrays and plain values, or give --data.workers 0"
        return replace(span, batch=None, error=ItemError(type(error).__name__, line, text, tuple(span.ids.tolist())))


def nothing() -> None:
    """Do nothing; the default of `begin`, at module level so that it can be pickled."""


class Loader:
    """Serves one rank's microbatches step after step.

    Args:
        workers: the number of loader processes; 0 fetches on the calling thread.
        prefetch: the number of spans that each process prepares ahead.
        on_restart: called with a description after loader processes had to be restarted.
        begin: called first in each loader process; it is pickled by name.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        order: Order,
        *,
        workers: int,
        prefetch: int,
        total_steps: int,
        on_restart: Callable[[str], None] = lambda what: None,
        begin: Callable[[], None] = nothing,
    ):
        self.order, self._fetcher, self._total_steps = order, fetcher, total_steps
        self._workers = max(1, workers)
        self._on_restart = on_restart
        self._source: Iterator[Span] = iter(())
        self._spans: list[tuple[int, int]] = []
        self._processes: LoaderProcesses | None = None
        self._awaited: Sequence[int] = ()
        self._draws: bool | None = None  # unknown before `draws_together`
        if workers:
            sent = {
                f"train_data(), a {type(fetcher.data).__qualname__},": fetcher.data,
                "collate_fn(), with the job whose method it is,": fetcher.collate_fn,
            }
            self._processes = LoaderProcesses(_Served(fetcher), sent, count=workers, prefetch=prefetch, begin=begin)

    def draws_together(self) -> bool:
        """Whether a sample depends on those beside it in its batch; see `Fetcher.draws_together`. False if the first
        microbatch cannot be fetched."""
        if self._draws is None:
            try:
                self._draws = self.here().draws_together(self.order.span(0, 0, 1))
            except Exception:  # a sample cannot be fetched; its step reports that in full
                self._draws = False
        return self._draws

    def first_batches(self, count: int, step: int = 0) -> list[tuple[int, Any]]:
        """Return the first `count` microbatches of a step as one batch, with its halves; see `Fetcher.with_halves`.
        Empty if they cannot be fetched."""
        try:
            return self.here().with_halves(self.order.span(step, 0, count))
        except Exception:  # as above
            return []

    def here(self) -> Fetcher:
        """Return a fetcher for this process. Its dataset is a copy if loader processes are sent the original."""
        fetcher = self._fetcher
        if self._processes is None:
            return fetcher
        data = untouched(fetcher.data)
        return Fetcher(data, fetcher.collate_fn, fetcher.seed, fetcher.dataset_size, by_position=fetcher.by_position)

    def start(self, step: int, spans: list[tuple[int, int]]) -> None:
        """Serve these spans, given as (first microbatch, count), of every step from `step` on.

        Raises:
            ConfigError: the data cannot be sent to loader processes.
        """
        self._spans, self._source = spans, self._keys(step, spans)
        if self._processes is not None:
            self._processes.feed(self._source)

    def _keys(self, step: int, spans: list[tuple[int, int]]) -> Iterator[Span]:
        # told what comes, a process reads ahead for its microbatches: they stay with it if steps have whole turns
        turns = self._workers if isinstance(self._fetcher.data, Told) else 1
        for s in range(step, self._total_steps):
            for first, count in spans:
                yield self.order.span(s, first, count)
            for _ in range(-len(spans) % turns):
                yield NO_SPAN
        while True:  # processes prefetch beyond the last step
            yield NO_SPAN

    def next(self, step: int, first: int, count: int) -> Span:
        """Return the next span, which must be the one of (step, first, count).

        Raises:
            ItemError: the job's data raised, or loader processes died TRIES times over this span.
        """
        if self._processes is None:
            return self._fetcher[_find(self._source, step, first, count)]
        self._awaited = self.order.span(step, first, count).ids[:SHOWN].tolist()
        try:
            found = self._answer(self._processes, step, first, count)
        finally:
            self._awaited = ()
        if found.error is not None:
            raise found.error
        return found

    def _answer(self, processes: LoaderProcesses, step: int, first: int, count: int) -> Span:
        for tried in range(1, TRIES + 1):
            try:
                return _find(processes.answers(), step, first, count)
            except ConfigError:  # a sampler's, which is asked again in vain
                raise
            except Exception as error:  # raised by torch or the system; fetching is pure, so it can be repeated
                self._source = self._keys(step, self._spans)
                line = one_line(error)
                how = f"a loader process is gone while samples of step {step + 1}, microbatch {first} were awaited: "
                how += f"{processes.restart(self._source)} ({line})"
                self._on_restart(how)
                if tried == TRIES:
                    samples = tuple(self.order.span(step, first, count).ids.tolist())
                    text = "".join(traceback.format_exception(error)).rstrip()
                    raise ItemError("LoaderDied", f"{TRIES} times {how}", text, samples) from error
        raise AssertionError("it returned or raised")

    def waits_for(self) -> list[int]:
        """Return the ids of the samples that are awaited just now, SHOWN at most. May be called from any thread."""
        return list(self._awaited or self._fetcher.at)[:SHOWN]

    def close(self) -> None:
        """End the loader processes, and what reads ahead."""
        if isinstance(self._fetcher.data, Told):
            self._fetcher.data.close()
        if self._processes is not None:
            self._processes.close()


def _find(spans: Iterator[Span], step: int, first: int, count: int) -> Span:
    return next(s for s in spans if (s.step, s.first, len(s.digests)) == (step, first, count))
