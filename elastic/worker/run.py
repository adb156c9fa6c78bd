"""What a worker gets when it starts: its run, and its identity. Imports nothing heavy, since drivers create these."""

from __future__ import annotations

from dataclasses import dataclass, field

from elastic.config import TrainConfig
from elastic.job import Job
from elastic.run.plan import RunPlan


@dataclass(frozen=True)
class WorkerRun:
    """What a worker needs to know about the run."""

    job: Job
    config: TrainConfig
    plan: RunPlan
    digest: str
    folder_url: str
    server_url: str
    token: str = field(repr=False)
    prepared: str = ""  # the key under which nodes are prepared


@dataclass(frozen=True)
class Identity:
    """Which worker this is.

    Args:
        local_index: its index among the workers of its node, and the index of its GPU.
        vault: the URL of its node's vault; empty if no snapshots are taken.
    """

    id: str
    node: str
    local_index: int
    host: str
    accelerator: str
    vault: str = ""
