"""The inside of Ray Train, as base classes with public names. Read in Ray 2.60; importing it takes seconds.

Ray Train answers a death or a resize by killing all workers, and offers no way to do otherwise: so its worker group,
its controller and its policies are derived from.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train.v2._internal.execution.context import DistributedContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2._internal.util import ObjectRefWrapper
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError

__all__ = [
    "BaseController",
    "BaseGroup",
    "BaseScalingPolicy",
    "BaseTrainer",
    "ControllerError",
    "FailureConfig",
    "FailureDecision",
    "FailurePolicy",
    "NoopDecision",
    "ResizeDecision",
    "RunConfig",
    "ScalingConfig",
    "WorkerStatus",
]


class BaseGroup(WorkerGroup):
    """Ray Train's worker group without its workers: a subclass starts, polls and ends its own.

    What Ray Train's controller asks of a group is all here or in the subclass, so nothing of Ray's way is left.
    """

    def start(self) -> None:
        """Called once, when the controller makes the group."""
        raise NotImplementedError

    def poll(self, timeout: float | None) -> list[WorkerStatus]:
        """One turn: what each worker does; waits for at most `timeout` seconds."""
        raise NotImplementedError

    def _start(self) -> None:
        self.start()

    def poll_status(self, timeout: float | None = None) -> WorkerGroupPollStatus:
        self._latest_poll_status = WorkerGroupPollStatus(dict(enumerate(self.poll(timeout))), None)
        return self._latest_poll_status

    def get_workers(self) -> list[Any]:
        return []

    def get_worker_group_state(self) -> Any:
        return None

    @property
    def train_loop_config(self) -> Any:
        """What the trainer was given for the training function."""
        return self._train_run_context.train_loop_config

    @property
    def worker_class(self) -> type:
        """The class of the workers' actors, which run the training function in a thread."""
        return self._worker_cls

    def run_training(self, actor: Any, workers: int) -> Any:
        """Have a worker's actor run the training function, one of `workers`; a reference to its result, not waited for.

        The places that Ray Train gives to workers are all 0: who has which is agreed on in each world.
        """
        actor.init_train_context.remote(
            train_run_context=self._train_run_context,
            distributed_context=DistributedContext(
                world_rank=0, world_size=workers, local_rank=0, local_world_size=1, node_rank=0
            ),
            synchronization_actor=None,
            storage_context=self._storage_context,
            worker_callbacks=[],
            controller_actor=ray.get_runtime_context().current_actor,
        )
        return actor.run_train_fn.remote(self._worker_group_context.train_fn_ref)


class BaseController(TrainController):
    """Ray Train's controller: makes the group, polls it, and asks the policies. A subclass names the group's class in
    `worker_group_cls`."""

    def abort_group(self) -> None:
        """End the group, if there is one. The controller's own `abort` ends the process that it is in."""
        if self._worker_group is not None:
            self._worker_group.abort()


class BaseScalingPolicy(ScalingPolicy):
    """A scaling policy that asks nothing of Ray's autoscaling coordinator: placement groups are how nodes are asked
    for."""

    def workers_to_start(self) -> int:
        """How many workers a group that starts is to have."""
        raise NotImplementedError

    def _get_num_workers_for_resource_request(self) -> int:
        return self.workers_to_start()

    def after_controller_start(self, train_run_context: Any) -> None:
        """Nothing is requested."""

    async def before_controller_shutdown(self) -> None:
        """Nothing was requested."""

    def before_controller_abort(self) -> None:
        """Nothing was requested."""


class BaseTrainer(DataParallelTrainer):
    """Ray Train's trainer, as what a controller's arguments are taken from."""

    def controller_arguments(self, scaling_policy: ScalingPolicy, failure_policy: FailurePolicy) -> dict[str, Any]:
        """What a controller is to be made with, to run the training function under these policies."""
        return {
            "train_fn_ref": ObjectRefWrapper(self._get_train_func()),
            "scaling_policy": scaling_policy,
            "failure_policy": failure_policy,
            "train_run_context": self.train_run_context,
            "callbacks": [],
            "validation_config": None,
        }
