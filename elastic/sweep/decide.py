"""How far each trial goes: pure functions of the trials' results, whatever the order in which these arrive.

A trial counts its evaluations from 1. At some of them, its gates, it waits for a verdict, which depends on a fixed set
of results. While one of these is missing, there is no verdict. So equal results give equal verdicts, however many
trials run at a time, and whatever was killed meanwhile.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from elastic.sweep.space import Options, Space, draw

WORST = -math.inf


@dataclass
class Results:
    """All results: scores (greater is better) by trial and evaluation, and the trials that have ended.

    `total` is the number of evaluations of a complete trial.
    """

    total: int
    scores: dict[int, dict[int, float]] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)

    def report(self, trial: int, evaluation: int, value: float | None, mode: str) -> None:
        """Add a result; only the first for an evaluation counts."""
        score = WORST if value is None or math.isnan(value) else value if mode == "max" else -value
        self.scores.setdefault(trial, {}).setdefault(evaluation, score)

    def end(self, trial: int) -> None:
        """The trial will report nothing more."""
        self.ended.add(trial)

    def score(self, trial: int, evaluation: int) -> float | None:
        return self.scores.get(trial, {}).get(evaluation)

    def settled(self, trial: int, evaluation: int) -> bool:
        """Whether the trial's result at this evaluation is known, or will never come."""
        return trial in self.ended or self.score(trial, evaluation) is not None


@dataclass(frozen=True)
class Verdict:
    """What a trial does at a gate: go on to the evaluation `until`, stop, or take over the state of trial `source` and
    go on with `options`. `why` is a text for people."""

    do: Literal["go", "stop", "exploit"]
    until: int = 0
    why: str = ""
    source: int = -1
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Missing:
    """There is no verdict before these trials have reported the evaluation in question, or have ended."""

    trials: frozenset[int]


class Rule(Protocol):
    """Decides how far trials go."""

    def first(self, trial: int) -> int:
        """The evaluation of a trial's first gate; the total if it has none."""
        ...

    def judge(self, results: Results, trial: int, gate: int) -> Verdict | Missing:
        """The verdict on a trial that has reported its evaluation `gate`."""
        ...


class NoRule:
    """Every trial is completed."""

    def __init__(self, total: int):
        self._total = total

    def first(self, trial: int) -> int:
        return self._total

    def judge(self, results: Results, trial: int, gate: int) -> Verdict | Missing:
        return Verdict("go", self._total)


def rungs(first: int, factor: int, total: int) -> list[int]:
    """The evaluations at which trials are compared: `first`, `first * factor`, ... below `total`."""
    found = []
    while first < total:
        found.append(first)
        first *= factor
    return found


def _after(gates: Sequence[int], gate: int, total: int) -> int:
    return next((g for g in gates if g > gate), total)


