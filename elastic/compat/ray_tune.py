"""The internals of Ray Tune. Read in Ray 2.60; importing it takes seconds."""

from __future__ import annotations

from typing import Any

from ray.air.execution import FixedResourceManager
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial

__all__ = ["FixedResourceManager", "TuneController"]


def controller_of(handed: Any) -> TuneController:
    """The controller that Tune passes to a scheduler: it is wrapped, to warn of uses that Tune's schedulers avoid."""
    return getattr(handed, "_tune_controller", handed)


def step_again(controller: TuneController, trial: Trial) -> None:
    """Have a trial's actor take its next step, after a result for which the scheduler returned neither to continue nor
    to stop."""
    controller._schedule_trial_train(trial)


def make_actors_with(controller: TuneController, classes: Any) -> None:
    """Have actors made of the classes that `classes.get(trainable)` returns. Tune's own classes have a runtime
    environment, with which Ray cannot use processes that it started ahead, and use threads."""
    controller._class_cache = classes


def print_no_errors(controller: TuneController) -> None:
    """Keep Tune from printing errors of trials."""
    controller._print_trial_errors = False
