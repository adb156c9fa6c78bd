"""Schedulers that the job's `scheduler()` returns: followed by the number of the step, or asked after evaluations."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from elastic.compat.torch import mark_stepped
from elastic.errors import ConfigError
from elastic.parallel.optimizers import parts_of

_SET = ("lr", "momentum", "betas")  # options of groups that schedulers set


def made_by(job: Any, optimizer: torch.optim.Optimizer) -> list[Any]:
    """The schedulers that the job makes for this optimizer, or for those that it is made of; often none.

    Raises:
        ConfigError: it returned something else.
    """
    parts = parts_of(optimizer)
    own = list(optimizer.parts.items()) if hasattr(optimizer, "parts") else []
    given: Any = optimizer if not own else dict(own)
    if own and all(name == str(i) for i, (name, _) in enumerate(own)):
        given = [part for _, part in own]
    found = type(job).scheduler(job, given)  # an attribute of that name is the job's own business
    many = list(found.values()) if isinstance(found, Mapping) else found
    many = [] if many is None else list(many) if isinstance(many, (list, tuple)) else [many]
    for one in many:
        if not isinstance(one, (LRScheduler, ReduceLROnPlateau)):
            raise ConfigError(
                f"scheduler() returned a {type(one).__name__}; return a scheduler of torch.optim.lr_scheduler, such as "
                "LambdaLR(optimizer, factor), or several in a list"
            )
        if not any(one.optimizer is part for part in parts):
            raise ConfigError(
                f"scheduler() returned a {type(one).__name__} of another optimizer; make it of the one that it is given"
            )
    if len(many) > 1 and any(isinstance(one, ReduceLROnPlateau) for one in many):
        raise ConfigError(
            "scheduler() returned a ReduceLROnPlateau beside others, which would set the same rates; return it alone"
        )
    return many


class Followed:
    """Learning rates as a function of the step: those after so many calls of `step()`, however that step was come to.

    Where a state of an earlier step is put back, or another worker's, the walk begins anew: 10 to 20 us a step.
    """

    def __init__(self, schedulers: Sequence[LRScheduler], optimizer: torch.optim.Optimizer):
        self._schedulers, self._optimizer = list(schedulers), optimizer
        self._began = [copy.deepcopy(one.state_dict()) for one in self._schedulers]
        self._options = [{key: group[key] for key in _SET if key in group} for group in optimizer.param_groups]
        self._at: int | None = 0
        for part in parts_of(optimizer):
            mark_stepped(part)

    def forget(self) -> None:
        """The groups may be of any step."""
        self._at = None

    def go_to(self, step: int) -> None:
        """Set the groups' rates (and what else schedulers set) to those of this step, from 0."""
        if self._at is None or self._at > step:
            for group, options in zip(self._optimizer.param_groups, self._options):
                group.update(options)
            for one, began in zip(self._schedulers, self._began):
                one.load_state_dict(copy.deepcopy(began))
            self._at = 0
        while self._at < step:
            for one in self._schedulers:
                one.step()
            self._at += 1


class Plateau:
    """A ReduceLROnPlateau that is asked after evaluations. Its state is part of the training state.

    What was decided last can be decided again: where a world broke, some of its members had decided, others had not.
    """

    def __init__(self, scheduler: ReduceLROnPlateau):
        self._scheduler = scheduler
        self._step = -1
        self._before = self._now()

    def _now(self) -> dict[str, Any]:
        rates = [group["lr"] for group in self._scheduler.optimizer.param_groups]
        return {"scheduler": copy.deepcopy(self._scheduler.state_dict()), "rates": rates}

    def _go_back(self, to: Mapping[str, Any]) -> None:
        self._scheduler.load_state_dict(copy.deepcopy(dict(to["scheduler"])))
        for group, rate in zip(self._scheduler.optimizer.param_groups, to["rates"]):
            group["lr"] = rate

    def decide(self, step: int, value: float) -> str:
        """Hear of the evaluation after `step`; returns what changed, for people."""
        if step == self._step:
            self._go_back(self._before)
        self._step, self._before = step, self._now()
        self._scheduler.step(value)
        was, now = self._before["rates"], self._now()["rates"]
        return "" if was == now else f"the learning rate is {now[0]:g} from here on, it was {was[0]:g}"

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state."""
        return {"step": self._step, "before": copy.deepcopy(self._before), "now": self._now()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._step, self._before = state["step"], copy.deepcopy(dict(state["before"]))
        self._go_back(state["now"])


class Patience:
    """Whether a figure of evaluations has become no better for too long. Decides again as `Plateau` does.

    Args:
        most: evaluations without a better figure after which training ends; None for never.
        least: how much better counts.
        mode: min or max.
    """

    def __init__(self, most: int | None, least: float = 0.0, mode: str = "min"):
        self._most, self._least, self._sign = most, least, 1.0 if mode == "min" else -1.0
        self._step = -1
        self._best: float | None = None
        self._bad = 0
        self._before: tuple[float | None, int] = (None, 0)

    @property
    def over(self) -> bool:
        """Whether training ends."""
        return self._most is not None and self._bad >= self._most

    def decide(self, step: int, value: float) -> str:
        """Hear of the evaluation after `step`; returns why training ends, if it does."""
        if step == self._step:
            self._best, self._bad = self._before
        self._step, self._before = step, (self._best, self._bad)
        better = self._best is None or self._sign * (self._best - value) > self._least
        self._best, self._bad = (value, 0) if better else (self._best, self._bad + 1)
        return f"no better than {self._best:g} in {self._bad} evaluations" if self.over else ""

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state."""
        return {"step": self._step, "best": self._best, "bad": self._bad, "before": list(self._before)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._step, self._best, self._bad = state["step"], state["best"], state["bad"]
        self._before = (state["before"][0], state["before"][1])
