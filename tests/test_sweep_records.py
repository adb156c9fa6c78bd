"""What a sweep writes down, ranks and reports; who may drive it; what Optuna suggests; and what a trial cost."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from dataclasses import replace
from typing import Any

import pytest

from elastic import cli
from elastic.config import BatchOptions, EvalOptions, RunOptions, TrainConfig, result_options
from elastic.errors import ConfigError
from elastic.job_file import load_job
from elastic.job_options import job_options
from elastic.run.process import identity
from elastic.storage import Storage
from elastic.sweep.command import parse, run
from elastic.sweep.config import SweepConfig
from elastic.sweep.folder import SweepFolder
from elastic.sweep.judge import Judge
from elastic.sweep.prepare import prepare_sweep, trial_table
from elastic.sweep.reports import write_plots, write_table, write_tensorboard
from elastic.sweep.suggest import Draws, Tpe
from elastic.tools.sweep_pictures import importance, scale, sweep_pictures
from elastic.tools.sweeps import TrialRecord, best_run, best_trial, collect, ranking, read_sweep
from tests.tiny_jobs import Plain


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """They set environment variables when they are first used: that is no leak of a test."""
    import sklearn.datasets  # noqa: F401
    import tensorboardX  # noqa: F401
    import torch

    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


SWEEP = SweepConfig(
    {"job.lr": "loguniform(1e-4,1e-1)", "job.width": "choice(8,16)"}, metric="eval/near/loss", trials=4, name="mine"
)


def config(tmp_path, **options: object) -> TrainConfig:
    return TrainConfig(
        run=RunOptions(storage=str(tmp_path), duration="12st"),
        batch=BatchOptions(global_size=20),
        eval=EvalOptions(every="3st"),
        **options,
    )


def claimed(tmp_path, **more: object) -> SweepFolder:
    folder = SweepFolder(Storage(str(tmp_path / "mine")))
    folder.claim(
        {"name": "mine", "metric": SWEEP.metric, "mode": "min", "fixed": SWEEP.fixed(), "result": {}, **more},
        take_over=False,
    )
    return folder


def end(judge: Judge, number: int, value: float | None, status: str = "finished", step: int = 12) -> None:
    metrics = {} if value is None else {SWEEP.metric: value}
    judge.ended(
        number,
        {
            "what": "ended",
            "status": status,
            "message": "",
            "step": step,
            "metrics": metrics,
            "weights_sha256": None,
            "seconds": 1.5,
            "cost": None,
        },
    )


def report(judge: Judge, number: int, evaluation: int, value: float | None, *, waits: bool = False) -> str:
    told = {"what": "report", "evaluation": evaluation, "step": 3 * evaluation, "metrics": {SWEEP.metric: value}}
    return judge.report(number, {**told, "waits": waits, "cost": None}, {0, 1, 2}, 3)


# ---- the sweep's folder --------------------------------------------------------------------------------------------


def test_a_judge_that_is_made_anew_knows_what_the_one_before_knew(tmp_path):
    folder, asha = (
        claimed(tmp_path),
        SweepConfig({"job.lr": "uniform(0,1)"}, metric=SWEEP.metric, trials=4, scheduler="asha", name="mine"),
    )
    judge = Judge(asha, folder, 9, lambda text: None)
    assert [judge.start_next() for _ in range(3)] == [0, 1, 2]
    assert report(judge, 1, 1, 0.5, waits=True) == "hold"  # for trial 0, which runs
    assert report(judge, 2, 1, None, waits=True) == "hold"
    assert judge.verdicts() == []
    assert report(judge, 0, 1, 0.1, waits=True) == ""
    assert [(n, v.do) for n, v in judge.verdicts()] == [(0, "go"), (1, "stop"), (2, "stop")]
    assert judge.release(1)
    assert not judge.release(1)
    end(judge, 1, 0.5, "stopped", 3)

    again = Judge(asha, folder, 9, lambda text: None)

    assert again.left == 3
    assert [again.start_next() for _ in range(3)] == [0, 2, 3]
    assert not again.no_more
    assert again.start_next() is None
    assert again.no_more
    assert report(again, 0, 1, 0.9, waits=True) == ""  # what was heard first counts
    assert [(n, v.do, v.until) for n, v in again.verdicts()] == [(0, "go", 3)]
    trials = folder.trials(asha.metric, "min")
    assert [(t.status, t.evaluations, t.value) for t in trials] == [
        ("running", 1, 0.1),
        ("stopped", 1, 0.5),
        ("running", 1, None),
        ("running", 0, None),
    ]
    assert [len(t.verdicts) for t in trials] == [1, 1, 1, 0]


def test_a_metric_or_a_rule_that_no_evaluation_has_is_refused_at_the_first_one(tmp_path):
    folder, ruled = claimed(tmp_path), replace(SWEEP, stop=("eval/accuracy>=1",))
    known, unknown, by_rule = (
        Judge(sweep, folder, 9, lambda text: None) for sweep in (SWEEP, replace(SWEEP, metric="eval/nosuch"), ruled)
    )

    for judge in (known, unknown, by_rule):
        judge.start_next()
        report(judge, 0, 1, None)  # its value is not finite

    assert known.refused == ""
    ending = "but evaluations have eval/near/loss; give one of these, with another --sweep.name"
    assert unknown.refused == f"--metric is 'eval/nosuch', {ending}"
    assert by_rule.refused == f"--stop is 'eval/accuracy>=1', {ending}"


def test_a_trial_that_waits_for_one_without_a_place_gives_up_its_own(tmp_path):
    bands = SweepConfig({"job.lr": "uniform(0,1)"}, metric=SWEEP.metric, trials=9, scheduler="hyperband", name="mine")
    judge = Judge(bands, claimed(tmp_path), 9, lambda text: None)
    for _ in range(3):
        judge.start_next()

    assert report(judge, 0, 1, 0.1, waits=True) == "rest"
    judge.rests(0)
    assert judge.ready() == []
    for number in range(1, 9):
        report(judge, number, 1, float(number), waits=True)

    assert judge.ready() == [0]
    judge.give_up("over")  # of nine that were to be, three had begun
    assert judge.ready() == []
    assert judge.left == 6
    judge.closing = True
    assert judge.start_next() is None
    assert judge.no_more


def test_two_drivers_of_one_sweep_are_refused_until_one_is_known_to_be_gone(tmp_path):
    folder = claimed(tmp_path)

    with pytest.raises(ConfigError, match=r"sweep .*mine is being driven by .*--take-over"):
        claimed(tmp_path)
    SweepFolder(Storage(str(tmp_path / "mine"))).claim({"name": "mine"}, take_over=True)
    values = json.loads((tmp_path / "mine" / "sweep.json").read_text())
    assert values["epoch"] == 2
    (tmp_path / "mine" / "sweep.json").write_text(json.dumps({**values, "owner_process": {**identity(), "started": 1}}))
    claimed(tmp_path)
    assert len(list((tmp_path / "mine" / "drivers").iterdir())) == 3
    folder.close()


def test_a_newer_format_is_refused(tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps({"format": 9}))

    with pytest.raises(ConfigError, match="has format 9, this version reads 1"):
        read_sweep(Storage(str(tmp_path)))


# ---- ranking and reports -------------------------------------------------------------------------------------------


def ended(tmp_path) -> SweepFolder:
    folder = claimed(tmp_path)
    judge = Judge(SWEEP, folder, 4, lambda text: None)
    for number, (value, status) in enumerate(
        [(0.3, "finished"), (0.1, "stopped"), (None, "failed"), (0.2, "finished")]
    ):
        assert judge.start_next() == number
        for evaluation in (1, 2):
            report(judge, number, evaluation, (value or 9.0) + 1 / evaluation)
        end(judge, number, value, status)
    return folder


def test_trials_are_ranked_by_their_last_value_and_failed_ones_are_last(tmp_path):
    trials = ended(tmp_path).trials(SWEEP.metric, "min")

    assert [t.number for t in ranking(trials, "min")] == [1, 3, 0, 2]
    assert [t.number for t in ranking(trials, "max")] == [0, 3, 1, 2]
    assert best_trial(trials, "min").run == "mine-0001"
    assert best_trial(trials[2:3], "min") is None
    assert trials[0].best == 0.3
    assert trials[2].best == pytest.approx(9.5)


def test_lines_that_a_killed_driver_left_twice_count_once(tmp_path):
    folder = ended(tmp_path)
    lines = folder.lines()

    assert collect(lines + lines, SWEEP.metric, "min") == collect(lines, SWEEP.metric, "min")


def test_report_shows_the_ranking_and_export_asks_for_the_best(tmp_path, capsys):
    folder, url = ended(tmp_path), str(tmp_path / "mine")
    with pytest.raises(ConfigError, match="no trial has ended yet"):
        best_run(url)
    folder.update(status="finished", best={"run": "mine-0001", "step": 12})

    assert cli.main(["report", url]) == 0
    shown = capsys.readouterr().out
    assert shown.index("mine-0001") < shown.index("mine-0003") < shown.index("mine-0000") < shown.index("mine-0002")
    assert "finished, 4 of 4 trials, 48 steps; random, no scheduler" in shown
    assert best_run(url) == (f"{url}/mine-0001", 12)
    assert best_run(str(tmp_path)) is None
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "which is no run" in capsys.readouterr().err


def test_a_sweep_whose_driver_is_gone_is_lost(tmp_path, capsys):
    folder = ended(tmp_path)
    folder.update(heartbeat_was=time.time())
    values = json.loads((tmp_path / "mine" / "sweep.json").read_text())
    (tmp_path / "mine" / "sweep.json").write_text(json.dumps({**values, "heartbeat": time.time() - 1000}))

    assert cli.main(["report", str(tmp_path / "mine"), "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["sweep"]["status"] == "lost"


def test_table_plots_and_tensorboard_are_written(tmp_path):
    trials, storage = ranking(ended(tmp_path).trials(SWEEP.metric, "min"), "min"), Storage(str(tmp_path / "out"))
    names = list(SWEEP.space)

    write_table(storage, trials, names, SWEEP.metric)
    write_tensorboard(storage, trials, names, SWEEP.metric)
    problem = write_plots(storage, "mine", trials, SWEEP.space, SWEEP.metric, "min")

    rows = list(csv.DictReader(io.StringIO(storage.read("trials.csv").decode())))
    assert [r["trial"] for r in rows] == [t.run for t in trials]
    assert float(rows[0]["job.lr"]) == trials[0].options["job.lr"]
    assert problem is None
    for name in ("objective.png", "curves.png", "slices.png"):
        assert storage.read(name)[:4] == b"\x89PNG"
    hparams = b"".join(p.read_bytes() for p in (tmp_path / "out" / "tensorboard" / "mine-0001").iterdir())
    assert b"job.lr" in hparams
    assert b"eval/near/loss" in hparams


def trial(number: int, value: float | None, status: str = "finished", **options: Any) -> TrialRecord:
    return TrialRecord(number, f"mine-{number:04}", options, options, status, value=value)


def test_an_option_matters_that_puts_trials_in_order_even_if_its_best_is_in_the_middle():
    trials = [trial(n, abs(n - 12) + 0.01 * n, lr=0.1 * n, useless=(7 * n) % 5, word="ab"[n % 2]) for n in range(24)]

    found = importance(trials, ["lr", "useless", "word", "absent"])

    assert found is not None
    assert found["lr"] > 0.6
    assert max(found["useless"], found["word"]) < 0.1
    assert found["absent"] == 0.0
    assert importance(trials[:3], ["lr"]) is None


def test_an_outlier_does_not_set_the_scale():
    assert scale([]) is None
    assert scale([math.nan]) is None
    low, high = scale([1.0, 1.1, 1.2, 1.3, 900.0]) or (0, 0)
    assert low < 1.0
    assert 1.3 < high < 2.0


def test_a_sweep_is_drawn_while_it_runs_with_failed_trials_and_without_any(tmp_path, capsys):
    ended(tmp_path)
    assert cli.main(["report", str(tmp_path / "mine"), "--plots", str(tmp_path / "plots")]) == 0
    assert "written: " in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["curves.png", "objective.png", "slices.png"]
    for trials in ([], [trial(0, None, "failed", lr=0.1)], [trial(n, 1.0, lr=0.1) for n in range(5)]):
        for draw in sweep_pictures("mine", trials, {"lr": "loguniform(0.01, 1)"}, "loss", "min").values():
            assert draw().startswith(b"\x89PNG")
    assert cli.main(["report", str(tmp_path / "mine"), "--html", "x.html"]) == 2


# ---- before anything starts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sweep", "options", "says"),
    [
        ({}, {"run": RunOptions(name="x")}, "named by --sweep.name"),
        ({}, {"run": RunOptions(stop_after="1st")}, "--time-budget or --stop"),
        ({"scheduler": "asha"}, {"eval": EvalOptions()}, "needs evaluations"),
        ({"stop": ("eval/near/loss<=1",)}, {"eval": EvalOptions()}, "needs evaluations"),
        ({"cost_budget": 1.0}, {}, "give --observe.price"),
        ({"search": {"job.high": "uniform(0,1)"}}, {}, "no option of this job"),
        ({"scheduler": "asha", "grace_period": 4}, {}, "none would be compared"),
        ({"search": {"batch.global-size": "choice(20,1000)"}, "trials": 20}, {}, "a trial would have --batch"),
        (
            {"search": {"batch.global-size": "choice(10,20)"}, "trials": 20, "scheduler": "asha"},
            {"run": RunOptions(duration="100st"), "eval": EvalOptions(every="3ep")},
            "compares trials by",
        ),
        ({"name": "x" * 95}, {}, "at most 90"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_in_one_sentence(tmp_path, sweep, options, says):
    known = {"search": SWEEP.search, "metric": SWEEP.metric, "trials": 4, "name": "mine"}

    with pytest.raises(ConfigError, match=says) as caught:
        prepare_sweep(Plain(), replace(config(tmp_path), **options), SweepConfig(**{**known, **sweep}))

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mine").exists()


def test_a_changed_sweep_is_refused_and_a_finished_one_known(tmp_path):
    prepared = prepare_sweep(Plain(), config(tmp_path), SWEEP)
    assert not prepared.finished
    assert prepared.total == 4
    assert "--search job.lr=loguniform(0.0001, 0.1)" in trial_table(prepared)
    folder = claimed(tmp_path, result={"job.samples": 100, "run.seed": 0})

    for other, says in (
        (replace(SWEEP, seed=1), "--sweep.seed is 1, but sweep mine was started with 0"),
        (replace(SWEEP, trials=5), "--trials is 5, but sweep mine was started with 4"),
        (replace(SWEEP, search={"job.lr": "uniform(0,1)"}), "--search is"),
        (SWEEP, "--batch.global-size is 20, but sweep mine was started with 64"),
    ):
        with pytest.raises(ConfigError, match=says):
            prepare_sweep(Plain(), config(tmp_path), other)
    folder.update(status="finished", result=result_options(config(tmp_path), job_options(Plain())))
    assert prepare_sweep(Plain(), config(tmp_path), SWEEP).finished


def test_the_command_line_is_that_of_the_sweep_and_of_the_job(capsys):
    job, options, sweep = parse(
        [
            "--job",
            "jobs.digits",
            "--search",
            "job.lr=uniform(0,1)",
            "--trials",
            "3",
            "--job.width",
            "4",
            "--eval.every=1ep",
            "--stop",
            "eval/accuracy>=0.9",
            "--sweep.name",
            "x",
            "--tpe-batch",
            "2",
        ]
    )

    assert (job.width, options.eval.every, sweep.trials, sweep.name, sweep.batch) == (4, "1ep", 3, "x", 2)
    assert sweep.stop == ("eval/accuracy>=0.9",)
    for line, says in (
        (["--job", "jobs.nothing", "--search", "job.lr=uniform(0,1)"], "cannot be imported"),
        (["--job", "tests.tiny_jobs", "--search", "job.lr=uniform(0,1)"], "give one of"),
        (["--job", "jobs.digits"], "something to search"),
        (["--job", "jobs.digits", "--search", "job.rl=uniform(0,1)"], "did you mean 'job.lr'"),
    ):
        assert run(line) == 2
        assert says in capsys.readouterr().err
    assert load_job("tests.tiny_jobs:Plain")[0] is Plain


# ---- Optuna, and money ---------------------------------------------------------------------------------------------


def test_tpe_suggests_from_batches_alone_and_learns():
    space = {
        "job.lr": "loguniform(1e-4,1)",
        "job.width": "randint(1,9)",
        "job.kind": "choice(a,b)",
        "optim.final-lr": "quniform(0,1,0.25)",
    }
    sweep = SweepConfig(space, searcher="tpe", trials=40, batch=4, seed=3)

    def values(options: dict) -> float:
        return abs(options["job.lr"] - 0.01) + (options["job.kind"] == "b")

    known: dict[int, float | None] = {}
    one, found = Tpe(sweep), []
    for number in range(40):
        assert one.needs(number) == range(number // 4 * 4)
        found.append(one.options(number, {n: known[n] for n in one.needs(number)}))
        known[number] = None if number == 5 else values(found[-1])

    assert [Tpe(sweep).options(n, known) for n in (0, 7, 39)] == [found[0], found[7], found[39]]
    assert all(type(o["job.width"]) is int and 1 <= o["job.width"] < 9 for o in found)
    assert {o["optim.final-lr"] for o in found} <= {0.0, 0.25, 0.5, 0.75, 1.0}
    late, early = (sum(values(o) for o in part) for part in (found[20:], found[:20]))
    assert late < 0.6 * early
    assert Draws(sweep).needs(30) == range(0)
