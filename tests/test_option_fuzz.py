"""Every option is sent absurd values: refused in one sentence that names it, or accepted and meant."""

from __future__ import annotations

import contextlib
import os
import typing
from dataclasses import replace
from typing import Any

import pytest

from elastic.command import run
from elastic.config import ObserveOptions, RecoveryOptions, RunOptions, TrainConfig
from elastic.errors import ConfigError
from elastic.options import Option, list_options
from elastic.run.prepare import prepare
from elastic.usage import check_line
from tests.tiny_jobs import CONFIG, Plain

HUGE = "99999999999999999999"
VALUES = [
    "",
    " ",
    "x",
    "-1",
    "0",
    "1.5",
    "1e400",
    "nan",
    "inf",
    "-inf",
    HUGE,
    "None",
    "true",
    "\x00",
    "\x1b[2J",
    "é/ü",
    "../x",
    "0st",
    "1e99st",
    "5tok",
    "0s",
    "0.001s",
    "1e9h",
    "-5s",
]
NAMES = {"x", "nan", "inf", "None", "true"}
WORDS = {*VALUES} - {"", " ", "\x00", "\x1b[2J"}
#: What each option takes of them, each of which can be meant; an option that is not here takes none.
MEANT: dict[str, set[str]] = {
    "--run.name": {v for v in WORDS if v[0] not in "-." and v != "é/ü"},
    "--run.storage": WORDS - {"None"},  # any folder but what a variable that is not set looks like
    "--scaling.exclude": WORDS,  # hosts, which are looked for in the cluster
    "--cluster.address": WORDS,  # is tried within 10 s
    "--parallel.blocks": NAMES,
    "--run.stop-after": {"None", "0.001s"},
    "--cluster.keep-warm": {"None"},
    "--run.seed": {"0"},
    "--run.max-failures": {"0"},
    "--batch.microbatches": {"None"},
    "--batch.pass-size": {"None"},
    "--optim.warmup": {"None"},
    "--optim.final-lr": {"0"},
    "--optim.clip-norm": {HUGE, "None", "1.5"},
    "--data.workers": {"0"},
    "--scaling.spares": {"0"},
    "--scaling.workers-per-node": {"None"},
    "--scaling.memory-per-worker": {HUGE, "None", "1.5"},
    "--scaling.priority": {"-1", "0"},
    "--parallel.prefetch": {"0"},
    "--eval.every": {"None"},
    "--eval.batch-size": {"None"},
    "--eval.sample-every": {"None"},
    "--eval.patience": {"None"},
    "--eval.min-delta": {HUGE, "0", "1.5"},
    "--checkpoint.every": {"None", "0.001s"},
    "--checkpoint.keep-every": {"None"},
    "--checkpoint.keep-best": {"0"},
    "--checkpoint.init-from": {"None"},
    "--recovery.max-wait": {"None", "0.001s"},
    "--scaling.request-timeout": {"0.001s"},
    "--observe.log-every": {HUGE, "1.5"},
    "--run.max-cost": {"None"},
    "--observe.port": {"None"},
    "--observe.notify": {"None", "true"},  # a program of every machine
    "--observe.price": {HUGE, "0", "1.5"},
    "--cluster.local-nodes": {"None"},
}
OPTIONS = [o for o in list_options(Plain, CONFIG) if not o.name.startswith("--job.")]


def read(option: Option, text: str) -> Any:
    """The value of a text that `check_line` let pass, as the command line makes it."""
    hint = option.hint
    several = typing.get_origin(hint) is tuple
    kinds = (
        typing.get_args(hint) if typing.get_args(hint) and typing.get_origin(hint) is not typing.Literal else (hint,)
    )
    if text == "None" and type(None) in kinds:
        return None
    value: Any = text
    for kind in (int, float):
        if kind in kinds:
            value = kind(text)
    return (value,) if several else value


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_absurd_values_are_refused_by_name_or_meant(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section, _, field = option.name.removeprefix("--").replace("-", "_").partition(".")
    taken = set()
    for text in VALUES:
        said = ""
        try:
            check_line(OPTIONS, [f"{option.name}={text}"])
            part = replace(getattr(CONFIG, section), **{field: read(option, text)})
            prepare(Plain(), replace(CONFIG, **{section: part}))
            taken.add(text)
        except ConfigError as error:
            said = str(error)
        assert text in taken or (option.name in said and "\n" not in said), said

    assert taken == MEANT.get(option.name, set())
    assert os.listdir() == []


@pytest.mark.parametrize(
    "line",
    [
        "--run.duration 1e99st",
        "--recovery.lease 0.001s",
        "--observe.price inf",
        "--run.allow-change bogus",
        "--optim.warmup 13st",
        "--data.prefetch 99999999999999999999",
        "--parallel.blocks -1",
        "--run.storage None",
    ],
)
def test_the_command_ends_with_2_and_one_sentence(line, capsys):
    assert run(Plain, CONFIG, [*line.split(), "--dry-run"]) == 2

    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {line.split()[0]} is ")
    assert shown.err.count("\n") == 1


def test_the_least_and_the_most_of_times_are_taken():
    for lease in ("1s", "168h"):
        RecoveryOptions(lease=lease, hang_timeout="0.1s")
    for wrong in ("0.9s", "169h"):
        with pytest.raises(ConfigError, match=r"--recovery\.lease is .* give a time from 1s to 168h"):
            RecoveryOptions(lease=wrong)
    with contextlib.suppress(ConfigError):
        ObserveOptions(log_every=float("nan"))
        raise AssertionError("taken")
    assert TrainConfig(run=RunOptions(allow_change=("data", "job.anything", "batch.global-size"))).run.allow_change
