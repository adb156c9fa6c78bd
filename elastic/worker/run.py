"""What a worker is told: the run it works for, and who it is. Imports nothing heavy: drivers make these."""

from __future__ import annotations

from dataclasses import dataclass, field

from elastic.config import TrainConfig
from elastic.job import Job
from elastic.run.plan import RunPlan


@dataclass(frozen=True)
class WorkerRun:
    """What a worker needs to know of the run."""

    job: Job
    config: TrainConfig
    plan: RunPlan
    digest: str
    folder_url: str
    server_url: str
    token: str = field(repr=False)


@dataclass(frozen=True)
class Identity:
    """Which worker this is. `local_index` is its place among its node's workers, and the index of its GPU; `vault` is
    the URL of its node's vault, where snapshots are taken."""

    id: str
    node: str
    local_index: int
    host: str
    accelerator: str
    vault: str = ""
