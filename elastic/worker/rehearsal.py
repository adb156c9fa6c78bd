"""Before training: what the job's loss() and evaluate() return, tried on one batch and on its two halves.

A sum over samples grows with them, a mean does not. So a mean returned as the sum shows itself, and a weight that does
not count. Found out only where there is no doubt: the numbers do not depend on chance, the halves differ, and the whole
lies where no sum can lie. Losses that are neither, as contrastive ones, pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from elastic.config import TrainConfig
from elastic.data.loader import Loader
from elastic.data.samples import halves, untouched
from elastic.errors import ConfigError
from elastic.job import Job, MapDataset
from elastic.parallel.wrapping import fsdp_modules
from elastic.seeds import derive, seed_all
from elastic.worker.evaluate import figures, held_out_batch
from elastic.worker.group import Group
from elastic.worker.returned import LossValue
from elastic.worker.traces import without_trace
from elastic.worker.user_code import UserCode, UserCodeError

_CLOSE = 1e-3  # of a sum: what counts as rounding
_APART = 1e-4  # of the larger half: halves nearer than that say nothing


@dataclass(frozen=True)
class Sums:
    """What a pass returned, as numbers."""

    samples: int
    loss: float
    weight: float
    metrics: Mapping[str, float]

    def near(self, other: Sums) -> bool:
        """Whether another pass over the same samples found the same."""
        mine, theirs = ([s.loss, s.weight, *s.metrics.values()] for s in (self, other))
        return len(mine) == len(theirs) and all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(mine, theirs))


Batches = list[tuple[int, Any]]  # how many samples, and their batch: of all, of the first half, of the other
Function = Callable[[Any], LossValue]


def growth(whole: float, first: float, other: float) -> str:
    """How a number of all samples comes from those of two halves: sum, mean, same, or "" where it is not clear."""
    if not all(map(math.isfinite, (whole, first, other))) or first * other <= 0:
        return ""
    if abs(whole - first - other) <= _CLOSE * abs(first + other):
        return "sum"
    if whole == first == other:
        return "same"
    low, high = sorted((first, other))
    spread = high - low
    return "mean" if spread > _APART * max(-low, high) and low + 0.01 * spread < whole < high - 0.01 * spread else ""


def counts(found: Sequence[Sums]) -> bool:
    """Whether the weight counts something in samples, rather than being the same for any number of them."""
    return growth(*(s.weight for s in found)) != "same"


def mistake(name: str, found: Sequence[Sums]) -> str | None:
    """What is surely wrong with what a function of the job returned for a batch and its halves, or None."""
    whole, first, other = found
    weight = growth(whole.weight, first.weight, other.weight)
    loss = growth(whole.loss, first.loss, other.loss)
    half = f"{first.samples} and {other.samples} of them"
    if weight == "sum" and loss == "mean":
        return (
            f"{name} returned a mean, {whole.loss:.6g} for {whole.samples} samples, {first.loss:.6g} and "
            f"{other.loss:.6g} for {half}, but it is to return the sum, which is divided by the weight "
            f'({whole.weight:g} here); make it with reduction="sum", or multiply it by the weight'
        )
    if weight == "same" and loss == "sum":
        return (
            f"{name} returned a sum, {whole.loss:.6g} for {whole.samples} samples, {first.loss:.6g} and "
            f"{other.loss:.6g} for {half}, with the weight {whole.weight:g} each time, which counts none of them; "
            "return the number of samples or tokens as the weight"
        )
    for key in whole.metrics if weight == "sum" else ():
        values = [s.metrics[key] for s in found if key in s.metrics]
        if len(values) == len(found) and growth(*values) == "mean":
            return (
                f"metric {key!r} that {name} returned is a mean, {values[0]:.6g} for {whole.samples} samples, "
                f"{values[1]:.6g} and {values[2]:.6g} for {half}, but it is to be the sum, which is divided by the "
                "weight; count instead, or multiply it by the weight"
            )
    return None


class Rehearsal:
    """Tries the job's functions, once in a process."""

    def __init__(
        self,
        job: Job,
        config: TrainConfig,
        code: UserCode,
        loader: Loader,
        eval_sets: Mapping[str, MapDataset],
        *,
        eval_size: int,
    ):
        """`eval_size`: samples of one pass of an evaluation."""
        self._job, self._config, self._code, self._loader = job, config, code, loader
        self._eval_sets, self.eval_size = eval_sets, eval_size
        self._seed = config.run.seed
        #: Whether the weights of loss() count something in samples, rather than passes; None before `run`.
        self.weights_count: bool | None = None
        #: A line for each metric, by what returned it, as far as that was tried.
        self.metrics: dict[str, list[str]] = {}

    def run(self, model: nn.Module, microbatches: int, group: Group | None) -> None:
        """Try everything on a model in place. Nothing is left of it.

        Args:
            microbatches: how many of the first step the batch for loss() is made of.
            group: of those that share a cut model; they do this at one time, unless one of them has done it before.

        Raises:
            UserCodeError: evaluate() raised, or what it or loss() returned is not what it should be.
            ConfigError: two figures of an evaluation would have one name, or none has that of --checkpoint.best-metric.
        """
        agreed: Callable[[bool], bool] = bool
        if group is not None:
            agreed = partial(_on_any, group)
            mine = self.weights_count
            known = [count for count in group.gather_in_mesh(-1 if mine is None else int(mine)) if count >= 0]
            if known:
                self.weights_count = bool(min(known))
                return
        where = self._code.where
        try:
            with without_trace(model, self._job):
                try:
                    self._code.where = "a trial of loss() before the first step"
                    weights_count = self._try_loss(partial(self._code.try_loss, model), microbatches, agreed)
                    self._try_evaluate(partial(self._code.evaluate, model), agreed)
                finally:
                    for module in fsdp_modules(model):
                        module.reshard()
        finally:
            self._code.where = where
        self.weights_count = weights_count

    def _try_loss(self, loss: Function, microbatches: int, agreed: Callable[[bool], bool]) -> bool:
        """Returns whether its weights count samples, as far as is known."""
        batches = self._loader.first_batches(microbatches)
        seed = derive("rehearsal", self._seed)
        try:
            found = _passes(loss, batches, seed)
        except UserCodeError as error:
            if error.failure.kind == ConfigError.__name__:
                raise
            return True  # in evaluation mode it need not work; and if it fails in training, the first step says so
        if not found:
            return True  # no batch can be had: the first step says why
        self.metrics["result of loss()"] = [f"metric {name}" for name in sorted(found[0].metrics)]
        if len(found) < 3:
            return True
        self._refuse("loss()", loss, batches, found, agreed)
        return not agreed(not counts(found))

    def _try_evaluate(self, evaluate: Function, agreed: Callable[[bool], bool]) -> None:
        own, keys = type(self._job).evaluate is not Job.evaluate, set[str]()
        for name, held_out in self._eval_sets.items():
            which = f"eval_data()[{name!r}]" if name else "eval_data()"
            self._code.where = f"a trial of evaluate() on {which} before the first step"
            data = untouched(held_out) if self._config.data.workers else held_out
            ids = list(range(min(self.eval_size, len(data))))
            cuts = [ids, *halves(ids)] if own else [ids]
            seeds = (self._seed, name, 0)
            batches = [
                (len(cut), self._code.guard(partial(held_out_batch, self._job, data, cut, seeds), alone=True))
                for cut in cuts
            ]
            found = _passes(evaluate, batches, derive("eval", self._seed, name, 0))
            if len(found) == 3:
                self._refuse("evaluate()", evaluate, batches, found, agreed)
            for key in figures(name, ("loss", *found[0].metrics)):
                if key in keys:
                    raise ConfigError(f"two held-out figures would be {key}; rename a metric, or a set of eval_data()")
                keys.add(key)
        self._check_best(keys)
        self.metrics["result of evaluate()"] = [f"figure {key}" for key in sorted(keys)]

    def _check_best(self, keys: set[str]) -> None:
        keep, best = self._config.checkpoint.keep_best, self._config.checkpoint.best_metric
        if keep and best not in keys:
            raise ConfigError(
                f"--checkpoint.keep-best is {keep}, by --checkpoint.best-metric {best}, but evaluations have "
                f"{', '.join(sorted(keys)) or 'no figures, since nothing is held out'}; give one of them"
            )

    def _refuse(
        self, name: str, function: Function, batches: Batches, found: list[Sums], agreed: Callable[[bool], bool]
    ) -> None:
        """Raise if there is a mistake, and no chance in it: under another seed everything is the same."""
        sentence = None if self._loader.draws_together() else mistake(name, found)  # mixed samples make no sums
        if agreed(sentence is not None):
            again = _passes(function, batches, derive("rehearsal again", self._seed))
            if sentence is not None and all(a.near(b) for a, b in zip(found, again)):
                raise self._code.mistake(ConfigError(sentence))


def _passes(function: Function, batches: Batches, seed: int) -> list[Sums]:
    found = []
    for samples, batch in batches:
        seed_all(seed)
        loss, weight, metrics = function(batch)
        found.append(Sums(samples, float(loss), float(weight), {k: float(v) for k, v in metrics.items()}))
    return found


def _on_any(group: Group, here: bool) -> bool:
    """Whether it is so on any worker that shares the model. All call this at one time."""
    return any(group.gather_in_mesh(int(here)))
