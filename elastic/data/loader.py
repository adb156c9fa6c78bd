"""Serves microbatches step after step, fetched in this process or in loader processes.

Loader processes outlive a change of the world: their queue of keys can be replaced at any step, and results for old
keys are dropped.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from elastic.data.fetching import NO_SPAN, SHOWN, Fetcher, ItemError, Order, Span
from elastic.data.processes import LoaderProcesses
from elastic.data.samples import Told, untouched
from elastic.errors import ConfigError, one_line

TRIES = 3  # attempts to get one span from loader processes


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
        self._stale = self._told = False  # the dataset has changed since loader processes were sent it; that was told
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
        if self._processes is not None and self._stale:
            self._processes.renew(self._source)
        elif self._processes is not None:
            self._processes.feed(self._source)
        self._stale = False

    def changed(self) -> None:
        """The dataset has changed in this process: loader processes are to get it anew, before the next span."""
        self._stale = True

    def _renew(self, processes: LoaderProcesses, step: int) -> None:
        self._stale, self._source = False, self._keys(step, self._spans)
        if processes.renew(self._source) and not self._told:
            self._told = True
            self._on_restart(
                f"the job changed its data before step {step + 1}, so loader processes are started with it anew, then "
                "and after each further change; with changes in every step --data.workers 0 is faster"
            )

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
        if self._stale and self._processes is not None:
            self._renew(self._processes, step)
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
