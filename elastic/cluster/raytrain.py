"""The only module that touches Ray Train's private parts: small subclasses that change who decides.

Pinned to ray 2.60; `tests/test_ray_contract.py` has one test for each private name used here.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray._private import services
from ray.train import BackendConfig
from ray.train.backend import Backend
from ray.train.v2._internal.callbacks import AcceleratorSetupCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.util import ObjectRefWrapper
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from elastic.cluster.capacity import group_size, worker_resources
from elastic.cluster.embedded import node_resources
from elastic.config import ScalingOptions
from elastic.errors import ElasticError, WorldBroken

TESTED_RAY = "2.60."
GROUP_VARIABLE = "ELASTIC_GROUP"
POLL_S = 0.2
_CONTROLLER_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it answers a drain with a whole-group restart
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}


def find_running_cluster() -> str | None:
    """The address of a cluster that `ray start` left running on this machine, if its GCS still answers."""
    found = services.find_gcs_addresses()
    return sorted(found)[0] if found else None


class _NoBackend(Backend):
    """Process groups are formed by the workers themselves, world after world."""

    share_cuda_visible_devices = True


class _NoBackendConfig(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _NoBackend


class StartPolicy(ScalingPolicy):
    """One decision when a group is to start: as many workers as there is room for, within the limits."""

    def __init__(self, scaling_config: ScalingConfig, scaling: ScalingOptions, accelerator: str):
        super().__init__(scaling_config)
        self._scaling = scaling
        self._unit = worker_resources(accelerator, scaling.cpus_per_worker)

    def _get_num_workers_for_resource_request(self) -> int:
        return self._scaling.max_workers

    def after_controller_start(self, train_run_context: Any) -> None:
        """No request to Ray's autoscaling coordinator: placement groups are the only way we ask for nodes."""

    async def before_controller_shutdown(self) -> None:
        """Nothing was requested."""

    def before_controller_abort(self) -> None:
        """Nothing was requested."""

    def make_decision_for_non_running_worker_group(self) -> Any:
        size = group_size(
            self._unit, node_resources(), least=self._scaling.min_workers, most=self._scaling.max_workers,
            workers_per_node=self._scaling.workers_per_node,
        )  # fmt: skip
        if size is None:
            size = self._scaling.min_workers  # the placement group stays pending, and asks the autoscaler for nodes
        return ResizeDecision(num_workers=size, resources_per_worker=dict(self._unit))

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        return NoopDecision()


class RestartPolicy(FailurePolicy):
    """Lost workers: restart the group, `max_failures` times. The job's own errors end the run."""

    def __init__(self, failure_config: FailureConfig, max_failures: int):
        super().__init__(failure_config)
        self._left = max_failures

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if isinstance(training_failed_error, WorkerGroupError):
            causes = [_cause(e) for e in training_failed_error.worker_failures.values()]
            if any(isinstance(c, ElasticError) and not isinstance(c, WorldBroken) for c in causes):
                return FailureDecision.RAISE
        elif not isinstance(training_failed_error, ControllerError):
            return FailureDecision.RAISE
        self._left -= 1
        return FailureDecision.RETRY if self._left >= 0 else FailureDecision.RAISE


def _cause(error: Any) -> Any:
    return getattr(error, "_base_exc", None) or getattr(error, "cause", None) or error


def _set_variable(name: str, value: str) -> None:
    os.environ[name] = value


class Group(WorkerGroup):
    """Tells its workers which group they are of, so that a replaced one is fenced."""

    _numbers = itertools.count(1)

    def _get_worker_runtime_env(self, custom_runtime_env: Any) -> Any:  # type: ignore[override]
        return {}  # a runtime environment would keep Ray from using the worker processes that it started ahead

    def _create_workers(self, *arguments: Any, **keywords: Any) -> Any:
        workers = super()._create_workers(*arguments, **keywords)
        number = str(next(Group._numbers))
        told: list[Any] = [w.execute_async(_set_variable, GROUP_VARIABLE, number) for w in workers]
        ray.get(told)
        return workers


class Controller(TrainController):
    """Ray Train's controller with our worker group, switches set before it reads them."""

    worker_group_cls = Group

    def __init__(self, *arguments: Any, **keywords: Any):
        os.environ.update(_CONTROLLER_ENVIRONMENT)
        logging.getLogger("ray.train").setLevel(logging.WARNING)  # what matters is an event of the run
        super().__init__(*arguments, **keywords)


class RayTrainer(DataParallelTrainer):
    """Runs a training function on Ray Train's worker actors under our policies.

    Args:
        storage_path: a folder of this machine that Ray Train may write markers to; no training state goes there.
        embedded: the cluster ends with this process, so nothing needs to clean up after it (and the cleaner would
            need a dashboard).
    """

    def __init__(
        self, train_function: Callable[[], Any], *, name: str, storage_path: str, scaling: ScalingOptions,
        accelerator: str, max_failures: int, embedded: bool,
    ):  # fmt: skip
        unit = worker_resources(accelerator, scaling.cpus_per_worker)
        scaling_config: Any = ScalingConfig(
            num_workers=scaling.max_workers, use_gpu=accelerator == "gpu", resources_per_worker=unit,
            placement_strategy="SPREAD" if scaling.workers_per_node else "PACK",
        )  # fmt: skip
        failure_config = FailureConfig(max_failures=max_failures)
        run_config: Any = RunConfig(name=name, storage_path=storage_path, failure_config=failure_config)
        super().__init__(
            train_function, backend_config=_NoBackendConfig(), scaling_config=scaling_config, run_config=run_config
        )
        self._policies = (
            StartPolicy(scaling_config, scaling, accelerator), RestartPolicy(failure_config, max_failures)
        )  # fmt: skip
        self._accelerators = AcceleratorSetupCallback(self.backend_config, scaling_config)
        self._embedded = embedded
        self._controller: Any = None
        self._started = threading.Event()

    def _create_default_callbacks(self) -> list[Any]:
        return [self._accelerators] if self._embedded else [self._accelerators, PlacementGroupCleanerCallback()]

    def run(self) -> None:
        """Run to the end of the group.

        Raises:
            ray.train.TrainingFailedError: a worker failed for good.
        """
        scaling_policy, failure_policy = self._policies
        result = self._initialize_and_run_controller(
            train_fn_ref=ObjectRefWrapper(self._get_train_func()), scaling_policy=scaling_policy,
            failure_policy=failure_policy, train_run_context=self.train_run_context,
            callbacks=self._create_default_callbacks(), validation_config=None,
        )  # fmt: skip
        if result.error:
            raise result.error

    def _initialize_and_run_controller(self, **controller_arguments: Any) -> Any:
        node_id = ray.get_runtime_context().get_node_id()
        actor_class = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": node_id})(Controller)
        self._controller = actor_class.remote(**controller_arguments)
        self._started.set()
        ray.get(self._controller.run.remote())
        return ray.get(self._controller.get_result.remote())

    def abort(self, timeout_s: float) -> None:
        """End the controller and all workers at once, from another thread."""
        if not self._started.wait(timeout_s):
            return
        try:
            ray.get(self._controller.abort.remote(), timeout=timeout_s)
        except ray.exceptions.RayActorError:
            return  # that is how an aborted controller answers
        except ray.exceptions.GetTimeoutError:
            ray.kill(self._controller)
