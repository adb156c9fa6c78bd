"""Before training: what the job's loss() and evaluate() return, tried on one batch and on its two halves.

Mistakes are told only where there is no doubt: the numbers do not depend on chance, the halves differ, and the whole
lies where no sum can lie, and where a mean does. How many passes a step has would change losses that are neither, so
their passes have one microbatch each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from elastic.compat.torch import is_compiler_loaded
from elastic.config import TrainConfig
from elastic.data.identity import fingerprint
from elastic.data.loader import Loader
from elastic.data.samples import halves, untouched
from elastic.errors import ConfigError
from elastic.job import Job, MapDataset
from elastic.parallel.buffers import StepBuffers
from elastic.parallel.device import ZerosForEmpty
from elastic.parallel.records import names_of
from elastic.parallel.wrapping import fsdp_modules
from elastic.seeds import derive, seed_all
from elastic.worker.belongings import Attributes, digest, leaves
from elastic.worker.evaluate import figures, held_out_batch
from elastic.worker.group import Group
from elastic.worker.naming import check_same_names, persistent_entries
from elastic.worker.returned import LossValue
from elastic.worker.sums import CLOSE, Sums, adds_up, counts, mistake
from elastic.worker.traces import GatheredWrites, Parameters, without_trace
from elastic.worker.user_code import UserCode, UserCodeError, is_out_of_memory

FORWARD_AND_BACKWARD = 3  # a backward pass has twice the products of its forward pass

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
_UNSEEDED = (
    "loss() returns another value each time for one batch, under one seed: it takes random numbers, or the time, from "
    "where Elastic does not seed; draw from random, numpy or torch, without generators of your own"
)
_UNWRITTEN = (
    "the model or loss() reads a tensor that it has not written, as torch.empty() and empty_like() give: the loss is "
    "NaN where such memory holds NaN; make it with torch.zeros()"
)


@dataclass(frozen=True)
class _Twice:
    """What came of two passes: the losses, what else changed, and parameters that were written to: by the first pass,
    by the second as well, and while they were gathered."""

    losses: list[float]
    changed: list[str]
    written: list[str]
    again: list[str]
    lost: list[str]
    counted: dict[str, torch.Tensor]  # by how much integer buffers moved in the second one

    @property
    def apart(self) -> float:
        """How far the losses are apart."""
        return abs(self.losses[1] - self.losses[0]) if self.losses else 0.0


Batches = list[tuple[int, Any]]  # how many samples, and their batch: of all, of the first half, of the other
Function = Callable[..., LossValue]


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
        self._half: Any = None  # of that
        #: Why the bits of a run cannot come back, if loss() shows it.
        self.unseeded = ""
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
        where, made = self._code.where, tuple(persistent_entries(model))
        try:
            with without_trace(model, self._job) as parameters:
                try:
                    self._code.where = "a trial of loss() before the first step"
                    separate = self._try_loss(_in_memory(partial(self._code.try_loss, model)), microbatches, agreed)
                    parameters.put_back()
                    self._try_evaluate(_in_memory(partial(self._code.evaluate, model)), agreed, parameters)
                finally:
                    for module in fsdp_modules(model):
                        module.reshard()
            self._code.where = "a trial of loss() in training mode before the first step"
            self._try_twice(model, agreed)
            try:
                check_same_names(model, made)
            except ConfigError as error:
                raise self._code.mistake(error) from None
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
        self._batch, self._half = batches[0][1], batches[1][1] if len(batches) > 1 else None
        self.metrics["result of loss()"] = [f"metric {name}" for name in sorted(names_of(found[0].metrics))]
        if len(found) < 3:
            return 0
        others = self._others(loss, microbatches, agreed) if agreed(mistake("loss()", found) is not None) else []
        self._refuse("loss()", loss, [found, *others], batches, agreed)
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

    def _others(self, loss: Function, microbatches: int, agreed: Callable[[bool], bool]) -> list[list[Sums]]:
        """What the loss of further batches is."""
        found = []
        for step in _OTHERS:
            batches = self._loader.first_batches(microbatches, step)
            if agreed(not batches):
                break
            try:
                sums = _passes(loss, batches, derive("rehearsal", self._seed))
            except UserCodeError:
                break  # as with the first
            if len(sums) == 3:
                found.append(sums)
        return found

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
        if self._config.precision.autocast != "off":  # which rounds, perhaps otherwise where there are fewer samples
            with (
                self._code.without_autocast(),
                suppress(UserCodeError),
            ):  # it goes by the number format: then that counts
                suspect = suspect and not adds_up(_passes(loss, batches, derive("rehearsal", self._seed)))
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
                trial = _in_memory(partial(self._code.try_loss, model))
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
        exact = self._config.run.exactness == "bitwise"
        first = self._passes_in_training(model, self._batch, self._batch)
        self._refuse_writes(first, agreed, exact=exact)
        if agreed(bool(first.written)) and self._half is not None:  # as what is initialised by the first batch
            self._refuse_writes(self._passes_in_training(model, self._batch, self._half), agreed, exact=exact)
        counting = [name for name, moved in first.counted.items() if int(moved.abs().max()) > 1]
        if agreed(bool(counting)) and self._half is not None:
            self._refuse_counts(first, self._passes_in_training(model, self._half, self._half), agreed)
        apart = first.apart > _SAME * abs(first.losses[0]) if first.losses else False
        if not agreed(apart or (exact and first.apart > 0)):
            return
        again = self._passes_in_training(model, self._batch, self._batch)
        chance = max((abs(a - b) for a, b in zip(first.losses, again.losses)), default=math.inf)
        if apart and chance <= 0.01 * first.apart:
            kept = _listed(first.changed) or "an object"
            raise self._code.mistake(
                ConfigError(
                    f"loss() returned {first.losses[0]:.6g} for a batch, and {first.losses[1]:.6g} for the same batch "
                    f"and the same random numbers right after that: it goes by what the pass before left in {kept}; a "
                    "step has several passes, which workers share, so change it in after_step(), or make it a buffer"
                )
            )
        if agreed(exact and chance > 0):
            self.unseeded = _UNSEEDED

    def _refuse_writes(self, found: _Twice, agreed: Callable[[bool], bool], *, exact: bool) -> None:
        """Refuse a loss that writes to parameters, unless that is the same however often it is done."""
        where = "a step has several passes, which workers share; change them in after_step()"
        for names, why in (
            (found.lost, "while they are gathered, and with --parallel.strategy fsdp and hsdp such changes are lost"),
            (found.again, f"again in each pass, but {where}"),
            (found.written if exact else [], f"but {where}, or use --run.exactness fast"),
        ):
            if agreed(bool(names)):
                listed = _listed(names) or "seen on another worker"
                raise self._code.mistake(ConfigError(f"loss() changes parameters of the model ({listed}) {why}"))

    def _refuse_counts(self, whole: _Twice, half: _Twice, agreed: Callable[[bool], bool]) -> None:
        """Refuse integer buffers that move by the samples of a pass: a step has several passes, all of which begin with
        the buffers of its beginning."""
        names = [
            name
            for name, moved in whole.counted.items()
            if half.losses and not torch.equal(moved, half.counted.get(name, torch.zeros_like(moved)))
        ]
        if agreed(bool(names)):
            raise self._code.mistake(
                ConfigError(
                    f"a pass moves the integer buffer {_listed(names)} by how many samples it has, but a step has "
                    "several passes, which all begin with the buffers of the step's beginning, so it would be that of "
                    "one pass; count the samples of a step in after_step(), and keep queues of samples by steps"
                )
            )

    def _passes_in_training(self, model: nn.Module, *batches: Any) -> _Twice:
        """Two passes, one after the other, in training mode, after parameters have moved as in an update. No losses
        where they cannot be had: the first step says why."""
        losses: list[float] = []
        written, again, lost = list[str](), list[str](), GatheredWrites(model)
        counted: dict[str, torch.Tensor] = {}
        with without_trace(model, self._job, training=True) as parameters:
            parameters.move()
            before = self._held(model)
            try:
                for batch in batches:
                    with StepBuffers(model, exact=True).unmoved(), torch.set_grad_enabled(not fsdp_modules(model)):
                        begun = _integers(model)
                        seed_all(derive("rehearsal", self._seed))
                        trial = _in_memory(partial(self._code.try_loss, model, looking=lost.looking))
                        losses.append(float(trial(_own(batch))[0].detach()))
                        now = _integers(model)
                        counted = {
                            n: now[n] - b
                            for n, b in begun.items()
                            if n in now and now[n].shape == b.shape and not torch.equal(now[n], b)
                        }
                    if len(losses) == 1:
                        written = parameters.written()
                        after = parameters.copies(written)
                again = parameters.others(after)
            except UserCodeError:
                losses = []
            finally:
                for module in fsdp_modules(model):
                    module.reshard()
            held = self._held(model)
        changed = sorted(name for name, was in before.items() if held.get(name, was) != was)
        return _Twice(losses, changed, written, again, sorted(lost.names), counted)

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
            seed, fetch = derive("eval", self._seed, name, 0), partial(self._held_out, name, data, own)
            own_set = partial(evaluate, of=name)
            batches = fetch(0)
            found = _passes(own_set, batches, seed)
            if written := parameters.written():
                raise self._code.mistake(
                    ConfigError(
                        f"evaluate() changes parameters of the model ({_listed(written)}), so each evaluation would be "
                        "training, on each worker another one; leave the optimizer and gradients out of it"
                    )
                )
            self._check_kept("evaluate()", partial(_whole, fetch), own_set)
            if len(found) == 3:
                more_batches = range(self.eval_size, min(len(data) - 1, 4 * self.eval_size), self.eval_size)
                unclear = agreed(mistake("evaluate()", found) is not None)
                others = [_passes(own_set, fetch(first), seed) for first in (more_batches if unclear else ())]
                self._refuse("evaluate()", own_set, [found, *others], batches, agreed)
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

    def _held_out(self, name: str, data: MapDataset, own: bool, first: int) -> Batches:
        """A batch of a held-out set, and its halves if it has an evaluate() of its own."""
        ids = list(range(first, min(first + self.eval_size, len(data))))
        key = (self._seed, name, 0)
        return [
            (len(cut), self._code.guard(partial(held_out_batch, self._job, data, cut, key), alone=True))
            for cut in ([ids, *halves(ids)] if own else [ids])
        ]

    def _check_best(self, keys: set[str]) -> None:
        keep, best = self._config.checkpoint.keep_best, self._config.checkpoint.best_metric
        if keep and best not in keys and not self._unknown:
            raise ConfigError(
                f"--checkpoint.keep-best is {keep}, by --checkpoint.best-metric {best}, but evaluations have "
                f"{', '.join(sorted(keys)) or 'no figures, since nothing is held out'}; give one of them"
            )

    def _refuse(
        self,
        name: str,
        function: Function,
        found: Sequence[list[Sums]],
        batches: Batches,
        agreed: Callable[[bool], bool],
    ) -> None:
        """Raise if there is a mistake, and no chance in it: the first batch leaves no doubt or all have it, and under
        another seed everything is the same.

        Args:
            found: for each batch that was tried.
            batches: the first one.
        """
        first, *others = found
        sentence = None if self._loader.draws_together() else mistake(name, first)  # mixed samples make no sums
        sure = mistake(name, first, sure=True) is not None
        if not sure and not (others and all(mistake(name, other) for other in others)):
            sentence = None
        if agreed(sentence is not None):
            again = _passes(function, batches, derive("rehearsal again", self._seed))
            if sentence is not None and all(a.near(b) for a, b in zip(first, again)):
                raise self._code.mistake(ConfigError(sentence))


def _in_memory(function: Function) -> Function:
    """Nothing is compiled in trials, but what is compiled in a step may need far less memory there, as flex_attention
    does: so where memory runs out, it is tried once more as in a step."""

    def call(batch: Any, **more: Any) -> LossValue:
        with suppress(_OutOfMemory):
            return attempt(batch, **more)
        with torch.compiler.set_stance("default"):
            return function(batch, **more)

    def attempt(batch: Any, **more: Any) -> LossValue:
        try:
            return function(batch, **more)
        except UserCodeError as error:
            if is_compiler_loaded() and error.__cause__ is not None and is_out_of_memory(error.__cause__):
                raise _OutOfMemory from None  # without the frames, which hold what was computed
            raise

    return call


class _OutOfMemory(Exception):
    pass


def _passes(function: Function, batches: Batches, seed: int) -> list[Sums]:
    found = []
    for samples, batch in batches:
        seed_all(seed)
        loss, weight, metrics = function(_own(batch))
        figures = {k: float(v) for k, v in metrics.items()}
        found.append(Sums(samples, float(loss), float(weight), figures, max(CLOSE, _rounding(loss))))
    return found


def _integers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the buffers with whole numbers, of the sizes that they have now."""
    named = model.named_buffers()
    return {
        n: b.detach().long().clone() for n, b in named if not b.is_floating_point() and not b.is_complex() and b.numel()
    }


def _whole(fetch: Callable[[int], Batches]) -> Any:
    return fetch(0)[0][1]


def _rounding(loss: Any) -> float:
    """How much of a sum may be lost in its number format."""
    short = isinstance(loss, torch.Tensor) and loss.is_floating_point()
    return 4 * torch.finfo(loss.dtype).eps if short else 0.0


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
