"""Whether a run that was started before may go on with other options: what changed, and what it counts as. Pure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from elastic import config as cfg
from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.job import Job, job_classes, job_options, option_defaults
from elastic.observe.ledger import finite
from elastic.redact import HIDDEN, clean
from elastic.values import ValueRefused, decode, describe, same, show

CODED = "values"  # of a stored configuration whose options are coded: 1; earlier ones were plain JSON


@dataclass(frozen=True)
class Taken:
    """Options of a run for a command that goes on with it and does not give them.

    Args:
        config: what stands where the command line says nothing.
        job_values: the same, of the job's own options, by name.
        shown: those that are not what the job's file says, coded, by the name one would type without dashes.
    """

    config: TrainConfig
    job_values: Mapping[str, Any] = field(default_factory=dict)
    shown: Mapping[str, Any] = field(default_factory=dict)


def described_defaults(job_class: type[Job], defaults: TrainConfig) -> dict[str, Any]:
    """What options are where nobody gives them, by the job's file, coded; it is stored with the run."""
    own = {k: describe(v, f"--job.{k}") for k, v in option_defaults(job_class).items()}
    return clean({"config": cfg.to_dict(defaults), "job": own})


def take(stored: Mapping[str, Any], defaults: TrainConfig, job_class: type[Job]) -> Taken:
    """What a run was started with, for whoever resumes it by its name alone.

    What the job's file says otherwise than when the run was started counts as given: it was edited since. Options that
    are meant once are not taken, nor values that hold a secret, which are not stored, nor how a run was debugged.

    Args:
        stored: the run's configuration, as it was written.
        defaults: what the job's file says now.

    Raises:
        ConfigError: what was stored and what the file says now cannot be together.
    """
    if CODED not in stored:  # older versions wrote plain JSON
        return Taken(defaults)
    before = stored.get("defaults") or {}
    then = before.get("config") or cfg.to_dict(TrainConfig())
    now, was = cfg.to_dict(defaults), stored["config"]
    sections: dict[str, Any] = {}
    shown: dict[str, Any] = {}
    for part in dataclasses.fields(TrainConfig):
        section: Any = getattr(defaults, part.name)
        if not isinstance(now[part.name], dict):
            continue
        found = {}
        for f in dataclasses.fields(section):
            theirs, ours = was.get(part.name, {}), now[part.name][f.name]
            if f.metadata["once"] or f.name not in theirs or (was.get("debug") and not f.metadata["result"]):
                continue
            if _may_take(theirs[f.name], ours, then.get(part.name, {}).get(f.name, ours)):
                value = decode(theirs[f.name])
                found[f.name] = tuple(value) if isinstance(value, list) else value
                shown[f"{part.name}.{f.name}".replace("_", "-")] = theirs[f.name]
        if found:
            sections[part.name] = replace(section, **found)
    values: dict[str, Any] = {}
    own = {k: describe(v, k) for k, v in option_defaults(job_class).items()}
    for name, value in stored["job"]["options"].items():
        if name not in own or not _may_take(value, own[name], before.get("job", own).get(name, own[name])):
            continue
        try:
            values[name] = decode(value, known=job_classes(job_class))
        except ValueRefused:  # it was only described; where it is another one now, that is refused by name
            continue
        shown[f"job.{name}".replace("_", "-")] = value
    return Taken(replace(defaults, **sections), values, shown)


def _may_take(theirs: Any, ours: Any, then: Any) -> bool:
    if theirs is None and ours == []:  # an option that takes several values now, and was not given
        return False
    return same(ours, then) and not same(theirs, ours) and HIDDEN not in json.dumps(theirs)


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
