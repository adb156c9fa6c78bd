"""The internals of Ray Train, under public names: its workers. Read in Ray 2.60; its import takes seconds, so that only
workers import this.

Ray Train answers a death or a resize by killing all workers, and offers no other way. So its controller and worker
group are not used, only the class in which a worker runs.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any

from ray.train.v2._internal.execution.context import DistributedContext, TrainRunContext
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from ray.train.v2._internal.logging import patch_print
from ray.train.v2.api.config import RunConfig, ScalingConfig

__all__ = ["RayTrainWorker", "print_once", "run_training"]


def print_once() -> None:
    """On a worker: have `print` print. Ray Train replaces it by one that logs each line too, where a console handler
    prints it again."""
    builtins.print = patch_print._original_print


def run_training(
    worker: RayTrainWorker, name: str, workers: int, resources: Mapping[str, float], function: Any
) -> None:
    """Have Ray Train's worker of this process run a function on a thread; returns when it has started.

    The ranks that Ray Train gives to workers are all 0: each world decides on ranks itself. Ray Train stores nothing,
    and has no barriers for its workers.

    Args:
        name: of the run.
        workers: the number of workers that the run is to have.
        resources: of one worker.
        function: an object whose method `get` returns the function.
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
    worker.init_train_context(
        train_run_context=context,
        distributed_context=DistributedContext(
            world_rank=0, world_size=workers, local_rank=0, local_world_size=1, node_rank=0
        ),
        synchronization_actor=None,  # type: ignore[arg-type]
        storage_context=None,  # type: ignore[arg-type]
        worker_callbacks=[],
        controller_actor=None,  # type: ignore[arg-type]
    )
    worker.run_train_fn(function)
