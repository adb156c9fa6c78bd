"""The options of a job (its dataclass fields): their defaults, their values as JSON, and a job made from them again."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from elastic.errors import ConfigError
from elastic.job import Job
from elastic.job_code import job_code
from elastic.values import ValueRefused, classes, decode, encode


def job_options(job: Job) -> dict[str, Any]:
    """Return the job's own options (its dataclass fields), by name."""
    if not dataclasses.is_dataclass(job):
        return {}
    return {f.name: getattr(job, f.name) for f in dataclasses.fields(job) if f.init}


def job_classes(cls: type[Job], *values: Any) -> dict[str, type]:
    """Return the enums, dataclasses and named tuples of which a job's values may be made, by name.

    They are those of its options' defaults and annotations, those in `values`, and those at the top of the modules that
    define the job.
    """
    owners = [c for c in cls.__mro__ if issubclass(c, Job) and c is not Job]
    places = [*owners, *(sys.modules.get(c.__module__) for c in owners)]
    functions = [f for c in owners for f in vars(c).values() if isinstance(f, types.FunctionType)]
    spaces = [*(vars(place) for place in places if place is not None), *(f.__globals__ for f in functions)]
    named = [v for space in spaces for v in space.values() if isinstance(v, type)]
    return classes(*_hints(cls), option_defaults(cls), *values, *named)


def _hints(cls: type[Job]) -> list[Any]:
    try:
        return list(typing.get_type_hints(cls).values())
    except (NameError, TypeError, AttributeError):  # an annotation has names that only a type checker knows
        return []


def option_defaults(cls: type[Job]) -> dict[str, Any]:
    """Return the default of each of the job's own options that has one, by name.

    Raises:
        ConfigError: a default factory raised.
    """
    found: dict[str, Any] = {}
    if not dataclasses.is_dataclass(cls):
        return found
    for f in dataclasses.fields(cls):
        if not f.init:
            continue  # the job sets it itself
        if f.default is not dataclasses.MISSING:
            found[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            with job_code(f"the default of {cls.__name__}.{f.name}"):
                found[f.name] = f.default_factory()
    return found


def coded_options(job: Job) -> dict[str, Any]:
    """Return the job's own options that are not the defaults, as JSON, for `with_options` in another process.

    Raises:
        ConfigError: a value that cannot be sent.
    """
    found, defaults = {}, option_defaults(type(job))
    for name, value in job_options(job).items():
        if name in defaults and value is defaults[name]:
            continue
        try:
            coded = encode(value, f"--job.{name.replace('_', '-')}", known=job_classes(type(job)))
        except ValueRefused as error:
            raise ConfigError(f"{error}; it is sent to the workers as an option") from error
        found[name] = coded
    return found


def with_options(cls: type[Job], coded: Mapping[str, Any]) -> Job:
    """Make the job whose options `coded_options` returned."""
    return cls(**decode(dict(coded), known=job_classes(cls)))
