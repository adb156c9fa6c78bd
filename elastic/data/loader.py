"""Fetching microbatches: by key, under seeds from (seed, epoch, sample id), in this process or in loader processes.

What comes back depends on the key alone. Loader processes outlive a change of the world: they are fed from a plan
that can be replaced at any step, and what they had prepared for the old plan is thrown away.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset, Sampler

from elastic.data.order import sample_ids
from elastic.data.samples import draws, fetch_each, fetches_together, halves, untouched
from elastic.data.seeds import derive, seed_all
from elastic.job import Job


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


class Fetcher(Dataset):
    """Fetches and collates the samples of a span, seeded by what they are."""

    def __init__(self, data: Any, collate_fn: Callable[[Any], Any], seed: int, dataset_size: int):
        self.data, self.collate_fn, self.seed, self.dataset_size = data, collate_fn, seed, dataset_size
        self._fetches_together = fetches_together(data)
        self._makes_batches: bool | None = None  # its method returns no lists; not known before the first call

    def __getitem__(self, span: Span) -> Span:
        samples = self._together(span) if self._fetches_together else self._each(span)
        seed_all(derive("collate", self.seed, self._epoch(span, 0), span.digests[0]))
        return replace(span, batch=self.collate_fn(samples))

    def _each(self, span: Span) -> list[Any]:
        ids = span.ids.tolist()
        return fetch_each(self.data, ids, lambda i: derive("item", self.seed, self._epoch(span, i), ids[i]))

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
        return self.data.__getitems__(span.ids[first * size : (first + count) * size].tolist())

    def _epoch(self, span: Span, place: int) -> int:
        return (span.first_position + place) // self.dataset_size

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
        default = getattr(self.collate_fn, "__func__", None) is Job.collate_fn
        if default and not self._fetches_together:
            return False
        samples: Any = self._together(span) if self._fetches_together else self._each(span)
        if self._makes_batches and draws(lambda: self.data.__getitems__(span.ids.tolist())):
            return True
        return not default and draws(lambda: self.collate_fn(samples))


class _Plan(Sampler):
    """The endless queue of keys that loader processes work off; its source can be replaced."""

    def __init__(self) -> None:
        self.source: Iterator[Span] = iter(())

    def __iter__(self) -> Iterator[Span]:
        while True:
            yield next(self.source)


class Loader:
    """Serves one rank's microbatches step after step.

    Args:
        workers: loader processes; 0 fetches on the calling thread.
        prefetch: microbatches that each process prepares ahead.
    """

    def __init__(self, fetcher: Fetcher, order: Order, *, workers: int, prefetch: int, total_steps: int):
        self.order, self._fetcher, self._total_steps = order, fetcher, total_steps
        self._plan = _Plan()
        self._served: Iterator[Span] | None = None
        self._loader: DataLoader | None = None
        self._life: tuple[Connection, Connection] | None = None
        if workers:
            self._life = Pipe(duplex=False)
            self._loader = DataLoader(
                fetcher, batch_size=None, sampler=self._plan, num_workers=workers, prefetch_factor=prefetch,
                multiprocessing_context="forkserver", persistent_workers=True,
                worker_init_fn=partial(_begin, self._life[0]),
            )  # fmt: skip

    def draws_together(self) -> bool:
        """Whether what a sample becomes depends on which others are fetched beside it; see `Fetcher`."""
        try:
            return self._here().draws_together(self.order.span(0, 0, 1))
        except Exception:  # a sample that cannot be had: its step says so, with all there is to know
            return False

    def first_batches(self, count: int) -> list[tuple[int, Any]]:
        """The first microbatches of the run as one batch, to be tried, and their halves; see `Fetcher.with_halves`.
        Nothing where they cannot be had."""
        try:
            return self._here().with_halves(self.order.span(0, 0, count))
        except Exception:  # as above
            return []

    def _here(self) -> Fetcher:
        """Fetches in this process, without a trace in what others are sent."""
        one = self._fetcher
        return one if self._loader is None else Fetcher(untouched(one.data), one.collate_fn, one.seed, one.dataset_size)

    def start(self, step: int, spans: list[tuple[int, int]]) -> None:
        """From `step` on, serve these (first, count) spans of every step."""

        def keys() -> Iterator[Span]:
            for s in range(step, self._total_steps):
                for first, count in spans:
                    yield self.order.span(s, first, count)
            while True:  # processes look ahead of the last step; what they fetch then is never asked for
                yield self.order.span(self._total_steps, *spans[0])

        self._plan.source = keys()
        if self._loader is not None and self._served is None:
            self._served = iter(self._loader)

    def next(self, step: int, first: int, count: int) -> Span:
        """The next span, which the caller knows to be (step, first, count)."""
        while True:
            found = next(self._plan.source) if self._served is None else next(self._served)
            if (found.step, found.first, len(found.digests)) == (step, first, count):
                return self._fetcher[found] if self._served is None else found

    def close(self) -> None:
        """End the loader processes."""
        self._served = None
        self._loader = None
        if self._life is not None:
            for end in self._life:
                end.close()
            self._life = None


def _begin(life: Connection, _: int) -> None:
    """The beginning of a loader process. The other end of `life` is the worker's alone, so it closes when that dies.

    torch's own watch does not help: it looks at the parent, which is the fork server, which lives as long as we do.
    """
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(life,), name="end-with-worker", daemon=True).start()


def _end_with(life: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        life.recv_bytes()
    os._exit(1)
