"""Elastic: PyTorch training on Ray that does not stop when machines do.

Names are imported on first use, so that `import elastic` takes no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for type checkers and editors
    from elastic.cluster.trainer import ElasticTrainer as ElasticTrainer
    from elastic.cluster.trainer import Result as Result
    from elastic.command import main as main
    from elastic.config import TrainConfig as TrainConfig
    from elastic.data.lanes import Lanes as Lanes
    from elastic.data.samplers import ByLength as ByLength
    from elastic.data.samplers import Curriculum as Curriculum
    from elastic.data.samplers import Sequential as Sequential
    from elastic.data.samplers import Weighted as Weighted
    from elastic.data.shards import Shards as Shards
    from elastic.job import Job as Job
    from elastic.job import Plan as Plan
    from elastic.loading import load_model as load_model
    from elastic.observe.callbacks import Callback as Callback
    from elastic.observe.callbacks import JSONLines as JSONLines
    from elastic.observe.trackers import MLflow as MLflow
    from elastic.observe.trackers import WandB as WandB
    from elastic.sweep.config import SweepConfig as SweepConfig
    from elastic.sweep.driver import SweepResult as SweepResult
    from elastic.sweep.driver import run_sweep as run_sweep

_HOMES = {
    "ElasticTrainer": "elastic.cluster.trainer",
    "Result": "elastic.cluster.trainer",
    "TrainConfig": "elastic.config",
    "RunOptions": "elastic.config",
    "BatchOptions": "elastic.config",
    "OptimOptions": "elastic.config",
    "PrecisionOptions": "elastic.config",
    "DataOptions": "elastic.config",
    "ScalingOptions": "elastic.config",
    "ParallelOptions": "elastic.config",
    "EvalOptions": "elastic.config",
    "CheckpointOptions": "elastic.config",
    "RecoveryOptions": "elastic.config",
    "ObserveOptions": "elastic.config",
    "ClusterOptions": "elastic.config",
    "Job": "elastic.job",
    "Plan": "elastic.job",
    "ByLength": "elastic.data.samplers",
    "Curriculum": "elastic.data.samplers",
    "Sequential": "elastic.data.samplers",
    "Weighted": "elastic.data.samplers",
    "Lanes": "elastic.data.lanes",
    "Shards": "elastic.data.shards",
    "load_model": "elastic.loading",
    "Callback": "elastic.observe.callbacks",
    "JSONLines": "elastic.observe.callbacks",
    "WandB": "elastic.observe.trackers",
    "MLflow": "elastic.observe.trackers",
    "SweepConfig": "elastic.sweep.config",
    "SweepResult": "elastic.sweep.driver",
    "main": "elastic.command",
    "run_sweep": "elastic.sweep.driver",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'elastic' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
