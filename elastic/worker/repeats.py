"""A trial of loss() in training mode, twice on one batch: what a pass leaves to the next one.

A step has several passes, and how many a worker runs depends on the number of workers. So a loss must not depend on the
passes before it; only buffers may carry something on, and they begin each pass with the values of the step's beginning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from elastic.errors import ConfigError
from elastic.job import Job
from elastic.parallel.buffers import StepBuffers
from elastic.parallel.wrapping import fsdp_modules
from elastic.seeds import derive, seed_all
from elastic.worker.belongings import Attributes, digest, leaves
from elastic.worker.traces import GatheredWrites, without_trace
from elastic.worker.trials import Agreed, in_memory, listed, own
from elastic.worker.user_code import UserCode, UserCodeError

_SAME = 1e-5  # of a loss: two computations of one value differ by no more
UNSEEDED = (
    "loss() returns another value each time for one batch, under one seed: it takes random numbers, or the time, from "
    "where Elastic does not seed; draw from random, numpy or torch, without generators of your own"
)


@dataclass(frozen=True)
class _Twice:
    """The results of two passes over one batch.

    Args:
        losses: of both passes; empty if they failed.
        changed: names of the objects of model and job that differ afterwards.
        written: names of the parameters that the first pass wrote to.
        again: names of those that the second pass wrote to as well.
        lost: names of those that a pass wrote to while they were gathered.
        counted: by how much the second pass moved each integer buffer, by name.
    """

    losses: list[float]
    changed: list[str]
    written: list[str]
    again: list[str]
    lost: list[str]
    counted: dict[str, torch.Tensor]

    @property
    def apart(self) -> float:
        """The distance between the two losses."""
        return abs(self.losses[1] - self.losses[0]) if self.losses else 0.0


class Repeats:
    """Runs loss() twice on one batch and compares the two passes.

    Args:
        seed: of the run.
        exact: the run is bitwise.
    """

    def __init__(self, job: Job, code: UserCode, seed: int, *, exact: bool):
        self._job, self._code, self._seed, self._exact = job, code, seed, exact

    def check(self, model: nn.Module, batch: Any, half: Any, agreed: Agreed) -> bool:
        """Refuse a loss that depends on earlier passes. All workers that share the model call this at one time.

        Args:
            batch: of the first microbatches.
            half: the batch of half of its samples; None if it has only one sample.

        Returns:
            Whether the bits of the loss depend on chance.

        Raises:
            UserCodeError: the mistake, as a ConfigError.
        """
        first = self._passes_in_training(model, batch, batch)
        self._refuse_writes(first, agreed)
        # buffers and parameters that the first batch initialises, and further batches leave alone
        if agreed(bool(first.written)) and half is not None:
            self._refuse_writes(self._passes_in_training(model, batch, half), agreed)
        counting = [name for name, moved in first.counted.items() if int(moved.abs().max()) > 1]
        if agreed(bool(counting)) and half is not None:
            self._refuse_counts(first, self._passes_in_training(model, half, half), agreed)
        apart = first.apart > _SAME * abs(first.losses[0]) if first.losses else False
        if not agreed(apart or (self._exact and first.apart > 0)):
            return False
        again = self._passes_in_training(model, batch, batch)
        chance = max((abs(a - b) for a, b in zip(first.losses, again.losses)), default=math.inf)
        if apart and chance <= 0.01 * first.apart:
            kept = listed(first.changed) or "an object"
            raise self._code.mistake(
                ConfigError(
                    f"loss() returned {first.losses[0]:.6g} for a batch, and {first.losses[1]:.6g} for the same batch "
                    f"and the same random numbers right after that: it depends on what the pass before left in {kept}; "
                    "a step has several passes, which workers share, so change it in after_step(), or make it a buffer"
                )
            )
        return agreed(self._exact and chance > 0)

    def _refuse_writes(self, found: _Twice, agreed: Agreed) -> None:
        """Refuse a loss that writes to parameters; in `fast` it may, if a second pass changes nothing more."""
        where = "a step has several passes, which workers share; change them in after_step()"
        for names, why in (
            (found.lost, "while they are gathered, and with --parallel.strategy fsdp and hsdp such changes are lost"),
            (found.again, f"again in each pass, but {where}"),
            (found.written if self._exact else [], f"but {where}, or use --run.exactness fast"),
        ):
            if agreed(bool(names)):
                which = listed(names) or "seen on another worker"
                raise self._code.mistake(ConfigError(f"loss() changes parameters of the model ({which}) {why}"))

    def _refuse_counts(self, whole: _Twice, half: _Twice, agreed: Agreed) -> None:
        """Refuse integer buffers that a pass moves by its number of samples.

        A step has several passes, and all begin with the buffers of the step's beginning, so the buffer would count one
        pass.
        """
        names = [
            name
            for name, moved in whole.counted.items()
            if half.losses and not torch.equal(moved, half.counted.get(name, torch.zeros_like(moved)))
        ]
        if agreed(bool(names)):
            raise self._code.mistake(
                ConfigError(
                    f"a pass moves the integer buffer {listed(names)} by how many samples it has, but a step has "
                    "several passes, which all begin with the buffers of the step's beginning, so it would be that of "
                    "one pass; count the samples of a step in after_step(), and keep queues of samples by steps"
                )
            )

    def _passes_in_training(self, model: nn.Module, *batches: Any) -> _Twice:
        """Run two passes, one after the other, in training mode; no losses if one of them fails, which the first step
        reports.

        Parameters are moved first, as by an update: what follows them from pass to pass moves then too.
        """
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
                        trial = in_memory(partial(self._code.try_loss, model, watching=lost.watching))
                        losses.append(float(trial(own(batch))[0].detach()))
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


def _integers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the integer buffers, with their present sizes."""
    named = model.named_buffers()
    return {
        n: b.detach().long().clone() for n, b in named if not b.is_floating_point() and not b.is_complex() and b.numel()
    }
