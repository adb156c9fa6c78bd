"""Decides whether a run may be resumed with other options: which changed, and which count as given. Pure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from elastic import config as cfg
from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.job import Job
from elastic.job_options import job_classes, job_options, option_defaults
from elastic.observe.ledger import finite
from elastic.redact import HIDDEN, clean
from elastic.values import ValueRefused, decode, describe, same, show

CODED = "values"  # the key that says that options of a stored configuration are coded; older ones were plain JSON


@dataclass(frozen=True)
class Taken:
    """Options of a stored run for a command that resumes it without giving them.

    Args:
        config: defaults of the command line.
        job_values: defaults of the job's own options, by name.
        shown: those that differ from the job's file, coded, by their name on the command line without dashes.
    """

    config: TrainConfig
    job_values: Mapping[str, Any] = field(default_factory=dict)
    shown: Mapping[str, Any] = field(default_factory=dict)


def described_defaults(job_class: type[Job], defaults: TrainConfig) -> dict[str, Any]:
    """The defaults in the job's file, coded; they are stored with the run."""
    own = {k: describe(v, f"--job.{k}") for k, v in option_defaults(job_class).items()}
    return clean({"config": cfg.to_dict(defaults), "job": own})


def take(stored: Mapping[str, Any], defaults: TrainConfig, job_class: type[Job]) -> Taken:
    """The options that a run was started with, for a command that resumes it by name alone.

    A default in the job's file that changed since the run was started counts as given, since the user edited it. Not
    taken over are: options for one command only, values that hold a secret, which are not stored, and the operational
    options of a run in --debug.

    Args:
        stored: the stored configuration of the run.
        defaults: the present defaults in the job's file.

    Raises:
        ConfigError: the stored options and the present ones cannot be combined.
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
        except ValueRefused:  # the value was only described; if it is another one now, `refuse_changes` names it
            continue
        shown[f"job.{name}".replace("_", "-")] = value
    return Taken(replace(defaults, **sections), values, shown)


def _may_take(theirs: Any, ours: Any, then: Any) -> bool:
    if theirs is None and ours == []:  # an option that takes several values now, and was not given
        return False
    return same(ours, then) and not same(theirs, ours) and HIDDEN not in json.dumps(theirs)


def changes(stored: Mapping[str, Any], config: TrainConfig, job: Job) -> dict[str, tuple[Any, Any]]:
    """Result options that changed: by name, the value before and the value now, both coded.

    An option that an older version, or an older job, did not have counts as its default.

    Args:
        stored: the stored configuration of the run or sweep.
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
    """Refuse the first option that changed without permission.

    Raises:
        ConfigError: with the option, and how to go on.
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
    """Whether a run has nothing left to do: it finished, and its duration was not increased."""
    if status is None or status["status"] != "finished":
        return False
    return result is None or result["steps"] >= total_steps
