"""Each private name of Ray that `elastic/cluster/raytrain.py` uses, so that a new Ray fails here first."""

from __future__ import annotations

import inspect

import pytest
import ray
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import WorkerGroupError

from elastic.cluster import raytrain


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_this_is_the_ray_that_was_tested() -> None:
    assert ray.__version__.startswith(raytrain.TESTED_RAY)


def test_the_controller_takes_its_worker_group_class_from_an_attribute() -> None:
    assert TrainController.worker_group_cls is WorkerGroup
    assert "self.worker_group_cls.create(" in inspect.getsource(TrainController)


def test_the_controller_is_made_with_these_arguments() -> None:
    assert parameters(TrainController.__init__)[1:] == [
        "train_fn_ref", "train_run_context", "scaling_policy", "failure_policy", "callbacks", "validation_config"
    ]  # fmt: skip


def test_the_controller_reads_its_switches_when_it_is_made() -> None:
    source = inspect.getsource(TrainController.__init__)
    assert "HEALTH_CHECK_INTERVAL_S_ENV_VAR" in source
    assert "ENABLE_PREEMPTION_WATCHER_ENV_VAR" in source


@pytest.mark.parametrize("name", ["run", "abort", "get_result"])
def test_the_controller_has_the_methods_that_we_call(name: str) -> None:
    assert inspect.iscoroutinefunction(getattr(TrainController, name)) or callable(getattr(TrainController, name))


def test_the_worker_group_creates_workers_in_one_place() -> None:
    assert parameters(WorkerGroup._create_workers)[1:4] == ["num_workers", "placement_group", "resources_per_worker"]
    assert parameters(WorkerGroup._get_worker_runtime_env) == ["custom_runtime_env"]


def test_policies_have_the_methods_that_we_define() -> None:
    assert ScalingPolicy.__abstractmethods__ == {
        "make_decision_for_non_running_worker_group", "make_decision_for_running_worker_group",
        "_get_num_workers_for_resource_request",
    }  # fmt: skip
    assert FailurePolicy.__abstractmethods__ == {"make_decision"}
    assert parameters(ResizeDecision) == ["num_workers", "resources_per_worker"]
    assert parameters(NoopDecision) == []
    assert {"RETRY", "RAISE"} <= set(FailureDecision.__members__)


def test_a_worker_group_error_has_the_workers_errors() -> None:
    assert "worker_failures" in parameters(WorkerGroupError.__init__)


def test_the_trainer_has_the_hooks_that_we_override() -> None:
    for name in ("_initialize_and_run_controller", "_create_default_callbacks", "_get_train_func"):
        assert callable(getattr(DataParallelTrainer, name))
    assert "train_run_context" in inspect.getsource(DataParallelTrainer.__init__)
