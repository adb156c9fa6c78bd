"""Callbacks hear of a run in its driver: each record once, whatever is done again, and whatever they do themselves."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import elastic
from elastic.errors import ConfigError
from elastic.observe.callbacks import figures, need
from elastic.observe.ledger import METRICS
from elastic.run import telling
from elastic.run.prepare import prepare
from elastic.run.telling import Marks, Telling, is_told, kind_of
from elastic.storage import Storage
from elastic.worker.sampling import parted, png
from tests import surface_jobs
from tests.forked import configure, fault, train
from tests.surface_jobs import Recorder, Told

ROW = {"sample_hash": "0", "time": 1.0, "generation": "1-1", "loss": 0.5, "skipped": True}


def heard(kind: str) -> list:
    return [values for _, method, values in surface_jobs.HEARD if method == kind]


@pytest.fixture(autouse=True)
def nothing_heard():
    surface_jobs.HEARD.clear()
    surface_jobs.Rows.steps.clear()
    surface_jobs.RELEASED.clear()
    yield
    surface_jobs.RELEASED.set()


@given(st.lists(st.integers(1, 9)))
def test_a_step_is_told_once_and_in_order(steps):
    marks, told = Marks(), []

    for step in steps:
        if not is_told(marks, {"step": step, **ROW}):
            told.append(step)
            marks = marks.after("row", step)

    assert told == sorted(set(told))
    assert not steps or told[-1] == max(steps)
    assert kind_of({"step": 1, "eval/loss": 1}) == "eval"
    assert not is_told(marks, {"step": 1, "eval/loss": 1})


def test_rows_that_did_not_come_are_taken_from_the_ledger(tmp_path):
    storage, said = Storage(str(tmp_path)), []
    storage.append(METRICS, b"".join(json.dumps({"step": s, **ROW}).encode() + b"\n" for s in (1, 2, 3, 4)))
    told = Telling([Recorder(), surface_jobs.Rows()], storage, {}, lambda *what: said.append(what), said.append)

    for step in (1, 4, 4):
        told.hear({"step": step, **ROW})
    told.close()

    assert surface_jobs.Rows.steps == [1, 2, 3, 4]
    assert json.loads(storage.read(telling.MARKS)) == {"row": 4, "eval": -1, "sample": -1}
    assert said == []


def test_a_callback_that_hangs_is_waited_for_and_left(tmp_path):
    said: list = []
    told = Telling([surface_jobs.Slow()], Storage(str(tmp_path)), {}, lambda *what: None, said.append)

    told.hear({"step": 1, **ROW})
    told.close(timeout_s=0.1)

    assert said == ["warning: callback Slow was waited for 0.1 s and is left alone"]
    surface_jobs.RELEASED.set()
    for thread in threading.enumerate():
        if thread.name.startswith("callback"):
            thread.join(10)


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_each_record_is_told_once_in_the_driver_though_steps_are_done_again(tmp_path):
    """One callback fails, another hangs until the run has ended. All workers are lost after step 7, of which 4 are
    saved, and another command goes on."""
    options = {"eval__every": "6st", "eval__sample_every": "3st"}
    config = configure(tmp_path, "run", **options, run__allow_change=("job.gate",))

    train(Told(), configure(tmp_path, "run", **options, run__stop_after="4st"), workers=2)
    first = train(Told(gate=str(tmp_path / "gate")), config, workers=2, faults=[fault("step.before_fence", step=8)])
    ends, told = [end["status"] for end in heard("end")], surface_jobs.Rows.steps[:]
    second = train(Told(), config, workers=1)

    assert ends == ["stopped", "failed"]
    assert told in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7])
    assert surface_jobs.Rows.steps == list(range(1, 13))
    assert sorted(r["step"] for r in second.rows if "sample_hash" in r) == sorted([*range(1, 13), *told[4:]])
    assert {pid for pid, *_ in surface_jobs.HEARD} == {os.getpid()}
    assert [run["total_steps"] for run in heard("start")] == [12, 12, 12]
    assert heard("start")[0]["options"]["run.exactness"] == "bitwise"
    assert [row["step"] for row in heard("eval")] == [4, 6, 12]
    assert [e["step"] for e in heard("checkpoint")] == [4, 12]
    assert [s["step"] for s in heard("sample")] == [3, 6, 9, 12]
    assert heard("sample")[0]["text"] == "step 3 False"
    assert heard("sample")[0]["weights"].startswith(b"\x89PNG")
    assert {"restored", "world_formed", "run_started"} <= {e["kind"] for e in heard("event")}
    assert heard("end")[-1]["result"]["weights_sha256"] == second.sha
    assert second.result["sample"] == "step 12 False"
    warned = [e["detail"] for e in first.events("callback_failed")]
    assert {one["callback"] for one in warned} == {"Broken"}
    assert "no route to the tracker" in warned[0]["why"]


def test_what_callbacks_returns_is_looked_at_before_anything_starts(tmp_path):
    class Wrong(Told):
        def callbacks(self):
            return [Recorder]

    with pytest.raises(ConfigError, match=r"callbacks\(\) returned the class Recorder; give instances"):
        prepare(Wrong(), configure(tmp_path, None))
    with pytest.raises(ConfigError, match=r"elastic\.X needs the package no_such, which is not installed; install it"):
        need("no_such", "elastic.X")


def test_json_lines_hold_all_that_is_told(tmp_path):
    lines = elastic.JSONLines(tmp_path / "log" / "run.jsonl")

    lines.on_start({"run": "r"})
    lines.on_row({"step": 1, "loss": float("nan")})
    lines.on_sample(1, {"a": "text", "b": b"png"})
    lines.on_end({"status": "finished"})

    found = [json.loads(line) for line in (tmp_path / "log" / "run.jsonl").read_text().splitlines()]
    assert [one["is"] for one in found] == ["start", "row", "sample", "end"]
    assert found[1]["loss"] is None
    assert found[2]["sample"] == {"a": "text", "b": "3 bytes of PNG"}


class Tracker:
    """Stands in for wandb and for a client of MLflow: keeps what is called."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **named):
            self.calls.append((name, args, named))
            return {"search_runs": [], "get_experiment_by_name": None}.get(name, self)

        return call


