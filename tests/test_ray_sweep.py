"""Sweeps on a Ray cluster: a killed driver and a killed node change no trial and no bit; a population survives a node;
what a sweep leaves behind; budgets, and what is refused."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from elastic import cli
from elastic.observe.ledger import EVENTS, METRICS, gaps_and_doubles, read_records
from elastic.storage import Storage
from elastic.tools.sweeps import TRIALS, open_sweep, read_trials
from jobs.bench.nodes import Command, LocalCluster, result
from tests.forked_command import ForkedCommand
from tests.ray_cluster import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(480)]
STEPS, TRIAL_COUNT = 36, 4
DIGITS = (
    "--job",
    "jobs.digits",
    "--search",
    "job.lr=loguniform(3e-4,3e-2)",
    "--search",
    "job.width=choice(4,16,32)",
    "--trials",
    str(TRIAL_COUNT),
    "--scheduler",
    "asha",
    "--grace-period",
    "3",
    "--metric",
    "eval/loss",
    "--run.exactness",
    "bitwise",
    "--run.duration",
    f"{STEPS}st",
    "--eval.every",
    "4st",
    "--optim.warmup",
    "4st",
)
SMALL = ("--scaling.max-workers", "1", "--max-concurrent", "2", "--observe.no-tensorboard")


def sweep(cluster: LocalCluster, storage: Path, name: str, *options: str) -> Command:
    return ForkedCommand(
        "-m",
        "jobs.sweep",
        "--cluster.address",
        cluster.address,
        "--run.storage",
        str(storage),
        "--sweep.name",
        name,
        *SMALL,
        *options,
    )


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return read_records(Storage(str(folder)), TRIALS)


def story(folder: Path) -> dict[int, Any]:
    """What decides about each trial, and what came of it: nothing of it may depend on who was killed."""
    _, values = open_sweep(str(folder))
    return {
        t.number: (
            t.started_with,
            t.options,
            [(r["evaluation"], r["step"], r["metrics"]) for r in t.reports],
            [(v["evaluation"], v["do"], v["until"], v["source"]) for v in t.verdicts],
            t.status,
            t.step,
            t.weights_sha256,
        )
        for t in read_trials(Storage(str(folder)), values["metric"], values["mode"])
    }


def kill_node_of(cluster: LocalCluster, run: Path) -> None:
    """Kill the node of the newest worker of a run."""
    warm = [e for e in read_records(Storage(str(run)), EVENTS) if e["kind"] == "worker_warm"]
    cluster.kill_node(next(n for n in cluster.nodes if n.node_id == warm[-1]["node"]))


@pytest.fixture(scope="module")
def undisturbed(ray_nodes: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nothing happens to."""
    storage = tmp_path_factory.mktemp("sweeps")
    command = sweep(ray_nodes, storage, "mine", *DIGITS)
    assert command.wait(150) == 0, command.output
    return storage / "mine"


def test_asha_finds_better_options_than_the_default_ones_in_fewer_steps_than_whole_trials(
    undisturbed: Path, tmp_path: Path
) -> None:
    place = ("--run.storage", str(tmp_path), "--run.name", "default")
    options = DIGITS[DIGITS.index("--run.exactness") :]
    default = ForkedCommand("-m", "elastic.worker", "--module", "jobs.digits", "--workers", "1", *place, *options)
    assert default.wait() == 0, default.output
    known = result(tmp_path / "default")["metrics"]["eval/accuracy"]

    found = story(undisturbed)

    _, values = open_sweep(str(undisturbed))
    assert result(undisturbed / values["best"]["run"])["metrics"]["eval/accuracy"] > known
    assert sum(step for *_, step, _ in found.values()) < TRIAL_COUNT * STEPS
    assert {status for *_, status, _, _ in found.values()} == {"finished", "stopped"}


def test_a_killed_driver_and_a_killed_node_change_no_trial_and_no_hash(
    cluster: LocalCluster, undisturbed: Path, tmp_path: Path
) -> None:
    # given a sweep whose driver is killed when two trials have ended
    first = sweep(cluster, tmp_path, "mine", *DIGITS)
    wait_until(lambda: sum(line["kind"] == "ended" for line in lines_of(tmp_path / "mine")) >= 2, 120)
    first.signal(signal.SIGKILL)
    first.end()
    before = lines_of(tmp_path / "mine")

    # when the same command goes on with it, and loses a node under a trial that has reported
    second = sweep(cluster, tmp_path, "mine", *DIGITS)
    known = len(before)
    wait_until(lambda: any(line["kind"] == "report" for line in lines_of(tmp_path / "mine")[known:]), 120)
    reporting = next(line["trial"] for line in lines_of(tmp_path / "mine")[known:] if line["kind"] == "report")
    kill_node_of(cluster, tmp_path / "mine" / f"mine-{reporting:04d}")
    assert second.wait(150) == 0, second.output

    # then every trial is what it was in the sweep that nothing happened to
    assert story(tmp_path / "mine") == story(undisturbed)
    ended = {line["trial"] for line in before if line["kind"] == "ended"}
    claims = {n: len(list((tmp_path / "mine" / f"mine-{n:04d}" / "claims").iterdir())) for n in range(TRIAL_COUNT)}
    assert {claims[n] for n in ended} == {1}  # what had ended was not run again

    # and a third command has nothing to do
    third = sweep(cluster, tmp_path, "mine", *DIGITS)
    assert third.wait() == 0, third.output
    assert "starts with" not in third.output
    other = sweep(cluster, tmp_path, "mine", *DIGITS, "--sweep.seed", "1")
    assert other.wait() == 2
    assert "--sweep.seed is 1, but sweep mine was started with 0" in other.output


