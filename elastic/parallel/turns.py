"""Phases that take turns: whose parameters learn in a step, whose optimizer steps, and what computes the gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import nn

from elastic.errors import ConfigError
from elastic.parallel.optimizers import Together
from elastic.parallel.records import Metrics
from elastic.phases import Cycle


class _Replica(Protocol):
    metrics: Metrics


R = TypeVar("R", bound=_Replica)


def part_of(optimizer: torch.optim.Optimizer, phase: str) -> torch.optim.Optimizer:
    """The optimizer that steps in a phase; all of them together if there are no phases."""
    return optimizer.parts[phase] if phase and isinstance(optimizer, Together) else optimizer


@contextmanager
def learning(optimizer: torch.optim.Optimizer, phase: str) -> Iterator[None]:
    """Inside, only the parameters of this phase get gradients; backward passes go through the others as before."""
    mine = part_of(optimizer, phase)
    parts = optimizer.parts.values() if isinstance(optimizer, Together) and mine is not optimizer else ()
    others = [
        p
        for part in parts
        if part is not mine
        for group in part.param_groups
        for p in group["params"]
        if p.requires_grad
    ]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


def check_optimizers(phases: Sequence[str], found: Any, model: nn.Module) -> None:
    """Refuse optimizers that do not train each parameter in one phase.

    Args:
        phases: of the job, in their order.
        found: what `optimizer()` returned.

    Raises:
        ConfigError: with the phase or the parameter, and what to do.
    """
    known = dict.fromkeys(phases)
    if not known:
        return
    wanted = "{" + ", ".join(f"{name!r}: ..." for name in known) + "}"
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"optimizer() returned a {type(found).__name__}, but the job has the phases {', '.join(known)}; return a "
            f"dict with an optimizer for each: {wanted}"
        )
    for name in found:
        if name not in known:
            raise ConfigError(
                f"optimizer() returned one for {name!r}, but the phases are {', '.join(known)}; return {wanted}"
            )
    for name in known:
        if name not in found:
            raise ConfigError(f"optimizer() returned none for the phase {name!r}; return {wanted}")
    owners: dict[int, list[str]] = {}
    for phase, one in found.items():
        for group in getattr(one, "param_groups", ()):
            for p in group["params"]:
                owners.setdefault(id(p), []).append(phase)
    for name, p in model.named_parameters():
        mine = owners.get(id(p), [])
        if not mine and p.requires_grad:
            raise ConfigError(
                f"parameter {name} is in no optimizer that optimizer() returned, so no phase trains it; give it to "
                "one, or freeze it in model() with requires_grad_(False)"
            )
        if len(mine) > 1:
            raise ConfigError(
                f"parameter {name} is in the optimizers of {' and '.join(mine)}; give it to one: the other phase still "
                "uses it, and sends gradients through it"
            )


class Turns(Generic[R]):
    """What computes the gradients of each phase in one world.

    A whole model has one replica for each phase, which knows its parameters only. The parts of a sharded model are
    gathered by one replica for all phases.

    Args:
        make: wraps the model. Parameters that get no gradients then are none of the replica's.
        shared: one replica is for all phases.
    """

    def __init__(self, cycle: Cycle, optimizer: torch.optim.Optimizer, make: Callable[[], R], *, shared: bool):
        self._cycle, self._optimizer = cycle, optimizer
        self._metrics = {phase: Metrics() for phase in cycle.order()}
        self.all: dict[str, R] = {}
        for phase in cycle.order():
            if shared and self.all:
                self.all[phase] = self.first
                continue
            with learning(optimizer, "" if shared else phase):
                self.all[phase] = make()

    @property
    def first(self) -> R:
        """One of them, for what is done for the model."""
        return next(iter(self.all.values()))

    @contextmanager
    def of(self, step: int) -> Iterator[R]:
        """The replica of a step (from 0). Inside, only the parameters of its phase get gradients."""
        phase = self._cycle.phase(step)
        replica = self.all[phase]
        replica.metrics = self._metrics[phase]
        with learning(self._optimizer, phase):
            yield replica

    def optimizer(self, step: int) -> torch.optim.Optimizer:
        """The optimizer of a step (from 0)."""
        return part_of(self._optimizer, self._cycle.phase(step))
