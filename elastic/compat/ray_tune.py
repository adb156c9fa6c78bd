"""The inside of Ray Tune. Read in Ray 2.60; importing it takes seconds."""

from __future__ import annotations

from typing import Any

from ray.air.execution import FixedResourceManager
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

__all__ = ["FixedResourceManager", "TuneController"]


def controller_of(handed: Any) -> TuneController:
    """The controller that a scheduler was handed: Tune wraps it, to warn of what goes beyond its own schedulers."""
    return getattr(handed, "_tune_controller", handed)


def step_again(controller: TuneController, trial: Trial) -> None:
    """Have a trial's actor take its next step, after a result to which the scheduler said neither to go on nor to
    stop."""
    controller._schedule_trial_train(trial)


def make_actors_with(controller: TuneController, classes: Any) -> None:
    """Have actors made of the classes that `classes.get(trainable)` returns, instead of those that Tune makes: with a
    runtime environment, which keeps Ray from using processes that were started ahead, and without threads."""
    controller._class_cache = classes


def print_no_errors(controller: TuneController) -> None:
    """Have Tune print no error of a trial."""
    controller._print_trial_errors = False