def test_what_a_sweep_leaves_behind_is_reported_and_exported(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, values = open_sweep(str(undisturbed))
    best = values["best"]

    assert cli.main(["report", str(undisturbed)]) == 0
    shown = capsys.readouterr().out
    assert f"best: {undisturbed}/{best['run']}, step {best['step']} (pinned)" in shown
    assert f"{TRIAL_COUNT} of {TRIAL_COUNT} trials" in shown
    assert cli.main(["report", str(undisturbed), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert next(t["run"] for t in told["trials"]) == best["run"]
    assert told["sweep"]["status"] == "finished"

    out = tmp_path / "best.safetensors"
    assert cli.main(["checkpoints", "export", str(undisturbed), str(out)]) == 0
    assert f"step {best['step']}" in capsys.readouterr().out
    assert out.stat().st_size > 1000
    assert cli.main(["checkpoints", "ls", f"{undisturbed}/{best['run']}", "--json"]) == 0
    assert [c["pinned"] for c in json.loads(capsys.readouterr().out)["checkpoints"]] == [True]
    rows = list(csv.DictReader((undisturbed / "trials.csv").open()))
    assert [float(r["eval/loss"]) for r in rows] == sorted(float(r["eval/loss"]) for r in rows)
    for name in ("objective.png", "curves.png", "slices.png"):
        assert (undisturbed / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.long
def test_a_population_survives_a_node_and_counts_every_sample_once(cluster: LocalCluster, tmp_path: Path) -> None:
    options = (
        "--job",
        "jobs.codegpt",
        "--search",
        "job.lr=loguniform(1e-4,3e-2)",
        "--trials",
        "4",
        "--scheduler",
        "pbt",
        "--metric",
        "eval/bits_per_byte",
        "--job.block",
        "32",
        "--job.eval-blocks",
        "16",
        "--batch.global-size",
        "8",
        "--batch.microbatches",
        "4",
        "--run.duration",
        "12st",
        "--eval.every",
        "4st",
        "--optim.warmup",
        "2st",
        "--run.exactness",
        "bitwise",
        "--max-concurrent",
        "4",
    )
    run = sweep(cluster, tmp_path, "people", *options)
    folder = tmp_path / "people"
    wait_until(lambda: any(line["kind"] == "report" for line in lines_of(folder)), 120)
    reporting = next(line["trial"] for line in lines_of(folder) if line["kind"] == "report")
    kill_node_of(cluster, folder / f"people-{reporting:04d}")
    assert run.wait(200) == 0, run.output

    found = story(folder)
    assert [(status, step) for *_, status, step, _ in found.values()] == [("finished", 12)] * 4
    takes = [(n, v) for n, (_, _, _, verdicts, *_) in found.items() for v in verdicts if v[1] == "exploit"]
    assert len(takes) == 2  # one of four at each of two gates
    for number in range(4):
        storage = Storage(str(folder / f"people-{number:04d}"))
        assert gaps_and_doubles(read_records(storage, METRICS), 8) == []
    for number, (evaluation, _, _, source) in takes:
        names = [c.name for c in (folder / f"people-{number:04d}" / "checkpoints").glob("step-*/*")]
        adopted = [n for n in names if n.endswith(f"adoptspeople{source:04d}")]
        assert adopted or evaluation == 1, "the first may be gone by now, as older checkpoints are"


@pytest.mark.long
def test_a_bracket_on_one_place_is_interrupted_and_goes_on_until_one_trial_is_left(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    options = (
        "--job",
        "jobs.digits",
        "--search",
        "job.lr=grid(0.0001,0.01,0.0002)",
        "--scheduler",
        "hyperband",
        "--metric",
        "eval/loss",
        "--run.duration",
        "12st",
        "--eval.every",
        "4st",
        "--optim.warmup",
        "2st",
        "--max-concurrent",
        "1",
    )
    folder = tmp_path / "bracket"
    first = sweep(cluster, tmp_path, "bracket", *options)
    wait_until(lambda: any(line["kind"] == "report" for line in lines_of(folder)), 60)
    first.signal(signal.SIGINT)
    assert first.wait() == 130, first.output
    assert json.loads((folder / "sweep.json").read_text())["status"] == "interrupted"

    second = sweep(cluster, tmp_path, "bracket", *options)

    assert second.wait(120) == 0, second.output
    found = story(folder)
    assert [(status, step) for *_, status, step, _ in found.values()] == [
        ("stopped", 4),
        ("finished", 12),
        ("stopped", 4),
    ]
    for number in range(3):
        rows = read_records(Storage(str(folder / f"bracket-{number:04d}")), METRICS)
        assert gaps_and_doubles(rows, 64) == []
        steps = [r["step"] for r in rows if "sample_hash" in r]
        assert len(steps) == len(set(steps)), "a step was done twice"
