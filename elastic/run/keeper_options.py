"""The options of a run's keeper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from elastic.checkpoint.retention import Policy


@dataclass(frozen=True)
class KeeperOptions:
    """What the keeper needs to know about a run.

    Args:
        save_every_s: seconds between checkpoints; 0 for the interval that costs least, None if it is given in steps.
        facts: go into every status (owner, host, git commit, ...).
        max_cost: of the whole run, which is paused when it is reached.
        new_config: replaces the run's stored configuration once the run has trained with it.
    """

    epoch: int
    retention: Policy
    save_every_s: float | None
    total_steps: int
    tensorboard: bool
    facts: dict[str, Any]
    max_cost: float | None = None
    new_config: dict[str, Any] | None = None
