"""Fetching microbatches: by key, under seeds from (seed, epoch, sample id), in this process or in loader processes.

What comes back depends on the key alone. Loader processes outlive a change of the world: they are fed from a plan
that can be replaced at any step, and what they had prepared for the old plan is thrown away.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xxhash

from elastic.data.order import sample_ids
from elastic.data.processes import LoaderProcesses
from elastic.data.samples import draws, fetch_each, fetches_together, halves, untouched
from elastic.errors import one_line
from elastic.job import Job
from elastic.seeds import derive, seed_all

SHOWN = 16  # samples that are named
TRIES = 3  # to have one span from loader processes


@dataclass(frozen=True)
class Span:
    """Consecutive microbatches of one step: their samples, and (once fetched) one collated batch of all.

    `digests` has xxh3_64 over the little-endian int64 sample ids of each microbatch, as signed 64-bit integers.
    """

    step: int
    first: int
    first_position: int
    ids: np.ndarray
    digests: tuple[int, ...]
    batch: Any = None
    error: ItemError | None = None  # of a loader process, where there is no batch


class Order:
    """The microbatches of a run by (step, index)."""

    def __init__(self, *, seed: int, dataset_size: int, global_size: int, microbatches: int):
        self.seed, self.dataset_size = seed, dataset_size
        self.global_size, self.microbatches = global_size, microbatches
        self.size = global_size // microbatches
        self._step, self._ids = -1, np.empty(0, dtype=np.int64)

    def span(self, step: int, first: int, count: int) -> Span:
        """Microbatches `first` to `first + count - 1` of `step` (from 0)."""
        if step != self._step:  # the ids of a step are made together: that takes as long as those of one microbatch
            positions = np.arange(step * self.global_size, (step + 1) * self.global_size, dtype=np.int64)
            self._step, self._ids = step, sample_ids(self.seed, self.dataset_size, positions)
        begin = first * self.size
        position, ids = step * self.global_size + begin, self._ids[begin : begin + count * self.size]
        parts = ids.astype("<i8").reshape(count, self.size)
        digests = (xxhash.xxh3_64_intdigest(part.tobytes()) for part in parts)
        return Span(step, first, position, ids, tuple(d - (1 << 64) if d >= 1 << 63 else d for d in digests))


class ItemError(Exception):
    """An exception of the data, and of which samples: of one, or of all that are collated together.

    Args:
        kind: the type of the exception.
        line: the last line of what Python prints of it.
        text: all of that.
    """

    def __init__(self, kind: str, line: str, text: str, samples: tuple[int, ...]):
        super().__init__(line)
        self.kind, self.line, self.text, self.samples = kind, line, text, samples

    @classmethod
    def of(cls, error: Exception, samples: Sequence[int]) -> ItemError:
        """What was raised while these samples were under way."""
        text = "".join(traceback.format_exception(error)).rstrip()
        return cls(type(error).__name__, one_line(error), text, tuple(samples))

    def __reduce__(self) -> tuple[type[ItemError], tuple[str, str, str, tuple[int, ...]]]:
        return type(self), (self.kind, self.line, self.text, self.samples)


class Fetcher:
    """Fetches and collates the samples of a span, seeded by what they are. `at`: those under way."""

    def __init__(self, data: Any, collate_fn: Callable[[Any], Any], seed: int, dataset_size: int):
        self.data, self.collate_fn, self.seed, self.dataset_size = data, collate_fn, seed, dataset_size
        self._fetches_together = fetches_together(data)
        self._makes_batches: bool | None = None  # its method returns no lists; not known before the first call
        self.at: Sequence[int] = ()

    def __getitem__(self, span: Span) -> Span:
        """The span with its batch.

        Raises:
            ItemError: the dataset or collate_fn raised.
        """
        try:
            samples = self._together(span) if self._fetches_together else self._each(span)
            self.at = span.ids.tolist()
            seed_all(derive("collate", self.seed, self._epoch(span, 0), span.digests[0]))
            return replace(span, batch=self.collate_fn(samples))
        except Exception as error:
            raise ItemError.of(error, self.at) from error
        finally:
            self.at = ()

    def _each(self, span: Span) -> list[Any]:
        ids = span.ids.tolist()

        def seed(i: int) -> int:  # asked for right before a sample is fetched
            self.at = ids[i : i + 1]
            return derive("item", self.seed, self._epoch(span, i), ids[i])

        return fetch_each(self.data, ids, seed)

    def _together(self, span: Span) -> Any:
        """By the dataset's own method, a microbatch at a time: how many are in a span depends on the world.

        A dataset that makes whole batches of its own, which are no lists, makes one of all.
        """
        if self._makes_batches is None:
            self._makes_batches = not isinstance(self._fetch(span, 0, 1), list)
        if self._makes_batches:
            return self._fetch(span, 0, len(span.digests))
        return [sample for i in range(len(span.digests)) for sample in self._fetch(span, i, 1)]

    def _fetch(self, span: Span, first: int, count: int) -> Any:
        size = len(span.ids) // len(span.digests)
        seed_all(derive("items", self.seed, self._epoch(span, first * size), span.digests[first]))
        ids = span.ids[first * size : (first + count) * size].tolist()
        self.at = tuple(ids)
        return self.data.__getitems__(ids)

    def _epoch(self, span: Span, place: int) -> int:
        return (span.first_position + place) // self.dataset_size

    # ---- to be tried -------------------------------------------------------------------------------------------

    @property
    def collates_plainly(self) -> bool:
        """Whether batches are made by torch's own function."""
        return getattr(self.collate_fn, "__func__", None) is Job.collate_fn

    @property
    def makes_batches(self) -> bool:
        """Whether the dataset makes whole batches, as far as is known."""
        return bool(self._makes_batches)

    def one(self, sample: int) -> Any:
        """A sample as it is in the first epoch; of a dataset that fetches several together, as that returns it."""
        seed_all(derive("item", self.seed, 0, sample))
        if not self._fetches_together:
            return self.data[sample]
        found = self.data.__getitems__([sample])
        self._makes_batches = not isinstance(found, list)
        return found if self._makes_batches else found[0]

    def collate(self, samples: list[Any]) -> Any:
        """A batch, under one seed."""
        seed_all(derive("collate", self.seed, 0))
        return self.collate_fn(samples)

    def with_halves(self, span: Span) -> list[tuple[int, Any]]:
        """How many samples, and their batch: of a span, of its first half, of the other; without halves where the
        dataset makes whole batches."""
        samples = self._together(span) if self._fetches_together else self._each(span)
        if self._makes_batches:
            return [(len(span.ids), self.collate_fn(samples))]
        batches = []
        for part in [samples, *halves(samples)]:
            seed_all(derive("collate", self.seed, self._epoch(span, 0), span.digests[0]))
            batches.append((len(part), self.collate_fn(list(part))))
        return batches

    def draws_together(self, span: Span) -> bool:
        """Whether random numbers are drawn for several samples at once: by `collate_fn`, or by a dataset that makes
        whole batches. Then what a sample becomes depends on those beside it.

        Args:
            span: one microbatch, to be tried on.
        """
        default = self.collates_plainly
        if default and not self._fetches_together:
            return False
        samples: Any = self._together(span) if self._fetches_together else self._each(span)
        if self._makes_batches and draws(lambda: self.data.__getitems__(span.ids.tolist())):
            return True
        return not default and draws(lambda: self.collate_fn(samples))


