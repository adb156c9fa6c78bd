"""Turns a job's command line into a prepared run: with files of options, and the options that a run was started
with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.job import Job
from elastic.option_file import expand
from elastic.options import parse
from elastic.run.folder import RunFolder
from elastic.run.prepare import PreparedRun, prepare, refuse_packages, stored_config, typed
from elastic.run.resuming import Taken, take
from elastic.sections.training import RUN_NAME
from elastic.storage import Storage
from elastic.usage import OTHERS, last_value


def prepare_line(
    job_class: type[Job],
    defaults: TrainConfig,
    argv: Sequence[str],
    parsed: Callable[[TrainConfig], None] = lambda config: None,
) -> PreparedRun:
    """Parse a command line and prepare its run. Options on the line override files of options, these override what the
    run of that name was started with, and that overrides the job's own defaults.

    Args:
        parsed: called with the options before the job's data is looked at, which may take long.

    Raises:
        ConfigError: with one sentence that names the option, its value and the fix.
        SystemExit: help was asked for (0), or the line cannot be read (2).
    """
    line, files = expand(argv)
    taken = _taken(job_class, defaults, line)
    if last_value(line, "--batch.global-size") is not None:  # another batch needs another number of microbatches
        batch = replace(taken.config.batch, microbatches=defaults.batch.microbatches)
        shown = {name: value for name, value in taken.shown.items() if name != "batch.microbatches"}
        taken = replace(taken, config=replace(taken.config, batch=batch), shown=shown)
    job, config = parse(job_class, taken.config, line, taken.job_values)
    notes = [f"options of {file}" for file in files]
    shown = _not_given(taken.shown, line)
    if shown:
        notes.append(f"as it was started: {' '.join(typed(name, value) for name, value in shown.items())}")
    parsed(config)
    run = prepare(job, config)
    if run.plan.warmup_steps > run.plan.total_steps and last_value(line, "--optim.warmup") is not None:
        raise ConfigError(f"{run.notes[-1]}; give a part of it")
    return replace(run, defaults=defaults, notes=(*notes, *run.notes))


def _taken(job_class: type[Job], defaults: TrainConfig, line: Sequence[str]) -> Taken:
    name, storage = last_value(line, "--run.name"), last_value(line, "--run.storage")
    name = defaults.run.name if name is None else name
    # without a valid name it is a new run, or is refused later with the rest of the line, or only help is asked for
    if name is None or not RUN_NAME.match(name) or set(OTHERS) & set(line):
        return Taken(defaults)
    url = defaults.run.storage if storage is None else storage
    refuse_packages(url)
    stored = stored_config(RunFolder(Storage(url).child(name)))
    if stored is None:
        return Taken(defaults)
    try:
        return take(stored, defaults, job_class)
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"the configuration of run {name} in {url} is damaged ({type(error).__name__}: {error}); put back a copy "
            "of it, or give another --run.name"
        ) from error


def _not_given(shown: Mapping[str, Any], line: Sequence[str]) -> dict[str, Any]:
    given = {word.partition("=")[0].replace("_", "-") for word in line if word.startswith("--")}
    found = {}
    for name, value in shown.items():
        section, dot, leaf = name.rpartition(".")
        if not given & {f"--{name}", f"--{section}{dot}no-{leaf}"}:
            found[name] = value
    return found
