"""Before training: tries the job's loss() and evaluate() on one batch and on its two halves.

A mistake is reported only without doubt: the numbers do not depend on chance, the halves differ, and the number of the
whole batch lies where a mean may lie and a sum may not. A loss that is neither sum nor mean would change with the
number of passes in a step; with such a loss each pass has one microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from elastic.config import TrainConfig
from elastic.data.identity import fingerprint
from elastic.data.loader import Loader
from elastic.data.samples import halves, untouched
from elastic.errors import ConfigError
from elastic.job import Job, MapDataset
from elastic.parallel.device import ZerosForEmpty
from elastic.parallel.records import names_of
from elastic.parallel.wrapping import fsdp_modules, reshard
from elastic.seeds import derive
from elastic.worker.belongings import globals_of
from elastic.worker.evaluate import figures, held_out_batch
from elastic.worker.gradients import add_up
from elastic.worker.group import Group
from elastic.worker.naming import check_same_names, persistent_entries
from elastic.worker.repeats import UNSEEDED, Repeats
from elastic.worker.returned import LossValue
from elastic.worker.sums import Sums, adds_up, counts, mistake
from elastic.worker.traces import Parameters, without_trace
from elastic.worker.trials import Agreed, Batches, Function, in_memory, listed, passes
from elastic.worker.user_code import UserCode, UserCodeError

FORWARD_AND_BACKWARD = 3  # a backward pass has twice the matrix products of its forward pass

_OTHERS = (1, 3, 7)  # further steps (from 0) whose first batches are tried

#: Why each pass has one microbatch, which makes a step the same at every number of workers; "" is no reason.
SEPARATE = (
    "",
    "the loss of a batch is not the sum of the losses of its parts",
    "the weights of loss() count passes, not samples",
    "what is left in a buffer goes by how many samples a pass has",
    "the gradients of a batch are not the sums of those of its parts",
)
_NOT_ADDITIVE, _COUNTS_PASSES, _BY_SIZE, _GRADIENTS = 1, 2, 3, 4
_UNWRITTEN = (
    "the model or loss() reads a tensor that it has not written, as torch.empty() and empty_like() give: the loss is "
    "NaN where such memory holds NaN; make it with torch.zeros()"
)


class Rehearsal:
    """Tries the job's functions, once per process."""

    def __init__(
        self,
        job: Job,
        config: TrainConfig,
        code: UserCode,
        loader: Loader,
        eval_sets: Mapping[str, MapDataset],
        *,
        eval_size: int,
        phases: Sequence[str] = ("",),
    ):
        """Nothing is tried yet.

        Args:
            eval_size: the number of samples in one pass of an evaluation.
            phases: whose losses there are; one without a name if there are none.
        """
        self._job, self._config, self._code, self._loader = job, config, code, loader
        self._eval_sets, self.eval_size = eval_sets, eval_size
        self._seed, self._phases = config.run.seed, phases
        #: The index in `SEPARATE` of why each pass has one microbatch; None before `run`.
        self.separate: int | None = None
        self._unknown = False  # evaluations may have figures that one batch does not show
        self._batch: Any = None  # the first microbatches of the run
        self._halves: Batches = []  # of their samples
        self._by_size = False  # what passes leave in a buffer goes by how many samples each has
        #: A sentence if loss() shows that the bits of a run cannot be repeated.
        self.unseeded = ""
        #: Names of parameters that passes write to without changing more the second time.
        self.written: set[str] = set()
        #: Lines about each metric, by the function that returned it, as far as it was tried.
        self.metrics: dict[str, list[str]] = {}
        #: FLOPs of a forward and backward pass per sample; 0 if they could not be counted, None before they were.
        self.flops_per_sample: float | None = job.flops_per_sample
        self._counts_flops = job.flops_per_sample is None

    def run(
        self,
        model: nn.Module,
        microbatches: int,
        group: Group | None,
        learning: Callable[[str], AbstractContextManager[None]] = lambda phase: nullcontext(),
    ) -> None:
        """Try loss() and evaluate() on a model. The model and the job are afterwards what they were.

        A loss that depends on the pass before it is refused, and so is a function that writes to samples which the data
        set keeps.

        Args:
            microbatches: the number of microbatches of the first step that make the batch for loss().
            group: the group of workers that share a sharded model. All of them call this at one time; nothing is tried
                if one of them has done it before.
            learning: entered around the loss of a phase.

        Raises:
            UserCodeError: evaluate() raised, or it or loss() returned a wrong value.
            ConfigError: two figures of an evaluation would have the same name, or none has that of
                --checkpoint.best-metric.
        """
        agreed: Agreed = bool
        if group is not None:
            agreed = partial(_on_any, group)
            known = group.gather_in_mesh(-1 if self.separate is None else self.separate)
            if max(known) >= 0:
                self.separate = max(known)
                return
        where, made = self._code.where, tuple(persistent_entries(model))
        try:
            with without_trace(model, self._job, *globals_of(self._job)) as parameters:
                try:
                    separate = 0
                    for phase in self._phases:
                        self._code.phase = phase
                        self._code.where = f"a trial of {self._code.loss_called} before the first step"
                        with learning(phase):
                            trial = in_memory(partial(self._code.try_loss, model))
                            found = self._try_loss(trial, microbatches, agreed) or self._try_gradients(trial, model)
                            separate = found or separate
                        parameters.put_back()
                    self._try_evaluate(in_memory(partial(self._code.evaluate, model)), agreed, parameters)
                finally:
                    reshard(model)
            for phase in self._phases if self._batch is not None else ():
                self._code.phase = phase
                self._code.where = f"a trial of {self._code.loss_called} in training mode before the first step"
                repeats = Repeats(self._job, self._code, self._seed, exact=self._config.run.exactness == "bitwise")
                with learning(phase):
                    self.unseeded = (
                        UNSEEDED if repeats.check(model, self._batch, self._halves, agreed) else self.unseeded
                    )
                self.written, self._by_size = self.written | repeats.written, self._by_size | repeats.by_size
            try:
                check_same_names(model, made)
            except ConfigError as error:
                raise self._code.mistake(error) from None
        finally:
            self._code.where = where
        self.separate = separate or (_BY_SIZE if self._by_size else 0)

    def _try_loss(self, loss: Function, microbatches: int, agreed: Agreed) -> int:
        """Try loss() in evaluation mode, and return the index in `SEPARATE` of why passes have one microbatch."""
        batches = self._loader.first_batches(microbatches)
        if agreed(not batches):
            return 0  # no batch can be read, perhaps on one node only: the first step reports why
        seed, name = derive("rehearsal", self._seed), self._code.loss_called
        try:
            found = self._counted(loss, batches, seed)
            if found and not self._config.data.workers:  # batches of loader processes are copies
                self._check_kept(name, lambda: self._loader.first_batches(microbatches)[0][1], loss)
        except UserCodeError as error:
            if error.failure.kind == ConfigError.__name__:
                raise
            return 0  # loss() need not work in evaluation mode; if it fails in training too, the first step reports why
        if agreed(self._config.run.exactness == "bitwise" and not _finite(found)):
            with ZerosForEmpty():
                again = passes(loss, batches, seed)
            if agreed(_finite(again)):
                raise self._code.mistake(ConfigError(_UNWRITTEN))
        self._batch, self._halves = batches[0][1], batches[1:]
        self.metrics[f"result of {name}"] = [f"metric {name}" for name in sorted(names_of(found[0].metrics))]
        if len(found) < 3:
            return 0
        others = self._others(loss, microbatches, agreed) if agreed(mistake(name, found) is not None) else []
        self._refuse(name, loss, [found, *others], batches, agreed)
        separate = self._why_separate(loss, batches, found, agreed)
        # Some samples may make the loss special, so further batches are tried. In bitwise each pass has one microbatch
        # anyway.
        for step in () if self._config.run.exactness == "bitwise" else _OTHERS:
            separate = separate or self._try_another(loss, microbatches, step, agreed)
        return separate

    def _try_gradients(self, loss: Function, model: nn.Module) -> int:
        """Try the gradients of a whole model in evaluation mode; in bitwise each pass has one microbatch anyway."""
        if self._batch is None or self._config.parallel.sharded or self._config.run.exactness == "bitwise":
            return 0
        batches = [self._batch, *(half for _, half in self._halves)]
        return 0 if add_up(loss, model.parameters(), batches, self._seed) else _GRADIENTS

    def _counted(self, loss: Function, batches: Batches, seed: int) -> list[Sums]:
        """Run the passes, and count the FLOPs of a whole model on the way, unless the job tells them.

        With a sharded model FLOPs are not counted: its members must all do the same, and counting may fail on one of
        them.
        """
        samples = sum(count for count, _ in batches)
        if self._counts_flops and not self._config.parallel.sharded and samples:
            counter: Any = FlopCounterMode(display=False)
            try:
                with counter:
                    found = passes(loss, batches, seed)
            except UserCodeError:  # counting may be what fails, as with kernels of the job's own
                self.flops_per_sample = 0.0
            else:
                each = FORWARD_AND_BACKWARD * counter.get_total_flops() / samples
                self.flops_per_sample = (self.flops_per_sample or 0.0) + each / len(self._phases)  # of a mean step
                return found
        return passes(loss, batches, seed)

    def _others(self, loss: Function, microbatches: int, agreed: Agreed) -> list[list[Sums]]:
        """Return the sums of the loss for further batches."""
        found = []
        for step in _OTHERS:
            batches = self._loader.first_batches(microbatches, step)
            if agreed(not batches):
                break
            try:
                sums = passes(loss, batches, derive("rehearsal", self._seed))
            except UserCodeError:
                break  # as with the first batch
            if len(sums) == 3:
                found.append(sums)
        return found

    def _try_another(self, loss: Function, microbatches: int, step: int, agreed: Agreed) -> int:
        batches = self._loader.first_batches(microbatches, step)
        if agreed(not batches):
            return 0
        try:
            found = passes(loss, batches, derive("rehearsal", self._seed))
        except UserCodeError:
            return 0  # as with the first batch
        return self._why_separate(loss, batches, found, agreed) if len(found) == 3 else 0

    def _why_separate(self, loss: Function, batches: Batches, found: list[Sums], agreed: Agreed) -> int:
        if agreed(not counts(found)):
            return _COUNTS_PASSES
        suspect = not adds_up(found)
        if not agreed(suspect):
            return 0
        if self._config.precision.autocast != "off":  # autocast rounds, and perhaps differently for fewer samples
            with (
                self._code.without_autocast(),
                suppress(UserCodeError),
                # without autocast the job may fail, for its number formats: then the rounded sums decide
            ):
                suspect = suspect and not adds_up(passes(loss, batches, derive("rehearsal", self._seed)))
            if not agreed(suspect):
                return 0
        again = passes(loss, batches, derive("rehearsal again", self._seed))
        chance = not all(a.near(b) for a, b in zip(found, again))
        return _NOT_ADDITIVE if agreed(suspect and not chance) else 0

    def look_again(self, model: nn.Module, microbatches: int, step: int, group: Group) -> bool:
        """Return whether a batch of a later step (from 0) shows that each pass is to have one microbatch.

        All members call this at one time, and all get the same answer.
        """
        agreed: Agreed = partial(_on_any, group) if fsdp_modules(model) else bool
        where, self._code.where = self._code.where, f"a trial of loss() before step {step + 1}"
        try:
            with without_trace(model, self._job, *globals_of(self._job), first=False):
                trial, separate = in_memory(partial(self._code.try_loss, model)), 0
                for phase in self._phases:
                    self._code.phase = phase
                    separate = separate or self._try_another(trial, microbatches, step, agreed)
        finally:
            self._code.where = where
            reshard(model)
        return _on_any(group, separate > 0)

    def _check_kept(self, name: str, fetch: Callable[[], Any], use: Callable[[Any], object]) -> None:
        """Refuse a function that writes to samples which the data set keeps: the next to read them would get changed
        samples."""
        if type(self._job).collate_fn is Job.collate_fn:
            return  # torch's default_collate copies samples
        before = fingerprint(batch := fetch())
        use(batch)
        if before is not None and before != (after := fingerprint(fetch())) and after == fingerprint(fetch()):
            raise self._code.mistake(
                ConfigError(
                    f"{name} writes to the tensors of its batch, which are those that the data set keeps, so it would "
                    "get changed samples the next time; copy them first, in collate_fn() or with .clone()"
                )
            )

    def _try_evaluate(self, evaluate: Callable[..., LossValue], agreed: Agreed, parameters: Parameters) -> None:
        own, keys = type(self._job).evaluate is not Job.evaluate, set[str]()
        for name, held_out in self._eval_sets.items():
            which = f"eval_data()[{name!r}]" if name else "eval_data()"
            self._code.where = f"a trial of evaluate() on {which} before the first step"
            data = untouched(held_out) if self._config.data.workers else held_out
            seed, fetch = derive("eval", self._seed, name, 0), partial(self._held_out, name, data, own)
            own_set = partial(evaluate, of=name)
            batches = fetch(0)
            found = passes(own_set, batches, seed)
            if written := parameters.written():
                raise self._code.mistake(
                    ConfigError(
                        f"evaluate() changes parameters of the model ({listed(written)}), so each evaluation would be "
                        "training, on each worker another one; leave the optimizer and gradients out of it"
                    )
                )
            self._check_kept("evaluate()", partial(_whole, fetch), own_set)
            if len(found) == 3:
                more_batches = range(self.eval_size, min(len(data) - 1, 4 * self.eval_size), self.eval_size)
                unclear = agreed(mistake("evaluate()", found) is not None)
                others = [passes(own_set, fetch(first), seed) for first in (more_batches if unclear else ())]
                self._refuse("evaluate()", own_set, [found, *others], batches, agreed)
            more = self._try_evaluated(name, found[0])
            for key in figures(name, dict.fromkeys(("loss", *names_of(found[0].metrics), *more))):
                if key in keys:
                    raise ConfigError(f"two held-out figures would be {key}; rename a metric, or a set of eval_data()")
                keys.add(key)
        self._check_best(keys)
        self.metrics["result of evaluate()"] = [f"figure {key}" for key in sorted(keys)]

    def _try_evaluated(self, name: str, found: Sums) -> dict[str, float]:
        """Return the figures that the job makes from the sums of one batch; none if evaluated() raises.

        It may raise on one batch, for example if a score divides by what only the whole set has.
        """
        try:
            return self._code.evaluated(name, found.loss, found.weight, found.metrics)
        except UserCodeError as error:
            if error.failure.kind == ConfigError.__name__:
                raise
            self._unknown = True
            return {}

    def _held_out(self, name: str, data: MapDataset, own: bool, first: int) -> Batches:
        """Return a batch of a held-out set, and its halves if the job has its own evaluate()."""
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
        agreed: Agreed,
    ) -> None:
        """Raise if the results show a mistake that is no chance.

        That is so if the first batch leaves no doubt or all batches show it, and if another seed gives the same
        numbers.

        Args:
            found: the sums of each batch that was tried, of the whole batch and its halves.
            batches: the first batch and its halves.
        """
        first, *others = found
        # samples that are drawn together may differ between the batch and its halves
        sentence = None if self._loader.draws_together() else mistake(name, first)
        sure = mistake(name, first, sure=True) is not None
        if not sure and not (others and all(mistake(name, other) for other in others)):
            sentence = None
        if agreed(sentence is not None):
            again = passes(function, batches, derive("rehearsal again", self._seed))
            if sentence is not None and all(a.near(b) for a, b in zip(first, again)):
                raise self._code.mistake(ConfigError(sentence))


def _whole(fetch: Callable[[int], Batches]) -> Any:
    return fetch(0)[0][1]


def _finite(found: Sequence[Sums]) -> bool:
    return all(math.isfinite(s.loss) for s in found)


def _on_any(group: Group, here: bool) -> bool:
    """Return whether `here` is true on any worker that shares the model. All of them call this at one time."""
    return any(group.gather_in_mesh(int(here)))
