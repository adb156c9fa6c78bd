"""Samplers: which sample is at each position of a run, as a pure function of the position and the run's plan.

Random draws come from a counter-based generator: a hash of (seed, position), so that any position can be asked for
alone, on any worker, at any time (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elastic.data.lanes import Lanes
from elastic.data.order import permute, sample_ids
from elastic.data.shards import Shards
from elastic.errors import ConfigError
from elastic.job import Job, Plan, Sampler
from elastic.job_code import failure_text, job_code
from elastic.seeds import derive

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014
_PARTS = 1 << 53
TRIED = 64  # the most steps that are tried before a run


@dataclass(frozen=True)
class Sequential:
    """The samples in their order, epoch after epoch: no shuffle."""

    def __call__(self, positions: np.ndarray, plan: Plan) -> np.ndarray:
        return positions % plan.samples


@dataclass(frozen=True, eq=False)
class Weighted:
    """Each position draws one sample, with replacement, with a probability in proportion to its weight.

    Args:
        weights: one for each sample, finite and 0 or more. A sample with the weight 0 is never drawn.

    Raises:
        ConfigError: weights that make no probabilities.
    """

    weights: Sequence[float] | np.ndarray
    _ends: np.ndarray = field(init=False, repr=False)  # int64 [samples]: where the share of each ends, in _PARTS

    def __post_init__(self) -> None:
        weights = np.asarray(self.weights, dtype=np.float64)
        bad = ~(np.isfinite(weights) & (weights >= 0))
        if weights.ndim != 1 or bad.any() or not weights.any():
            what = f"weight {int(np.argmax(bad))} is {float(weights[bad][0])}" if bad.any() else "there is none above 0"
            raise ConfigError(f"Weighted() needs a list of finite weights, 0 or more, some above 0, but {what}")
        shares = weights / math.fsum(weights)
        # whole numbers, whose sums are the same on every machine
        parts = np.where(shares > 0, np.maximum(np.floor(shares * _PARTS), 1), 0).astype(np.int64)
        object.__setattr__(self, "_ends", np.cumsum(parts))

    def __call__(self, positions: np.ndarray, plan: Plan) -> np.ndarray:
        _check_count("Weighted", "weights", len(self._ends), plan)
        drawn = _draws("weighted", plan.seed, positions) % np.uint64(self._ends[-1])
        return np.searchsorted(self._ends, drawn.astype(np.int64), side="right")


@dataclass(frozen=True, eq=False)
class ByLength:
    """Every sample once an epoch, in random order, but with samples of like length in one microbatch, so that little is
    padded. Of each `window` batches samples are sorted by length, cut into microbatches, and these are shuffled.

    Args:
        lengths: one for each sample.
        window: batches that are sorted together: more means less padding, and less randomness.
    """

    lengths: Sequence[float] | np.ndarray
    window: int = 50
    _last: dict[tuple[int, ...], np.ndarray] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1:
            raise ConfigError(f"ByLength() was given the window {self.window!r}; give a whole number of batches from 1")
        object.__setattr__(self, "lengths", np.asarray(self.lengths))

    def __call__(self, positions: np.ndarray, plan: Plan) -> np.ndarray:
        _check_count("ByLength", "lengths", len(self.lengths), plan)
        span = self.window * plan.batch_size
        epochs, within = np.divmod(positions, plan.samples)
        windows, place = np.divmod(within, span)
        found = np.empty_like(positions)
        for epoch, window in sorted(set(zip(epochs.tolist(), windows.tolist()))):
            here = (epochs == epoch) & (windows == window)
            found[here] = self._window(epoch, window, plan)[place[here]]
        return found

    def _window(self, epoch: int, window: int, plan: Plan) -> np.ndarray:
        """The ids of one window, in their order. The last two are kept: a batch may have parts of both."""
        key = (plan.seed, epoch, window, plan.samples, plan.batch_size, plan.microbatch_size)
        if key not in self._last:
            while len(self._last) > 1:
                self._last.pop(next(iter(self._last)))
            self._last[key] = self._made(epoch, window, plan)
        return self._last[key]

    def _made(self, epoch: int, window: int, plan: Plan) -> np.ndarray:
        span, size = self.window * plan.batch_size, plan.microbatch_size
        begin, end = window * span, min((window + 1) * span, plan.samples)
        ids = permute(plan.seed, epoch, plan.samples, np.arange(begin, end))
        ids = ids[np.argsort(np.asarray(self.lengths)[ids], kind="stable")]
        # microbatches begin where the run's do, which is not where an epoch begins if it has no whole number of them
        first = epoch * plan.samples + begin
        edges = sorted({0, *range(-first % size, end - begin, size), end - begin})
        sizes = np.diff(edges)
        order = permute(derive("by length", plan.seed, window), epoch, len(sizes), np.arange(len(sizes)))
        taken = np.cumsum([0, *sizes[order]])
        made = np.empty_like(ids)
        for place, chunk in enumerate(order):
            made[edges[chunk] : edges[chunk + 1]] = ids[taken[place] : taken[place + 1]]
        return made


@dataclass(frozen=True, eq=False)
class Curriculum:
    """Easy samples first. Up to step `until` positions draw, with replacement, from the easiest share of the samples,
    which grows linearly from `begin` to all; from then on each epoch is a permutation of all (Platanios et al.,
    "Competence-based curriculum learning", 2019).

    Args:
        difficulty: one number for each sample.
        until: the step from which all samples are in.
        begin: the share of the samples that step 0 draws from, above 0 and at most 1.
    """

    difficulty: Sequence[float] | np.ndarray
    until: int
    begin: float = 0.1
    _sorted: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.until, int) or self.until < 0 or not 0 < self.begin <= 1:
            raise ConfigError(
                f"Curriculum() was given until={self.until!r} and begin={self.begin!r}; give a whole number of steps, "
                "and a share above 0 and at most 1"
            )
        object.__setattr__(self, "_sorted", np.argsort(np.asarray(self.difficulty), kind="stable"))

    def __call__(self, positions: np.ndarray, plan: Plan) -> np.ndarray:
        _check_count("Curriculum", "difficulties", len(self._sorted), plan)
        cycle = plan.cycle
        steps = positions // plan.batch_size * cycle.steps_each // cycle.batches_each
        share = self.begin + (1 - self.begin) * steps / max(1, self.until)
        pool = np.clip((share * plan.samples).astype(np.int64), 1, plan.samples)
        drawn = (_draws("curriculum", plan.seed, positions) % pool.astype(np.uint64)).astype(np.int64)
        return np.where(steps < self.until, self._sorted[drawn], sample_ids(plan.seed, plan.samples, positions))


def _check_count(kind: str, what: str, count: int, plan: Plan) -> None:
    if count != plan.samples:
        raise ConfigError(
            f"{kind}() was given {count} {what}, but train_data() has {plan.samples} samples; give one each"
        )


def _draws(use: str, seed: int, positions: np.ndarray) -> np.ndarray:
    """A uniform uint64 for each position: SplitMix64 at that place of its sequence."""
    x = np.uint64(derive("sampler", use, seed)) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# ---- a job's sampler -------------------------------------------------------------------------------------------------


def positions_to_ids(job: Job, data: Any, plan: Plan) -> Callable[[np.ndarray], np.ndarray] | None:
    """The job's own order of `data`, or that of data in shards, checked wherever it is asked; None if there is none.

    Raises:
        ConfigError: `sampler` failed, or returned something else than a function.
    """
    with job_code("sampler()"):
        found = job.sampler(data)
    if isinstance(data, Lanes) and found is not None:
        raise ConfigError("sampler() gives an order to a stream, whose samples come as they come; leave it out")
    if found is None and isinstance(data, (Shards, Lanes)):
        data.bind(plan)
        found = data.order
    if found is None:
        return None
    if not callable(found):
        raise ConfigError(
            f"sampler() returned a {type(found).__name__}, but it is to return a function of (positions, plan) that "
            "returns the index of the sample at each position, such as elastic.Weighted(weights) or "
            "elastic.Sequential()"
        )
    return _Checked(found, plan)


@dataclass(frozen=True)
class _Checked:
    sampler: Sampler
    plan: Plan

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """
        Raises:
            ConfigError: the sampler raised, or does not answer with one index inside the data for each position.
        """
        asked = f"position{'s' if len(positions) > 1 else ''} {positions[0]}"
        asked += f" to {positions[-1]}" if len(positions) > 1 else ""
        try:
            found = np.asarray(self.sampler(positions.copy(), self.plan))
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(failure_text(f"sampler(), asked for {asked},", error)) from error
        if found.shape != positions.shape or found.dtype.kind not in "iu":
            raise ConfigError(
                f"sampler(), asked for {asked}, answered with {found.dtype} {list(found.shape)}; it is to return a "
                "whole number for each position"
            )
        outside = (found < 0) | (found >= self.plan.samples)
        if outside.any():
            place = int(np.argmax(outside))
            raise ConfigError(
                f"sampler() gives index {found[place]} at position {positions[place]}, but train_data() has "
                f"{self.plan.samples} samples, 0 to {self.plan.samples - 1}"
            )
        return found.astype(np.int64, copy=False)


def check_sampler(job: Job, data: Any, plan: Plan) -> None:
    """Ask a job's own order for steps from the first to the last, whole and position by position.

    Raises:
        ConfigError: it fails, or what one position gets goes by what else is asked, so that other workers would have
            others.
    """
    ids = positions_to_ids(job, data, plan)
    if ids is None:
        return
    for batch in sorted(set(np.linspace(0, plan.batches - 1, TRIED).astype(int).tolist())):
        positions = np.arange(batch * plan.batch_size, (batch + 1) * plan.batch_size, dtype=np.int64)
        together = ids(positions)
        for place in (0, len(positions) - 1):
            alone = int(ids(positions[place : place + 1])[0])
            if alone != together[place]:
                raise ConfigError(
                    f"sampler() gives index {together[place]} at position {positions[place]} among others and {alone} "
                    "when asked for it alone; it must be a pure function of the position, such as one that draws from "
                    "a hash of plan.seed and the position, and not from a generator"
                )


def signs(ids: Callable[[np.ndarray], np.ndarray], plan: Plan) -> dict[str, int]:
    """What the order is at a few positions, to be compared between workers and with earlier commands."""
    last = plan.batches * plan.batch_size
    chosen = np.array([0, *(1 << k for k in range(last.bit_length()))], dtype=np.int64)
    return {str(p): int(i) for p, i in zip(chosen[chosen < last], ids(chosen[chosen < last]))}
