"""Ray Train's controller and trainer with our worker group: they start it, and restart nothing while a worker lives.

Ray Train answers a death or a resize by killing all workers; the group keeps those that live.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.train import BackendConfig
from ray.train.backend import Backend
from ray.util.placement_group import remove_placement_group

from elastic.cluster.group import POLL_S, Group
from elastic.cluster.placement_groups import GroupPlan
from elastic.compat.ray import is_ready
from elastic.compat.ray_train import (
    BaseController,
    BaseScalingPolicy,
    BaseTrainer,
    ControllerError,
    FailureConfig,
    FailureDecision,
    FailurePolicy,
    NoopDecision,
    ResizeDecision,
    RunConfig,
    ScalingConfig,
)

MAX_RESTARTS = 3
_CONTROLLER_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it answers a drain with a whole-group restart
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}


def placement_group_name(run: str) -> str:
    """Prefix of the names of a run's placement groups."""
    return f"elastic/{run}/"


def remove_placement_groups(prefix: str) -> int:
    """Remove what a controller that died left behind; returns how many."""
    left = [t for t in ray.util.placement_group_table().values() if t["name"].startswith(prefix)]
    left = [t for t in left if t["state"] != "REMOVED"]
    for entry in left:
        with contextlib.suppress(ValueError):  # it has just gone by itself
            remove_placement_group(ray.util.get_placement_group(entry["name"]))
    return len(left)


class _NoBackend(Backend):
    """Process groups are formed by the workers themselves, world after world."""


class _NoBackendConfig(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _NoBackend


class StartPolicy(BaseScalingPolicy):
    """One decision at the start, then none: the group itself keeps asking for what is missing."""

    def __init__(self, scaling_config: ScalingConfig, plan: GroupPlan):
        super().__init__(scaling_config)
        self._plan = plan

    def workers_to_start(self) -> int:
        return self._plan.want(self._plan.max_workers)

    def make_decision_for_non_running_worker_group(self) -> Any:
        return ResizeDecision(num_workers=self.workers_to_start(), resources_per_worker=dict(self._plan.unit))

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        return NoopDecision()


class FallbackPolicy(FailurePolicy):
    """A worker's error that came up to here ends the run; one of the controller's own restarts the whole group."""

    def __init__(self, failure_config: FailureConfig):
        super().__init__(failure_config)
        self._left = MAX_RESTARTS

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if not isinstance(training_failed_error, ControllerError):
            return FailureDecision.RAISE
        self._left -= 1
        return FailureDecision.RETRY if self._left >= 0 else FailureDecision.RAISE


class Controller(BaseController):
    """Ray Train's controller with our worker group, switches set before it reads them."""

    worker_group_cls = Group

    def __init__(self, *arguments: Any, **keywords: Any):
        os.environ.update(_CONTROLLER_ENVIRONMENT)
        Group.restarts = itertools.count()  # this process may have had a controller before, of another run
        logging.getLogger("ray.train").setLevel(logging.WARNING)  # what matters is an event of the run
        super().__init__(*arguments, **keywords)


class _Here:
    """A controller in this process. Its own `abort` would end the process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._began = threading.Event()

    def run(self, arguments: dict[str, Any]) -> Any:
        """Run to the end of the group; returns its result.

        Raises:
            RuntimeError: it was aborted.
        """
        controller = Controller(**arguments)
        self._task = self._loop.create_task(controller.run())
        self._began.set()
        try:
            self._loop.run_until_complete(self._task)
            return controller.get_result()
        except asyncio.CancelledError:
            raise RuntimeError("the controller was aborted") from None
        finally:
            controller.abort_group()
            self._loop.close()

    def abort(self, timeout_s: float) -> None:
        """End it at its next turn, from another thread, which then waits for the one that runs it."""
        if not self._began.wait(timeout_s) or self._task is None:
            return
        with contextlib.suppress(RuntimeError):  # it has just ended, and its loop with it
            self._loop.call_soon_threadsafe(self._task.cancel)


class RayTrainer(BaseTrainer):
    """Runs a training function on Ray Train's worker actors under our policies.

    Args:
        storage_path: a folder of this machine that Ray Train may write markers to; no training state goes there.
        plan: the workers to have.
        here: the controller is no actor of its own: this process is one, which has many runs one after another.
    """

    def __init__(
        self,
        train_function: Callable[[dict[str, Any]], Any],
        *,
        name: str,
        storage_path: str,
        plan: GroupPlan,
        accelerator: str,
        here: bool = False,
    ):
        scaling_config: Any = ScalingConfig(
            num_workers=plan.want(plan.max_workers), use_gpu=accelerator == "gpu", resources_per_worker=plan.unit
        )
        run_config: Any = RunConfig(name=name, storage_path=storage_path)
        super().__init__(
            train_function,
            train_loop_config={"group": plan},
            backend_config=_NoBackendConfig(),
            scaling_config=scaling_config,
            run_config=run_config,
        )
        self._policies = (StartPolicy(scaling_config, plan), FallbackPolicy(FailureConfig()))
        self._here: _Here | None = _Here() if here else None
        self._controller: Any = None
        self._ping: Any = None
        self._answered = False
        self._started = threading.Event()

    def run(self) -> None:
        """Run to the end of the group.

        Raises:
            ray.train.TrainingFailedError: a worker failed for good.
        """
        result = self._run_controller(self.controller_arguments(*self._policies))
        if result.error:
            raise result.error

    def _run_controller(self, arguments: dict[str, Any]) -> Any:
        if self._here is not None:
            return self._here.run(arguments)
        node_id = ray.get_runtime_context().get_node_id()
        actor_class = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": node_id})(Controller)
        self._controller = actor_class.remote(**arguments)
        self._started.set()
        ray.get(self._controller.run.remote())
        return ray.get(self._controller.get_result.remote())

    def answers(self, timeout_s: float) -> bool:
        """Whether the controller answers within that time: False where it once did, and stands still now."""
        if self._here is not None or not self._started.is_set():
            return True
        self._ping = self._ping or is_ready(self._controller)
        ready, _ = ray.wait([self._ping], timeout=timeout_s)
        if ready:  # or it is dead, which `run` sees
            self._ping, self._answered = None, True
        return bool(ready) or not self._answered

    def kill(self) -> None:
        """End a controller that stands still, and the workers with it."""
        ray.kill(self._controller)

    def abort(self, timeout_s: float) -> None:
        """End the controller and all workers at once, from another thread."""
        if self._here is not None:
            self._here.abort(timeout_s)
            return
        if not self._started.wait(timeout_s):
            return
        try:
            ray.get(self._controller.abort.remote(), timeout=timeout_s)
        except ray.exceptions.RayActorError:
            return  # that is how an aborted controller answers
        except ray.exceptions.GetTimeoutError:
            ray.kill(self._controller)
