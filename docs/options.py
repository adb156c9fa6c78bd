"""Writes docs/options.md: every option of every job, and every verb of `elastic`, from what the code says of them.

python -m docs.options > docs/options.md
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator

import elastic
from elastic.cli import parser
from elastic.options import Option, list_options

HEAD = """\
# Options

This page is written by `python -m docs.options > docs/options.md`.

`python job.py --help` shows the options that are marked *common* and the job's own (`--job.NAME`, the fields of its
dataclass). `--help-all` shows all.

* An amount is a number and a unit: `ep` epochs, `st` steps, `tok` tokens; where clocks are allowed also `s`, `min` and
  `h`.
* *Result* options are part of what the run computes. They stay as they are for the run's life; `--run.allow-change`
  names exceptions.
* An option that is on by default is turned off with `no-`: `--observe.no-tensorboard`.
* `--config FILE` reads options from a YAML or TOML file, in sections (`run: {duration: 5ep}`) or by dotted names. What
  is on the command line goes before it.
* Words of other trainers get an answer that names the option here: epochs are `--run.duration 5ep`, a batch size is
  `--batch.global-size` (over all workers), accumulation is `--batch.pass-size`, a learning rate is a field of the job's
  class (`lr: float = 1e-3` is `--job.lr`).
"""


def marks(option: Option) -> str:
    """Whether it is one of the common options, and whether it is a result option."""
    section, dot, name = option.name.removeprefix("--").replace("-", "_").partition(".")
    fields = type(getattr(elastic.TrainConfig(), section)).__dataclass_fields__ if dot else {}
    result = bool(dot) and fields[name].metadata["result"]
    return ", ".join(word for word, is_so in (("common", option.common), ("*result*", result)) if is_so)


def default(option: Option) -> str:
    """As one would type it."""
    if option.default is None or option.default == ():
        return ""
    return f"`{option.default}`" if not isinstance(option.default, bool) else "on" if option.default else "off"


def meaning(option: Option) -> str:
    """Its help, and the values that it may have where they are few."""
    values = ", ".join(f"`{word}`" for word in option.kind.split("|")) if "|" in option.kind else ""
    return option.help.replace("<", "&lt;") + (f"; one of {values}" if values else "")


def rows(section: str) -> Iterator[str]:
    """The options of one section of the configuration, `""` for those outside any."""
    yield "| option | default | | meaning |"
    yield "|---|---|---|---|"
    for option in list_options(elastic.Job, elastic.TrainConfig()):
        name, dot, _ = option.name.removeprefix("--").partition(".")
        if (name if dot else "") == section:
            yield f"| `{option.name}` | {default(option)} | {marks(option)} | {meaning(option)} |"


def sections() -> Iterator[str]:
    """A chapter for each section, with its own words about it."""
    config = elastic.TrainConfig()
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            doc = (type(value).__doc__ or "").strip().splitlines()[0]
            yield from (f"## {part.name}", "", doc, "", *rows(part.name), "")
    yield from ("## Outside of any section", "", *rows(""), "")


def verbs(of: argparse.ArgumentParser, prefix: str = "elastic") -> Iterator[tuple[str, str]]:
    """Each command line that `elastic` takes, and what it does."""
    for action in of._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, inner in action.choices.items():
            below = list(verbs(inner, f"{prefix} {name}"))
            usage = re.sub(r"\s+", " ", inner.format_usage()).strip()
            usage = usage.removeprefix("usage: ").replace(" [-h]", "").replace("|", "\\|")
            yield from below or [("elastic sweep JOB ..." if name == "sweep" else usage, helps[name])]


def page() -> str:
    """The whole page."""
    lines = [HEAD, *sections(), "## Commands", "", "Each has `--help`.", "", "| command | what it does |", "|---|---|"]
    lines += [f"| `{usage}` | {text} |" for usage, text in verbs(parser())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
