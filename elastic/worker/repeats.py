"""A trial of loss() in training mode, twice on one batch: what a pass leaves to the next one.

A step has several passes, and how many a worker runs depends on the number of workers. So a loss must not depend on the
passes before it; only buffers may carry something on, and they begin each pass with the values of the step's beginning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from elastic.compat.torch import counting_data
from elastic.errors import ConfigError
from elastic.job import Job
from elastic.parallel.buffers import StepBuffers, running_statistics
from elastic.parallel.wrapping import fsdp_modules, reshard
from elastic.seeds import derive, seed_all
from elastic.worker.belongings import Attributes, digest, globals_named, globals_of, leaves
from elastic.worker.traces import GatheredWrites, without_trace
from elastic.worker.trials import Agreed, Batches, in_memory, listed, own
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
        touched: names of those whose version counters moved.
        moved: by how much the last pass moved each buffer, by name, as float64 or int64.
    """

    losses: list[float]
    changed: list[str]
    written: list[str]
    again: list[str]
    lost: list[str]
    touched: set[str]
    moved: dict[str, torch.Tensor]

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
        #: Names of parameters that passes write to without changing more the second time.
        self.written: set[str] = set()
        #: What passes leave in a buffer goes by how many samples each has.
        self.by_size = False

    def check(self, model: nn.Module, batch: Any, halves: Batches, agreed: Agreed) -> bool:
        """Refuse a loss that depends on earlier passes. All workers that share the model call this at one time.

        Args:
            batch: of the first microbatches.
            halves: number of samples and batch of both halves; empty if it has only one sample.

        Returns:
            Whether the loss depends on chance; in `fast`, by more than its last digits.

        Raises:
            UserCodeError: the mistake, as a ConfigError.
        """
        first = self._passes_in_training(model, batch, batch)
        self._refuse_writes(first, agreed)
        # buffers and parameters that the first batch initialises, and further batches leave alone
        if agreed(bool(first.written)) and halves:
            self._refuse_writes(self._passes_in_training(model, batch, halves[0][1]), agreed)
        self.written = first.touched | set(first.written)
        self._try_moves(model, first, batch, halves, agreed)
        apart = first.apart > _SAME * abs(first.losses[0]) if first.losses else False
        if not agreed(apart or (self._exact and first.apart > 0)):
            return False
        again = self._passes_in_training(model, batch, batch)
        chance = max((abs(a - b) for a, b in zip(first.losses, again.losses)), default=math.inf)
        if apart and chance <= 0.01 * first.apart:
            kept = listed(first.changed) or "an object"
            raise self._code.mistake(
                ConfigError(
                    f"{self._code.loss_called} returned {first.losses[0]:.6g} for a batch, and {first.losses[1]:.6g} "
                    "for the same batch and the same random numbers right after that: it depends on what the pass "
                    f"before left in {kept}; a step has several passes, which workers share, so change it in "
                    "after_step(), or make it a buffer of the model"
                )
            )
        return agreed(chance > 0)

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
                raise self._code.mistake(
                    ConfigError(f"{self._code.loss_called} changes parameters of the model ({which}) {why}")
                )

    def _try_moves(self, model: nn.Module, whole: _Twice, batch: Any, halves: Batches, agreed: Agreed) -> None:
        """Refuse buffers that count samples or keep something of each; find those that go by the samples of a pass.

        A step has several passes, all begin with the buffers of the step's beginning, and the mean of their moves is
        left. The move in a batch is the mean of those in its halves for running means, and for few other things: with
        others, what is left goes by how many samples a pass has. It is their sum for sums over samples. If it still is
        when the buffers are higher by 1, nothing decays, and the mean is 1/V of what one process has.
        """
        means = running_statistics(model)
        moved = {name: m for name, m in whole.moved.items() if name not in means}
        whole_numbers = [name for name, m in moved.items() if not m.is_floating_point() and int(m.abs().max()) > 1]
        others = [name for name, m in moved.items() if m.is_floating_point()]
        if not halves or not agreed(bool(whole_numbers or others)):
            return
        of_halves = [self._passes_in_training(model, half).moved for _, half in halves]
        counting = [n for n in whole_numbers if not torch.equal(moved[n], _move(of_halves[0], n, moved[n]))]
        sizes = [samples for samples, _ in halves]
        parts = {n: [_move(h, n, moved[n]) for h in of_halves] for n in others}
        self.by_size = agreed(any(not _is_near(_mean(parts[n], sizes), moved[n], 1e-3) for n in others))
        sums = [n for n in others if _is_sum(moved[n], parts[n], sizes)]
        if agreed(bool(sums)):
            higher = [
                self._passes_in_training(model, b, higher=sums).moved for b in (batch, *(half for _, half in halves))
            ]
            for n in sums:
                whole_move, *of_parts = (_move(h, n, moved[n]) for h in higher)
                counting += [n] if _is_sum(whole_move, of_parts, sizes) else []
        if agreed(bool(counting)):
            by, left = "how many samples it has", "that of one pass"
            if set(counting) & set(others):
                by, left = "a sum over its samples", "the mean over passes"
            raise self._code.mistake(
                ConfigError(
                    f"a pass moves the buffer {listed(counting)} by {by}, but a step has several passes, which all "
                    f"begin with the buffers of the step's beginning, so {left} would be left; count the samples of a "
                    "step in after_step(), and keep queues and banks of samples by steps"
                )
            )

    def _passes_in_training(self, model: nn.Module, *batches: Any, higher: Sequence[str] = ()) -> _Twice:
        """Run passes, one after the other, in training mode; no losses if one of them fails, which the first step
        reports.

        Parameters are moved first, as by an update: what follows them from pass to pass moves then too.

        Args:
            higher: names of buffers that are higher by 1.
        """
        losses: list[float] = []
        written, again, lost = list[str](), list[str](), GatheredWrites(model)
        moved: dict[str, torch.Tensor] = {}
        with without_trace(model, self._job, *globals_of(self._job), training=True) as parameters:
            parameters.move()
            parameters.begin()
            before = self._held(model)
            try:
                for batch in batches:
                    with (
                        StepBuffers(model, exact=True).unmoved(),
                        torch.set_grad_enabled(not fsdp_modules(model)),
                        counting_data(),
                    ):
                        for name in higher:
                            model.get_buffer(name).detach().add_(1)
                        begun = _copies(model)
                        seed_all(derive("rehearsal", self._seed))
                        trial = in_memory(partial(self._code.try_loss, model, watching=lost.watching))
                        losses.append(float(trial(own(batch))[0].detach()))
                        now = _copies(model)
                        moved = {
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
                reshard(model)
            held, touched = self._held(model), parameters.touched()
        changed = sorted(name for name, was in before.items() if held.get(name, was) != was)
        changed = changed or sorted(held.keys() - before.keys())  # such as an item of a list
        return _Twice(losses, changed, written, again, sorted(lost.names), touched, moved)

    def _held(self, model: nn.Module) -> dict[str, str]:
        found = leaves({"job": Attributes(self._job), "model": model, **globals_named(self._job)}, (), None)
        return {name: digest(leaf) for name, leaf in found.items()}


def _copies(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of the buffers, with their present sizes, as float64 or int64."""
    named = [(name, b) for name, b in model.named_buffers() if b.numel() and not b.is_complex()]
    return {n: b.detach().to(torch.float64 if b.is_floating_point() else torch.int64, copy=True) for n, b in named}


def _move(moved: Mapping[str, torch.Tensor], name: str, like: torch.Tensor) -> torch.Tensor:
    return moved.get(name, torch.zeros_like(like))


def _mean(moves: Sequence[torch.Tensor], sizes: Sequence[int]) -> torch.Tensor:
    if any(move.shape != moves[0].shape for move in moves):
        return moves[0]
    return sum((n * move for n, move in zip(sizes, moves)), torch.zeros_like(moves[0], dtype=torch.float64)) / sum(
        sizes
    )


def _is_sum(whole: torch.Tensor, halves: Sequence[torch.Tensor], sizes: Sequence[int]) -> bool:
    """Whether the move in a batch is the sum of those in its halves, and not their mean."""
    if any(half.shape != whole.shape for half in halves):
        return False
    total = sum(halves, torch.zeros_like(whole))
    return _is_near(total, whole, 1e-3) and not _is_near(_mean(halves, sizes), whole, 1e-1)


def _is_near(one: torch.Tensor, other: torch.Tensor, most: float) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= most * other.abs().max())
