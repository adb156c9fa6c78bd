"""What sets the learning rates: Elastic's schedule, what the job's `scheduler()` returned, a torch scheduler that the
job keeps and steps itself, or nothing.

Elastic sets `lr = initial_lr * share` before each update. A torch scheduler that `optimizer()` makes, and that is an
attribute of the job, is followed instead: the job steps it in `after_step()`, once per step on every worker, so that
rates are a function of the step; its state is saved. If no schedule is requested, a rate that the job itself changes
becomes the new `initial_lr`. All other ways of setting rates would be overwritten silently, so they are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from elastic.compat.torch import has_scheduler
from elastic.config import OptimOptions
from elastic.errors import ConfigError
from elastic.job import Job
from elastic.parallel.optimizers import Together, parts_of
from elastic.worker.following import Followed, Plateau, made_by

INSTEAD = "let the job's schedule(step, total_steps) return the factor on initial_lr instead"
_CONTAINERS = (list, tuple, dict)


class Rates:
    """The learning rates of one optimizer.

    Raises:
        ConfigError: a torch scheduler that the job does not keep drives the optimizer.
    """

    def __init__(self, job: Job, optimizer: torch.optim.Optimizer, optim: OptimOptions | None = None):
        self._optimizer = optimizer
        optim = optim or OptimOptions()
        self._asked = _asked(job, optim)
        own = made_by(job, optimizer)
        #: Asked after evaluations, if the job returned one.
        self.plateau = Plateau(own[0]) if own and isinstance(own[0], ReduceLROnPlateau) else None
        self._walk = Followed(own, optimizer) if own and self.plateau is None else None
        self.schedulers: dict[str, Any] = {
            name: one for name, one in _schedulers(job, optimizer) if not any(one is mine for mine in own)
        }
        if own:
            twice = self._asked or next(iter(self.schedulers), "")
            if twice:
                raise ConfigError(f"the learning rate is set twice: by scheduler() and by {twice}; leave one out")
            if self.plateau is not None:
                self.schedulers["scheduler()"] = self.plateau
            else:
                self._asked = "scheduler()"
        self._set: list[float] | None = None
        if self.schedulers and self._asked:
            name, one = next(iter(self.schedulers.items()))
            raise ConfigError(
                f"the learning rate is set twice: by {name} ({type(one).__name__}) and by {self._asked}; leave one out"
            )
        if not self.schedulers and self._walk is None:
            self._check_unpatched()
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", float(group["lr"]))
        self.note()

    @property
    def followed(self) -> bool:
        """Whether a torch scheduler sets the rates."""
        return bool(self.schedulers)

    def note(self) -> None:
        """The rates are what they are to be; passes are to leave them so."""
        self._noted = [group["lr"] for group in self._optimizer.param_groups]

    def _check_unpatched(self) -> None:
        if any(map(has_scheduler, parts_of(self._optimizer))):
            raise ConfigError(
                "the optimizer has a scheduler of torch's that is no attribute of the job, so its state could not be "
                f"saved; make it in optimizer() and keep it as one (self.scheduler = ...), or {INSTEAD}"
            )

    def forget(self) -> None:
        """Another state was put in place."""
        self._set = None
        if self._walk is not None:
            self._walk.forget()
        self.note()

    def set(self, step: int, share: float, part: torch.optim.Optimizer | None = None) -> float:
        """Called before the update of `step` (from 0): set its rates; returns that of the first group.

        Args:
            share: of the full rates, by the schedule.
            part: whose first group is meant, of several optimizers.

        Raises:
            ConfigError: the job changed them in passes, which would be overwritten.
        """
        groups = self._optimizer.param_groups
        if self._walk is not None:
            self._walk.go_to(step)
            self._set = [group["lr"] for group in groups]
        elif not self.followed:
            for i, (group, was) in enumerate(zip(groups, self._noted, strict=False)):
                if group["lr"] is not was and group["lr"] != was:
                    raise ConfigError(
                        f"the job set the learning rate of parameter group {i} to {float(group['lr']):g} in a pass, of "
                        f"which a step has several, on several workers; set it in after_step(), or {INSTEAD}"
                    )
            for group in groups:
                group.setdefault("initial_lr", float(group["lr"]))
                group["lr"] = group["initial_lr"] * share
            self._set = [group["lr"] for group in groups]
        self.note()
        return float((part or self._optimizer).param_groups[0]["lr"])

    def adopt_changes(self, step: int) -> None:
        """Called after an update and `after_step()`: adopt the job's own changes of the rates.

        Args:
            step: the next one, from 0.

        Raises:
            ConfigError: the change would be overwritten.
        """
        if isinstance(self._optimizer, Together):
            self._optimizer.check_groups()
        if self.followed or self._set is None:
            return
        if self._walk is None:
            self._check_unpatched()
        for group in self._optimizer.param_groups[len(self._set) :]:  # groups that were just added
            group.setdefault("initial_lr", float(group["lr"]))
        for i, (group, was) in enumerate(zip(self._optimizer.param_groups, self._set, strict=False)):
            now = group["lr"]
            if now is was or now == was:
                continue
            if self._asked:
                raise ConfigError(
                    f"the job set the learning rate of parameter group {i} to {float(now):g}, which {self._asked} "
                    f"would set to another at the next step; change group['initial_lr'], or {INSTEAD}"
                )
            group["initial_lr"] = float(now)
        if self._walk is not None:  # now, so that groups are alike on all workers, whoever has begun the next step
            self._walk.go_to(step)
        self.note()


def _asked(job: Job, optim: OptimOptions) -> str:
    """What sets rates by the step, as a text; empty if nothing was requested."""
    if type(job).schedule is not Job.schedule:
        return "the job's schedule()"
    if optim.schedule != "constant":
        return f"--optim.schedule {optim.schedule}"
    return f"--optim.warmup {optim.warmup}" if optim.warmup is not None else ""


def _schedulers(job: Job, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    """Schedulers of this optimizer among the job's attributes, by their place. Schedulers inside others are not
    listed."""
    waiting: list[tuple[str, Any]] = [(f"job.{k}", v) for k, v in getattr(job, "__dict__", {}).items()]
    seen: set[int] = set()
    while waiting:
        name, one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, (LRScheduler, ReduceLROnPlateau)):
            if any(one.optimizer is part for part in (optimizer, *parts_of(optimizer))):
                yield name, one
        elif isinstance(one, _CONTAINERS) and len(one) <= 100 and name.count("[") < 3:
            items = one.items() if isinstance(one, dict) else enumerate(one)
            waiting.extend((f"{name}[{k!r}]", v) for k, v in items)
