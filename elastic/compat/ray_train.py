"""The internals of Ray Train, under public names: the actors of its workers. Read in Ray 2.60; its import takes
seconds.

Ray Train answers a death or a resize by killing all workers, and offers no other way. So its controller and worker
group are not used, only the actor class in which a worker runs.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any

from ray.train.v2._internal.execution.context import DistributedContext, TrainRunContext
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.train.v2._internal.logging import patch_print
from ray.train.v2.api.config import RunConfig, ScalingConfig

__all__ = ["RayTrainWorker", "WorkerStatus", "print_once", "run_training"]


def print_once() -> None:
    """On a worker: have `print` print. Ray Train replaces it by one that logs each line too, where a console handler
    prints it again."""
    builtins.print = patch_print._original_print


def run_training(actor: Any, name: str, workers: int, resources: Mapping[str, float], function: Any) -> Any:
    """Have an actor of class `RayTrainWorker` run a function in a thread; returns a reference to its start.

    The ranks that Ray Train gives to workers are all 0: each world decides on ranks itself. Ray Train stores nothing,
    and has no barriers for its workers.

    Args:
        name: of the run.
        workers: the number of workers that the run is to have.
        resources: of one worker.
        function: an object whose method `get` returns the function, on the worker.
    """
    scaling: Any = ScalingConfig(
        num_workers=workers, use_gpu=resources.get("GPU", 0) > 0, resources_per_worker=dict(resources)
    )
    context: Any = TrainRunContext(
        run_config=RunConfig(name=name),
        train_loop_config=None,
        scaling_config=scaling,
        backend_config=None,  # type: ignore[arg-type]
        dataset_config=None,  # type: ignore[arg-type]
    )
    actor.init_train_context.remote(
        train_run_context=context,
        distributed_context=DistributedContext(
            world_rank=0, world_size=workers, local_rank=0, local_world_size=1, node_rank=0
        ),
        synchronization_actor=None,
        storage_context=None,
        worker_callbacks=[],
        controller_actor=None,
    )
    return actor.run_train_fn.remote(function)
