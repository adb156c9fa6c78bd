"""`python job.py --run.name NAME` is enough to go on with a run: what is not given is what it was started with."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.config import TrainConfig, to_dict
from elastic.errors import ConfigError
from elastic.options import parse
from elastic.run.line import prepare_line
from elastic.run.prepare import PreparedRun, open_run
from elastic.run.resuming import described_defaults, take
from elastic.worker.__main__ import main
from tests.fresh import examples
from tests.tiny_jobs import CONFIG, Plain

ONCE = {
    "run.name",
    "run.storage",
    "run.stop_after",
    "run.allow_change",
    "run.take_over",
    "eval.hold",
    "checkpoint.convert",
    "cluster.address",
    "cluster.local_nodes",
}
GIVEN = {
    "--run.duration": ["7st", "2ep"],
    "--run.seed": ["3"],
    "--run.stop-after": ["5st"],
    "--run.take-over": [None],
    "--batch.global-size": ["60"],
    "--optim.clip-norm": ["None", "2.5"],
    "--scaling.max-workers": ["3"],
    "--scaling.exclude": ["a"],
    "--parallel.find-unused": [None],
    "--observe.no-tensorboard": [None],
    "--recovery.hang-timeout": ["20s"],
    "--job.lr": ["0.5"],
    "--job.width": ["12"],
}


def line(options: dict[str, str | None]) -> list[str]:
    return [word for name, value in options.items() for word in (name, value) if word is not None]


def stored(job: Plain, config: TrainConfig, defaults: TrainConfig = CONFIG) -> dict:
    """As config.json has what this needs."""
    values = {
        "values": 1,
        "config": to_dict(config),
        "job": {"options": dataclasses.asdict(job)},
        "defaults": described_defaults(Plain, defaults),
    }
    return json.loads(json.dumps(values))


def fields(config: TrainConfig) -> dict:
    return {
        f"{part}.{name}": value
        for part, section in dataclasses.asdict(config).items()
        if isinstance(section, dict)
        for name, value in section.items()
    }


options = st.lists(st.sampled_from(sorted(GIVEN)), unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: st.sampled_from(GIVEN[name]) for name in names})
)


@settings(max_examples=examples(6, fresh=24))
@given(options, options)
def test_what_is_not_given_is_what_the_run_was_started_with(first, again):
    job, config = parse(Plain, CONFIG, ["--run.name", "mine", *line(first)])

    taken = take(stored(job, config), CONFIG, Plain)
    resumed_job, resumed = parse(Plain, taken.config, ["--run.name", "mine", *line(again)], taken.job_values)

    plain_job, plain = parse(Plain, CONFIG, ["--run.name", "mine", *line({**first, **again})])
    assert resumed_job == plain_job
    found, wanted = fields(resumed), fields(plain)
    given_now = {name.removeprefix("--").replace("-", "_") for name in again}
    for name in found:
        usual = name in ONCE and name != "run.name" and name not in given_now
        assert found[name] == (fields(CONFIG)[name] if usual else wanted[name]), name


def test_what_the_job_s_file_says_otherwise_by_now_counts_as_given():
    job, config = parse(Plain, CONFIG, ["--run.duration", "7st", "--batch.global-size", "60"])
    edited = replace(CONFIG, run=replace(CONFIG.run, duration="20st"))

    taken = take(stored(job, config), edited, Plain)

    assert (taken.config.run.duration, taken.config.batch.global_size) == ("20st", 60)
    assert taken.shown == {"batch.global-size": 60}


def test_a_run_of_an_older_version_keeps_its_options_where_the_file_has_the_usual_ones():
    job, config = parse(Plain, TrainConfig(), ["--run.duration", "7st"])
    old = {k: v for k, v in stored(job, config).items() if k != "defaults"}

    assert take(old, TrainConfig(), Plain).config.run.duration == "7st"
    assert take(old, CONFIG, Plain).config.run.duration == "12st", "which is then refused by name"
    assert take({**old, "values": None} | {"config": {}}, CONFIG, Plain).config == CONFIG


def prepared(tmp_path: Path, *words: str) -> PreparedRun:
    return prepare_line(Plain, CONFIG, ["--run.storage", str(tmp_path), "--run.name", "mine", *words])


def started(tmp_path: Path, *words: str) -> PreparedRun:
    run = prepared(tmp_path, *words)
    run.folder.release(open_run(run))
    return run


def test_a_run_is_resumed_by_its_name_and_says_what_it_took(tmp_path):
    first = started(tmp_path, "--run.duration", "9st", "--job.lr", "0.5", "--scaling.max-workers", "3")

    again = prepared(tmp_path, "--scaling.max-workers", "2")

    assert again.digest == first.digest
    assert again.config.scaling.max_workers == 2
    assert again.config.batch.microbatches == first.config.batch.microbatches
    assert again.notes == ("as it was started: --run.duration 9st --job.lr 0.5",)
    with pytest.raises(ConfigError, match=r"--run\.duration is '20st', but run mine was started with '9st'"):
        prepared(tmp_path, "--run.duration", "20st")


def test_a_configuration_that_is_no_configuration_is_refused_in_one_sentence(tmp_path):
    started(tmp_path)
    file = tmp_path / "mine" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "config": 5}))

    with pytest.raises(ConfigError, match=r"the configuration of run mine in .* is damaged"):
        prepared(tmp_path)


def test_the_command_goes_on_by_name_alone(tmp_path, capsys, monkeypatch):
    started(tmp_path, "--run.duration", "9st")
    argv = ["--module", "tests.tiny_jobs", "--class", "Plain", "--run.storage", str(tmp_path), "--run.name", "mine"]
    monkeypatch.setattr("sys.argv", ["elastic.worker", *argv, "--dry-run"])

    assert main() == 0

    shown = capsys.readouterr().out
    assert "as it was started: --run.duration 9st\n" in shown
    assert "100 samples, 9 steps" in shown


def test_a_warm_up_of_the_job_that_is_longer_than_a_short_run_is_told_and_one_that_is_given_is_refused(tmp_path):
    assert prepared(tmp_path, "--run.duration", "2st").notes == (
        "--optim.warmup is '3st', 3 steps, more than the 2 of --run.duration 2st: the full learning rate is never "
        "reached",
    )
    with pytest.raises(ConfigError, match=r"more than the 2 of --run\.duration 2st.*; give a part of it"):
        prepared(tmp_path, "--run.duration", "2st", "--optim.warmup", "4st")


def test_another_batch_is_cut_anew(tmp_path):
    plain = TrainConfig(run=CONFIG.run, optim=CONFIG.optim)
    place = ["--run.storage", str(tmp_path), "--run.name", "cut"]
    first = prepare_line(Plain, plain, [*place, "--batch.global-size", "32"])
    first.folder.release(open_run(first))

    change = ["--batch.global-size", "30", "--run.allow-change", "batch.global-size", "batch.microbatches"]
    again = prepare_line(Plain, plain, [*place, *change])

    assert 30 % again.plan.microbatches == 0 != 30 % first.plan.microbatches
