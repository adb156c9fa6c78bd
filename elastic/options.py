"""The command line of a job file: options from dataclasses, two lengths of help, one sentence for bad input."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.job import Job
from elastic.job_code import job_code
from elastic.job_options import option_defaults
from elastic.usage import FILE, check_line, is_plain


@dataclass(frozen=True)
class Option:
    """One option as a help page shows it."""

    name: str
    kind: str
    hint: Any
    default: Any
    help: str
    common: bool


def list_options(job_class: type[Job], defaults: TrainConfig) -> Iterator[Option]:
    """All options of a job: first its own, then those that every job has."""
    if dataclasses.is_dataclass(job_class):
        hints = _hints(job_class)
        for f in dataclasses.fields(job_class):
            if f.init:
                default = f.default if f.default is not dataclasses.MISSING else None
                hint = hints[f.name]
                yield Option(f"--job.{_dashed(f.name)}", _kind(hint), hint, default, f.metadata.get("help", ""), True)
    for part in dataclasses.fields(defaults):
        section = getattr(defaults, part.name)
        if not dataclasses.is_dataclass(section):
            metadata = part.metadata
            yield Option(f"--{_dashed(part.name)}", "flag", bool, section, metadata["help"], metadata["common"])
            continue
        hints = typing.get_type_hints(type(section))
        for f in dataclasses.fields(section):
            value = getattr(section, f.name)
            name = f"--{_dashed(part.name)}.{_dashed(f.name)}"
            hint = hints[f.name]
            yield Option(name, _kind(hint), hint, value, f.metadata["help"], f.metadata["common"])


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _kind(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    text = hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))
    if hint is bool:
        return "flag"
    for word in ("int", "float", "str"):
        if word in str(hint):
            return {"int": "NUMBER", "float": "NUMBER", "str": "TEXT"}[word]
    return text


def help_text(job_class: type[Job], defaults: TrainConfig, *, everything: bool) -> str:
    """The help page, with the common options or with all."""
    doc = (job_class.__doc__ or "").strip().splitlines()
    lines = [f"{job_class.__name__}: {doc[0]}" if doc and job_class.__doc__ != Job.__doc__ else job_class.__name__, ""]
    options = [o for o in list_options(job_class, defaults) if everything or o.common]
    rows = [(o.name if o.kind == "flag" else f"{o.name} {o.kind}", o) for o in options]
    width = max(len(left) for left, _ in rows) + 2
    for left, o in rows:
        default = "" if o.default is None or o.default is False or o.default == () else f" [{o.default}]"
        if o.default is True:
            section, _, leaf = o.name.rpartition(".")
            default = f" [on; {section}.no-{leaf} turns it off]"
        lines.append(f"  {left:<{width}}{o.help}{default}")
    lines += ["", f"  {FILE + ' FILE':<{width}}options from a YAML or TOML file; the line goes before it"]
    if not everything:
        lines.append(f"  {'--help-all':<{width}}all options")
    return "\n".join(lines).rstrip() + "\n"


def parse(
    job_class: type[Job], defaults: TrainConfig, argv: Sequence[str], job_values: Mapping[str, Any] | None = None
) -> tuple[Job, TrainConfig]:
    """Read a command line.

    Args:
        job_values: values of the job's options that the line does not give; the default is that of the class.

    Raises:
        ConfigError: an option or value is wrong; the error has the nearest right ones.
        SystemExit: help was asked for (0), or tyro cannot read a value of a type of the job's own (2, after a message).
    """
    for flag, everything in (("--help", False), ("-h", False), ("--help-all", True)):
        if flag in argv:
            sys.stdout.write(help_text(job_class, defaults, everything=everything))
            raise SystemExit(0)
    options = list(list_options(job_class, defaults))
    check_line(options, argv, [o.name for o in options if not is_plain(o.hint)])
    import tyro

    from elastic.seeds import seed_job

    fields: list[Any] = [
        (f.name, type(getattr(defaults, f.name)), dataclasses.field(default=getattr(defaults, f.name)))
        for f in dataclasses.fields(defaults)
    ]
    values = {**_own_defaults(job_class), **(job_values or {})}
    if values:
        own = _own_options(job_class, values)
        fields.insert(0, ("job", own, dataclasses.field(default_factory=own)))
    line = dataclasses.make_dataclass("Options", fields, frozen=True)
    with job_code(f"reading the options of {job_class.__name__}"):
        found: Any = tyro.cli(line, args=list(argv), description="", prog=_prog())
    parts = {f.name: getattr(found, f.name) for f in dataclasses.fields(defaults)}
    seed_job()
    with job_code(f"{job_class.__name__}()"):
        job = job_class(**{name: getattr(found.job, name) for name in values})
    return job, TrainConfig(**parts)


def _own_defaults(job_class: type[Job]) -> dict[str, Any]:
    """The default of each of the job's own options.

    Raises:
        ConfigError: an option has no default.
    """
    found = option_defaults(job_class)
    if dataclasses.is_dataclass(job_class):
        for f in dataclasses.fields(job_class):
            if f.init and f.name not in found:
                raise ConfigError(f"{job_class.__name__} needs a default for every option, and {f.name!r} has none")
    return found


def _own_options(job_class: type[Job], values: Mapping[str, Any]) -> type:
    """A class with the job's options only, so that the job's own checks run once, on the values that were given."""
    hints = _hints(job_class)
    fields: list[Any] = [
        (name, hints[name], dataclasses.field(default_factory=partial(_same, value))) for name, value in values.items()
    ]
    return dataclasses.make_dataclass(job_class.__name__, fields)


def _same(value: Any) -> Any:
    return value


def _hints(job_class: type[Job]) -> dict[str, Any]:
    with job_code(f"reading the annotations of {job_class.__name__}"):
        return typing.get_type_hints(job_class, include_extras=True)


def _prog() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name}" if spec else f"python {sys.argv[0]}"