def test_trackers_get_figures_by_step_samples_and_the_end(monkeypatch):
    tracker = Tracker()
    tracker.info = SimpleNamespace(run_id="id")
    tracker.summary = {}
    modules = {
        "wandb": SimpleNamespace(init=tracker.init, Image=lambda path: "image", Html=str),
        "mlflow": SimpleNamespace(),
        "mlflow.tracking": SimpleNamespace(MlflowClient=lambda uri: tracker),
        "mlflow.entities": SimpleNamespace(Metric=lambda *values: values),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("elastic.observe.callbacks.importlib.util.find_spec", lambda name: name)
    run = {"run": "r", "folder": "/runs/r", "total_steps": 2, "options": {"job.lr": 0.1}}
    row = {"step": 1, **ROW}

    for one in (elastic.WandB("p", mode="offline"), elastic.MLflow("e", "file:/x")):
        one.on_start(run)
        one.on_row(row)
        one.on_sample(1, {"t": "a < b", "p": b"png"})
        one.on_end({"status": "finished", "result": {"status": "finished", "steps": 2}})

    calls = [name for name, *_ in tracker.calls]
    assert calls == [
        *("init", "log", "log", "finish"),
        *("get_experiment_by_name", "create_experiment", "search_runs", "create_run", "log_param"),
        *("log_batch", "log_text", "log_artifact", "set_terminated"),
    ]
    assert tracker.calls[1][1:] == (({"train/loss": 0.5},), {"step": 1})
    assert tracker.calls[2][1] == ({"sample/t": "<pre>a &lt; b</pre>", "sample/p": "image"},)
    assert tracker.calls[9][1] == ("id", [("train/loss", 0.5, 1000, 1)])
    assert tracker.summary["steps"] == 2
    assert figures(row) == {"train/loss": 0.5}


def test_mlflow_has_one_run_on_a_local_folder_however_often_it_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which newer ones ask of those who want a folder
    from mlflow.tracking import MlflowClient

    uri = (tmp_path / "mlruns").as_uri()
    run = {"run": "mine", "folder": "/runs/mine", "total_steps": 2, "options": {"job.lr": 0.1}}
    for step, status in ((1, "stopped"), (2, "finished")):  # paused, and resumed by another command
        one = elastic.MLflow("digits", uri)
        one.on_start(run)
        one.on_row({**ROW, "step": step, "loss": 1.0 / step, "time": float(step)})
        one.on_eval({"step": step, "time": float(step), "generation": "1-1", "eval/loss": 2.0})
        one.on_sample(step, {"text": "it works", "picture": b"png"})
        one.on_end({"status": status, "result": {"status": status, "steps": step}})

    client = MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert (found.info.run_name, found.info.status, found.data.params) == ("mine", "FINISHED", {"job.lr": "0.1"})
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(metric.step, metric.value, metric.timestamp) for metric in history] == [(1, 1.0, 1000), (2, 0.5, 2000)]
    assert found.data.metrics["eval/loss"] == 2.0
    names = {artifact.path for artifact in client.list_artifacts(found.info.run_id, "samples/00000002")}
    assert names == {"samples/00000002/text.txt", "samples/00000002/picture.png"}


def test_pictures_are_png_of_the_given_values():
    from PIL import Image

    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for values, expected in (
        (grey, grey),
        (torch.full((2, 3, 3), 0.5, dtype=torch.bfloat16), np.full((2, 3, 3), 128, np.uint8)),
        (np.full((1, 2, 4), 7, np.uint8), np.full((1, 2, 4), 7, np.uint8)),
    ):
        shown = np.asarray(Image.open(io.BytesIO(png(values, "p"))))
        assert shown.tolist() == expected.tolist()
    for wrong in (np.zeros((2, 2, 2), np.uint8), np.zeros(3), np.zeros((2, 2), np.int64)):
        with pytest.raises(ConfigError, match=r"sample\(\)\['p'\] is .*; give a picture as uint8"):
            png(wrong, "p")
    assert parted("text") == ({"sample": "text"}, {})
    assert parted({"n": 3}) == ({"n": "3"}, {})
    with pytest.raises(ConfigError, match=r"sample\(\)\['n'\] is a list; return a text, or a picture"):
        parted({"n": [3]})