class _Served:
    """What loader processes fetch from: errors come back as values, so that torch does not make others of them."""

    def __init__(self, fetcher: Fetcher):
        self._fetcher = fetcher

    def __getitem__(self, span: Span) -> Span:
        try:
            return self._fetcher[span]
        except ItemError as error:
            return replace(span, error=error)

    def unsendable(self, span: Span, error: Exception) -> Span:
        """What is sent in place of a span that cannot be."""
        line = f"what collate_fn() returns cannot be sent from a loader process: {one_line(error)}"
        text = f"{line}; make it of tensors, arrays and plain values, or give --data.workers 0"
        return replace(span, batch=None, error=ItemError(type(error).__name__, line, text, tuple(span.ids.tolist())))


def nothing() -> None:
    """What there is to do before."""


class Loader:
    """Serves one rank's microbatches step after step.

    Args:
        workers: loader processes; 0 fetches on the calling thread.
        prefetch: microbatches that each process prepares ahead.
        on_restart: called with what happened when loader processes had to be started again.
        begin: what each loader process calls first; to be found by its name.
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
        self._on_restart = on_restart
        self._source: Iterator[Span] = iter(())
        self._spans: list[tuple[int, int]] = []
        self._processes: LoaderProcesses | None = None
        self._awaited: Sequence[int] = ()
        self._draws: bool | None = None  # not known before it is asked
        if workers:
            parts = {
                f"train_data(), a {type(fetcher.data).__qualname__},": fetcher.data,
                "collate_fn(), with the job whose method it is,": fetcher.collate_fn,
            }
            self._processes = LoaderProcesses(_Served(fetcher), parts, count=workers, prefetch=prefetch, begin=begin)

    def draws_together(self) -> bool:
        """Whether what a sample becomes depends on which others are fetched beside it; see `Fetcher`."""
        if self._draws is None:
            try:
                self._draws = self.here().draws_together(self.order.span(0, 0, 1))
            except Exception:  # a sample that cannot be had: its step says so, with all there is to know
                self._draws = False
        return self._draws

    def first_batches(self, count: int, step: int = 0) -> list[tuple[int, Any]]:
        """The first microbatches of a step as one batch, to be tried, and their halves; see `Fetcher.with_halves`.
        Nothing where they cannot be had."""
        try:
            return self.here().with_halves(self.order.span(step, 0, count))
        except Exception:  # as above
            return []

    def here(self) -> Fetcher:
        """Fetches in this process, without a trace in what others are sent."""
        one = self._fetcher
        if self._processes is None:
            return one
        return Fetcher(untouched(one.data), one.collate_fn, one.seed, one.dataset_size)

    def start(self, step: int, spans: list[tuple[int, int]]) -> None:
        """From `step` on, serve these (first, count) spans of every step.

        Raises:
            ConfigError: loader processes cannot be sent the data.
        """
        self._spans, self._source = spans, self._keys(step, spans)
        if self._processes is not None:
            self._processes.feed(self._source)

    def _keys(self, step: int, spans: list[tuple[int, int]]) -> Iterator[Span]:
        for s in range(step, self._total_steps):
            for first, count in spans:
                yield self.order.span(s, first, count)
        while True:  # processes look ahead of the last step; what they fetch then is never asked for
            yield self.order.span(self._total_steps, *spans[0])

    def next(self, step: int, first: int, count: int) -> Span:
        """The next span, which the caller knows to be (step, first, count).

        Raises:
            ItemError: the training data did, or the processes that fetch it die again and again.
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
            except Exception as error:  # of torch's and the system's; fetching is pure, so it is done again
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
        """The samples that are being fetched just now, for those who look on. From any thread."""
        return list(self._awaited or self._fetcher.at)[:SHOWN]

    def close(self) -> None:
        """End the loader processes."""
        if self._processes is not None:
            self._processes.close()


def _find(spans: Iterator[Span], step: int, first: int, count: int) -> Span:
    return next(s for s in spans if (s.step, s.first, len(s.digests)) == (step, first, count))
