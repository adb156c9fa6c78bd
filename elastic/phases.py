"""Phases of a job whose updates take turns (GANs, actor-critic): which phase a step is, and which batch it takes.

A phase is a step, with one fence, one row and one update, so that no pair of updates can be half applied. Phases come
in a cycle, in the order of `Job.phases`. All phases of a cycle take the same batch; one that comes again in its cycle
takes the next batch. So each phase sees each batch once, in the order of the data.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from elastic.errors import ConfigError


@dataclass(frozen=True)
class Cycle:
    """The phases of a run. Without any, each step takes the next batch."""

    names: tuple[str, ...] = ()

    @cached_property
    def _taken(self) -> tuple[int, ...]:
        """Which of a cycle's batches each of its steps takes."""
        found, batch, done = list[int](), 0, set[str]()
        for name in self.names:
            if name in done:
                batch, done = batch + 1, set()
            done.add(name)
            found.append(batch)
        return tuple(found) or (0,)

    @cached_property
    def steps_each(self) -> int:
        """Steps of one cycle."""
        return len(self._taken)

    @property
    def batches_each(self) -> int:
        """Batches that one cycle takes."""
        return self._taken[-1] + 1

    def phase(self, step: int) -> str:
        """The phase of a step (from 0); empty if there are none."""
        return self.names[step % len(self.names)] if self.names else ""

    def batch(self, step: int) -> int:
        """The number of the batch (from 0) that a step (from 0) takes."""
        cycle, place = divmod(step, self.steps_each)
        return cycle * self.batches_each + self._taken[place]

    def steps(self, batches: int) -> int:
        """The steps in which so many batches go through all of their phases."""
        cycles, rest = divmod(batches, self.batches_each)
        return cycles * self.steps_each + sum(taken < rest for taken in self._taken)

    def order(self) -> tuple[str, ...]:
        """Each phase once; one without a name if there are none."""
        return tuple(dict.fromkeys(self.names)) or ("",)


NO_PHASES = Cycle()


def loss_name(phase: str) -> str:
    """The name of the job's method that returns the loss of a phase."""
    return f"loss_{phase}" if phase else "loss"


def check_phases(job: Any, base: type) -> None:
    """Refuse phases of a job that cannot be trained.

    Args:
        base: the class in which `loss` and `evaluate` are not the job's own.

    Raises:
        ConfigError: with the phase, and what to do.
    """
    kind, names = type(job).__name__, job.phases
    if not isinstance(names, (tuple, list)) or not all(isinstance(n, str) and n.isidentifier() for n in names):
        raise ConfigError(
            f"{kind}.phases is {names!r}; give a tuple of names in the order in which they take turns, such as "
            '("discriminator", "generator")'
        )
    if not names:
        return
    known = dict.fromkeys(names)
    for name in known:
        if not callable(getattr(job, loss_name(name), None)):
            raise ConfigError(
                f"{kind}.phases names {name!r}, but {kind} has no method {loss_name(name)}(model, batch); define it, "
                "or leave that phase out"
            )
    for name in dir(type(job)):
        if name.startswith("loss_") and name.removeprefix("loss_") not in known and _takes_batches(type(job), name):
            raise ConfigError(
                f"{kind} has a method {name}(model, batch), but {kind}.phases names only {', '.join(known)}; add "
                f"{name.removeprefix('loss_')!r}, or give the method another name"
            )
    if type(job).loss is not base.loss:  # type: ignore[attr-defined]
        raise ConfigError(
            f"{kind} has phases, so its losses are {' and '.join(map(loss_name, known))}, and nothing calls loss(); "
            "leave it out"
        )


def _takes_batches(kind: type, name: str) -> bool:
    """Whether a method takes what a loss takes, under those names."""
    method = inspect.getattr_static(kind, name)
    return inspect.isfunction(method) and list(inspect.signature(method).parameters)[1:] == ["model", "batch"]


def check_evaluated(job: Any, base: type, held_out: Any) -> None:
    """Refuse held-out data of a job with phases that does not say what to compute of them.

    Raises:
        ConfigError: it has no `evaluate`.
    """
    if job.phases and held_out and type(job).evaluate is base.evaluate:  # type: ignore[attr-defined]
        kind = type(job).__name__
        raise ConfigError(
            f"{kind} has phases and eval_data(), but no evaluate(model, batch), which is loss() where nothing else is "
            "said; define it, or return None from eval_data()"
        )


def check_same_phases(job: Any, before: list[str], run: str | None) -> None:
    """Refuse a job whose phases are not those with which its run was started: its steps are others.

    Raises:
        ConfigError: with both.
    """
    if list(job.phases) != before:
        shown = [", ".join(names) or "none" for names in (job.phases, before)]
        raise ConfigError(
            f"the phases of {type(job).__name__} are {shown[0]}, but run {run} was started with {shown[1]}, so its "
            "steps are others; give these, or another --run.name"
        )


def check_strategy(job: Any, **cut: int) -> None:
    """Refuse phases of a model whose layers are cut over workers.

    Args:
        cut: over how many, by the option of `--parallel`.

    Raises:
        ConfigError: with the option.
    """
    for option, workers in cut.items():
        if job.phases and workers > 1:
            raise ConfigError(
                f"--parallel.{option} is {workers}, but the updates of {type(job).__name__} take turns, which goes "
                "with ddp, fsdp and hsdp alone; leave it out"
            )