def percentile(values: Iterable[float], share: float) -> float:
    """The percentile, with linear interpolation between the nearest values, as in numpy."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    if ordered[low] == ordered[high]:
        return ordered[low]  # also for infinities, whose difference is not a number
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


class OrderedAsha:
    """ASHA (Li et al. 2020, arXiv:1810.05934, the variant that stops trials) in the order of the trials' numbers.

    At a rung a trial is compared with the trials of lower numbers that reached it: it goes on if it is not below the
    (1 - 1/factor) quantile of their scores. So the verdicts are those of ASHA with one trial at a time.
    """

    def __init__(self, grace: int, factor: int, total: int):
        self._rungs, self._factor, self._total = rungs(grace, factor, total), factor, total

    def first(self, trial: int) -> int:
        return _after(self._rungs, 0, self._total)

    def judge(self, results: Results, trial: int, gate: int) -> Verdict | Missing:
        missing = frozenset(t for t in range(trial) if not results.settled(t, gate))
        if missing:
            return Missing(missing)
        others = [s for t in range(trial) if (s := results.score(t, gate)) is not None]
        mine = results.score(trial, gate)
        assert mine is not None, "a trial is judged at a gate that it has reported"
        cut = percentile(others, 1 - 1 / self._factor) if others else WORST
        if mine < cut or (mine == WORST and others):
            return Verdict("stop", why=f"worse than the best 1/{self._factor} of the {len(others)} before it")
        return Verdict("go", _after(self._rungs, gate, self._total))


class Hyperband:
    """Hyperband (Li et al. 2018, arXiv:1603.06560): brackets of synchronous successive halving.

    Brackets are filled in the order of the trials' numbers, from the bracket with most halvings to the one without, and
    again from the first. At a rung all trials of a bracket that reached it are compared, and the best 1/factor go on.
    """

    def __init__(self, grace: int, factor: int, total: int, trials: int):
        self._total, self._factor = total, factor
        all_rungs = rungs(grace, factor, total)
        shapes = []
        for skipped in range(len(all_rungs) + 1):
            halvings = len(all_rungs) - skipped
            size = math.ceil((len(all_rungs) + 1) / (halvings + 1) * factor**halvings)
            shapes.append((size, all_rungs[skipped:]))
        self._brackets: list[tuple[range, list[int]]] = []
        at = 0
        while at < trials:
            size, gates = shapes[len(self._brackets) % len(shapes)]
            self._brackets.append((range(at, min(at + size, trials)), gates))
            at += size

    def _bracket(self, trial: int) -> tuple[range, list[int]]:
        return next(b for b in self._brackets if trial in b[0])

    def first(self, trial: int) -> int:
        return _after(self._bracket(trial)[1], 0, self._total)

    def judge(self, results: Results, trial: int, gate: int) -> Verdict | Missing:
        members, gates = self._bracket(trial)
        missing = frozenset(t for t in members if not results.settled(t, gate))
        if missing:
            return Missing(missing)
        scored = [(s, -t) for t in members if (s := results.score(t, gate)) is not None]
        best = sorted(scored, reverse=True)[: max(1, len(scored) // self._factor)]
        if -trial in [t for _, t in best]:
            return Verdict("go", _after(gates, gate, self._total))
        return Verdict("stop", why=f"not of the best {len(best)} of {len(scored)} in its bracket")


class Population:
    """Synchronous population based training (Jaderberg et al. 2017, arXiv:1711.09846, appendix A.1).

    Every `interval` evaluations the whole population is compared. A trial in the lowest quantile takes over the state
    of one in the highest, drawn by seed, evaluation and number, and goes on with that trial's options, changed a little
    or drawn again.
    """

    def __init__(
        self, space: Space, interval: int, total: int, trials: int, *, quantile: float, resample: float, seed: int
    ):
        self._space, self._interval, self._total, self._trials = space, interval, total, trials
        self._quantile, self._resample, self._seed = quantile, resample, seed

    def first(self, trial: int) -> int:
        return min(self._interval, self._total)

    def judge(self, results: Results, trial: int, gate: int) -> Verdict | Missing:
        missing = frozenset(t for t in range(self._trials) if not results.settled(t, gate))
        if missing:
            return Missing(missing)
        until = min(gate + self._interval, self._total)
        lowest, highest = self._quantiles(results, gate)
        if trial not in lowest:
            return Verdict("go", until)
        source = self._source(gate, trial, highest)
        return Verdict("exploit", until, "of the lowest quantile", source, self.options(results, trial, gate))

    def options(self, results: Results, trial: int, gate: int) -> Options:
        """The options of a trial after evaluation `gate` (0: from the start); all results up to it must be known."""
        if gate <= 0:
            return draw(self._space, self._seed, trial)
        lowest, highest = self._quantiles(results, gate)
        if trial not in lowest:
            return self.options(results, trial, gate - self._interval)
        source = random.Random(f"explore/{self._seed}/{gate}/{trial}")
        theirs = self.options(results, self._source(gate, trial, highest), gate - self._interval)
        return {
            name: domain.draw(source) if source.random() < self._resample else domain.perturb(theirs[name], source)
            for name, domain in self._space.items()
        }

    def _source(self, gate: int, trial: int, highest: Sequence[int]) -> int:
        return random.Random(f"exploit/{self._seed}/{gate}/{trial}").choice(sorted(highest))

    def _quantiles(self, results: Results, gate: int) -> tuple[list[int], list[int]]:
        ranked = sorted((s, -t) for t in range(self._trials) if (s := results.score(t, gate)) is not None)
        count = min(math.ceil(len(ranked) * self._quantile), len(ranked) // 2)
        return [-t for _, t in ranked[:count]], [-t for _, t in ranked[len(ranked) - count :]]
