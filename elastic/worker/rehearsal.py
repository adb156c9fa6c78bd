"""Before training: what the job's loss() and evaluate() return, tried on one batch and on its two halves.

A sum over samples grows with them, a mean does not. So a mean returned as the sum shows itself, and a weight that does
not count. Found out only where there is no doubt: the numbers do not depend on chance, the halves differ, and the whole
lies where no sum can lie. Losses that are neither pass, such as contrastive ones or those with a penalty for each call;
but how many passes a step has would change them, so their passes have one microbatch each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from elastic.config import TrainConfig
from elastic.data.identity import fingerprint
from elastic.data.loader import Loader
from elastic.data.samples import halves, untouched
from elastic.errors import ConfigError
from elastic.job import Job, MapDataset
from elastic.parallel.buffers import StepBuffers
from elastic.parallel.device import ZerosForEmpty
from elastic.parallel.records import OWN_WEIGHT, names_of
from elastic.parallel.wrapping import fsdp_modules
from elastic.seeds import derive, seed_all
from elastic.worker.belongings import Attributes, digest, leaves
from elastic.worker.evaluate import figures, held_out_batch
from elastic.worker.group import Group
from elastic.worker.returned import LossValue
from elastic.worker.traces import Parameters, without_trace
from elastic.worker.user_code import UserCode, UserCodeError

FORWARD_AND_BACKWARD = 3  # a backward pass has twice the products of its forward pass
_CLOSE = 1e-3  # of a sum: what counts as rounding
_APART = 1e-4  # of the larger half: halves nearer than that say nothing

_SAME = 1e-5  # of a loss: what may be otherwise if the same is computed twice
_SHOWN = 3
_OTHERS = (1, 3, 7)  # steps (from 0) of which a batch is tried beside that of the first one

#: Why passes have one microbatch each, so that a step is the same at every number of workers; the first is no reason.
SEPARATE = (
    "",
    "the loss of a batch is not the sum of the losses of its parts",
    "the weights of loss() count passes, not samples",
)
_NOT_ADDITIVE, _COUNTS_PASSES = 1, 2
_UNWRITTEN = (
    "the model or loss() reads a tensor that it has not written, as torch.empty() and empty_like() give: the loss is "
    "NaN where such memory holds NaN; make it with torch.zeros()"
)


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


def adds_up(found: Sequence[Sums]) -> bool:
    """Whether the loss of a batch is the sum of those of its halves, as far as can be known."""
    whole, *parts = (s.loss for s in found)
    if not all(map(math.isfinite, (whole, *parts))):
        return True
    return abs(whole - sum(parts)) <= _CLOSE * sum(map(abs, parts))


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
    counted = [key for key in names_of(whole.metrics) if key + OWN_WEIGHT not in whole.metrics]
    for key in counted if weight == "sum" else ():
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
        #: Why passes have one microbatch each, by its place in `SEPARATE`; None before `run`.
        self.separate: int | None = None
        self._unknown = False  # evaluations may have figures that one batch does not show
        self._batch: Any = None  # of the first microbatches
        #: A line for each metric, by what returned it, as far as that was tried.
        self.metrics: dict[str, list[str]] = {}
        #: Of a forward and backward pass; 0 where they could not be counted, None before it was tried.
        self.flops_per_sample: float | None = job.flops_per_sample

    def run(self, model: nn.Module, microbatches: int, group: Group | None) -> None:
        """Try everything on a model in place. Nothing is left of it.

        Losses that depend on the pass before are refused, and what writes to samples that the data set keeps.

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
            known = group.gather_in_mesh(-1 if self.separate is None else self.separate)
            if max(known) >= 0:
                self.separate = max(known)
                return
        where = self._code.where
        try:
            with without_trace(model, self._job) as parameters:
                try:
                    self._code.where = "a trial of loss() before the first step"
                    separate = self._try_loss(partial(self._code.try_loss, model), microbatches, agreed)
                    parameters.put_back()
                    self._try_evaluate(partial(self._code.evaluate, model), agreed, parameters)
                finally:
                    for module in fsdp_modules(model):
                        module.reshard()
            self._code.where = "a trial of loss() in training mode before the first step"
            self._try_twice(model, agreed)
        finally:
            self._code.where = where
        self.separate = separate

    def _try_loss(self, loss: Function, microbatches: int, agreed: Callable[[bool], bool]) -> int:
        """Returns why passes are to have one microbatch each, by its place in `SEPARATE`, as far as is known."""
        batches = self._loader.first_batches(microbatches)
        if agreed(not batches):
            return 0  # no batch can be had, perhaps on one node alone: the first step says why
        seed = derive("rehearsal", self._seed)
        try:
            found = self._counted(loss, batches, seed)
            if found and not self._config.data.workers:  # what comes from other processes is a copy
                self._check_kept("loss()", lambda: self._loader.first_batches(microbatches)[0][1], loss)
        except UserCodeError as error:
            if error.failure.kind == ConfigError.__name__:
                raise
            return 0  # in evaluation mode it need not work; and if it fails in training, the first step says so
        if agreed(self._config.run.exactness == "bitwise" and not _finite(found)):
            with ZerosForEmpty():
                again = _passes(loss, batches, seed)
            if agreed(_finite(again)):
                raise self._code.mistake(ConfigError(_UNWRITTEN))
        self._batch = batches[0][1]
        self.metrics["result of loss()"] = [f"metric {name}" for name in sorted(names_of(found[0].metrics))]
        if len(found) < 3:
            return 0
        self._refuse("loss()", loss, batches, found, agreed)
        separate = self._why_separate(loss, batches, found, agreed)
        # what is special about the loss may be about some samples only; in bitwise every pass has one microbatch anyway
        for step in () if self._config.run.exactness == "bitwise" else _OTHERS:
            separate = separate or self._try_another(loss, microbatches, step, agreed)
        return separate

    def _counted(self, loss: Function, batches: Batches, seed: int) -> list[Sums]:
        """The passes; of a whole model their FLOPs are counted on the way, if the job does not say how many there are.
        A cut model's members must all do the same, and counting may fail on one."""
        samples = sum(count for count, _ in batches)
        if self.flops_per_sample is None and not self._config.parallel.sharded and samples:
            counter: Any = FlopCounterMode(display=False)
            try:
                with counter:
                    found = _passes(loss, batches, seed)
            except UserCodeError:  # perhaps what counts does not go with the model
                self.flops_per_sample = 0.0
            else:
                self.flops_per_sample = FORWARD_AND_BACKWARD * counter.get_total_flops() / samples
                return found
        return _passes(loss, batches, seed)

    def _try_another(self, loss: Function, microbatches: int, step: int, agreed: Callable[[bool], bool]) -> int:
        batches = self._loader.first_batches(microbatches, step)
        if agreed(not batches):
            return 0
        try:
            found = _passes(loss, batches, derive("rehearsal", self._seed))
        except UserCodeError:
            return 0  # as with the first
        return self._why_separate(loss, batches, found, agreed) if len(found) == 3 else 0

    def _why_separate(self, loss: Function, batches: Batches, found: list[Sums], agreed: Callable[[bool], bool]) -> int:
        if agreed(not counts(found)):
            return _COUNTS_PASSES
        suspect = not adds_up(found)
        if not agreed(suspect):
            return 0
        again = _passes(loss, batches, derive("rehearsal again", self._seed))
        chance = not all(a.near(b) for a, b in zip(found, again))
        return _NOT_ADDITIVE if agreed(suspect and not chance) else 0

    def look_again(self, model: nn.Module, microbatches: int, step: int, group: Group) -> bool:
        """Whether a batch of a later step (from 0) shows that passes are to have one microbatch each. All members call
        this at one time, and all get the same answer."""
        agreed: Callable[[bool], bool] = partial(_on_any, group) if fsdp_modules(model) else bool
        where, self._code.where = self._code.where, f"a trial of loss() before step {step + 1}"
        try:
            with without_trace(model, self._job, first=False):
                trial = partial(self._code.try_loss, model)
                separate = self._try_another(trial, microbatches, step, agreed)
        finally:
            self._code.where = where
            for module in fsdp_modules(model):
                module.reshard()
        return _on_any(group, separate > 0)

    def _try_twice(self, model: nn.Module, agreed: Callable[[bool], bool]) -> None:
        """Refuse a loss that goes by what earlier passes left: which those were depends on the number of workers. Only
        buffers may carry something on."""
        if self._batch is None:
            return
        first, changed, written = self._two_passes(model, self._batch)
        if written and self._config.run.exactness == "bitwise":
            raise self._code.mistake(
                ConfigError(
                    f"loss() changes parameters of the model ({_listed(written)}), so their values depend on who runs "
                    "which microbatch; change them in after_step(), or use --run.exactness fast"
                )
            )
        apart = bool(first) and abs(first[1] - first[0]) > _SAME * abs(first[0])
        if not agreed(apart):
            return
        again, *_ = self._two_passes(model, self._batch)
        chance = max((abs(a - b) for a, b in zip(first, again)), default=math.inf)
        if apart and chance <= 0.01 * abs(first[1] - first[0]):
            kept = _listed(changed) or "an object"
            raise self._code.mistake(
                ConfigError(
                    f"loss() returned {first[0]:.6g} for a batch, and {first[1]:.6g} for the same batch and the same "
                    f"random numbers right after that: it goes by what the pass before left in {kept}; a step has "
                    "several passes, which workers share, so change it in after_step(), or make it a buffer"
                )
            )

    def _two_passes(self, model: nn.Module, batch: Any) -> tuple[list[float], list[str], list[str]]:
        """The losses of one batch, twice in a row, in training mode; what was changed meanwhile, and which parameters.
        Nothing where they cannot be had: the first step says why."""
        losses: list[float] = []
        with without_trace(model, self._job, training=True) as parameters:
            before = self._held(model)
            try:
                for _ in range(2):
                    with StepBuffers(model, exact=True).unmoved(), torch.set_grad_enabled(not fsdp_modules(model)):
                        seed_all(derive("rehearsal", self._seed))
                        losses.append(float(self._code.try_loss(model, _own(batch))[0].detach()))
            except UserCodeError:
                losses = []
            finally:
                for module in fsdp_modules(model):
                    module.reshard()
            after, written = self._held(model), parameters.written()
        return losses, sorted(name for name, was in before.items() if after.get(name, was) != was), written

    def _held(self, model: nn.Module) -> dict[str, str]:
        found = leaves({"job": Attributes(self._job), "model": model}, (), None)
        return {name: digest(leaf) for name, leaf in found.items()}

    def _check_kept(self, name: str, fetch: Callable[[], Any], use: Callable[[Any], object]) -> None:
        """Refuse a function that writes to samples which the data set keeps: the next to get them has others."""
        if type(self._job).collate_fn is Job.collate_fn:
            return  # torch's own copies
        before = fingerprint(batch := fetch())
        use(batch)
        if before is not None and before != (after := fingerprint(fetch())) and after == fingerprint(fetch()):
            raise self._code.mistake(
                ConfigError(
                    f"{name} writes to the tensors of its batch, which are those that the data set keeps, so it would "
                    "get changed samples the next time; copy them first, in collate_fn() or with .clone()"
                )
            )

    def _try_evaluate(
        self, evaluate: Callable[..., LossValue], agreed: Callable[[bool], bool], parameters: Parameters
    ) -> None:
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
            own_set = partial(evaluate, of=name)
            found = _passes(own_set, batches, derive("eval", self._seed, name, 0))
            if written := parameters.written():
                raise self._code.mistake(
                    ConfigError(
                        f"evaluate() changes parameters of the model ({_listed(written)}), so each evaluation would be "
                        "training, on each worker another one; leave the optimizer and gradients out of it"
                    )
                )
            self._check_kept("evaluate()", partial(held_out_batch, self._job, data, ids, seeds), own_set)
            if len(found) == 3:
                self._refuse("evaluate()", own_set, batches, found, agreed)
            more = self._try_evaluated(name, found[0])
            for key in figures(name, dict.fromkeys(("loss", *names_of(found[0].metrics), *more))):
                if key in keys:
                    raise ConfigError(f"two held-out figures would be {key}; rename a metric, or a set of eval_data()")
                keys.add(key)
        self._check_best(keys)
        self.metrics["result of evaluate()"] = [f"figure {key}" for key in sorted(keys)]

    def _try_evaluated(self, name: str, found: Sums) -> dict[str, float]:
        """Further figures from the sums of one batch, from which they need not be possible: a score divides by what the
        whole set has."""
        try:
            return self._code.evaluated(name, found.loss, found.weight, found.metrics)
        except UserCodeError as error:
            if error.failure.kind == ConfigError.__name__:
                raise
            self._unknown = True
            return {}

    def _check_best(self, keys: set[str]) -> None:
        keep, best = self._config.checkpoint.keep_best, self._config.checkpoint.best_metric
        if keep and best not in keys and not self._unknown:
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
        loss, weight, metrics = function(_own(batch))
        found.append(Sums(samples, float(loss), float(weight), {k: float(v) for k, v in metrics.items()}))
    return found


def _finite(found: Sequence[Sums]) -> bool:
    return all(math.isfinite(s.loss) for s in found)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _own(batch: Any) -> Any:
    """A copy to be written to, where it can be copied."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # of a class of the job's: then it is tried itself
        return batch


def _on_any(group: Group, here: bool) -> bool:
    """Whether it is so on any worker that shares the model. All call this at one time."""
    return any(group.gather_in_mesh(int(here)))
