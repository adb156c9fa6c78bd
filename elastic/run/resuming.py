"""Whether a run that was started before may go on with other options: what changed, and what it counts as. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from elastic import config as cfg
from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.job import Job, job_options, option_defaults
from elastic.observe.ledger import finite
from elastic.redact import clean
from elastic.values import same, show

CODED = "values"  # of a stored configuration whose options are coded: 1; earlier ones were plain JSON


def changes(stored: Mapping[str, Any], config: TrainConfig, job: Job) -> dict[str, tuple[Any, Any]]:
    """Result options that are not what they were: of each by name, what it was and what it is, both coded.

    What an older version, or an older job, did not ask, it did as the default does.

    Args:
        stored: the run's (or sweep's) configuration, as it was written.
    """
    wanted = cfg.result_options(config, job_options(job))
    before = {**cfg.result_options(TrainConfig(), option_defaults(type(job))), **stored["result"]}
    if CODED not in stored:
        plain = _plain(config, job)
        before.update({k: wanted[k] for k, v in stored["result"].items() if k in plain and plain[k] == v})
    return {
        key: (before.get(key), wanted.get(key))
        for key in sorted(set(before) | set(wanted))
        if not same(before.get(key), wanted.get(key))
    }


def _plain(config: TrainConfig, job: Job) -> dict[str, Any]:
    """Result options as earlier versions wrote them."""
    options = {f"job.{k}".replace("_", "-"): v for k, v in job_options(job).items()}
    found = {**cfg.result_options(config, {}), **options}
    return clean(finite(json.loads(json.dumps(found, default=str))))


def refuse_changes(found: Mapping[str, tuple[Any, Any]], allowed: tuple[str, ...], name: str | None) -> None:
    """Raise for the first option that changed and may not.

    Raises:
        ConfigError: which, and how to go on.
    """
    for key, (was, now) in found.items():
        if key not in allowed:
            way = f"--run.allow-change {key}"
            if key == "run.duration":
                way += " to train on to another length"
            raise ConfigError(
                f"--{key} is {show(now)}, but run {name} was started with {show(was)}; give that, another "
                f"--run.name, or {way}"
            )


def is_over(status: Mapping[str, Any] | None, result: Mapping[str, Any] | None, total_steps: int) -> bool:
    """Whether a run has nothing left to do: it finished, and is to be no longer than it was."""
    if status is None or status["status"] != "finished":
        return False
    return result is None or result["steps"] >= total_steps
