"""Jobs by the name of their file, and what is done with a run afterwards: its model back in Python, an evaluation."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch

import elastic
from elastic import cli
from elastic.errors import CheckpointError, ConfigError
from elastic.job import source_hash
from elastic.job_file import load_job
from elastic.sweep.command import parse
from elastic.worker.weights import weights_sha256
from tests.forked import LONG, WAIT_S, fork
from tests.tiny_jobs import Everything, Plain

HEAD = """
import helper, elastic
from elastic import TrainConfig, RunOptions
class One(elastic.Job):
    pass
class Two(elastic.Job):
    pass
"""
CONFIG = "TrainConfig(run=RunOptions(seed=5))"
ENDS = {
    "guarded": f"if __name__ == '__main__':\n    elastic.main(Two, {CONFIG})\n    raise AssertionError",
    "bare": f"elastic.main(Two, {CONFIG})",
    "argument": f"elastic.main(config={CONFIG}, job_class=Two)",
    "trainer": f"elastic.ElasticTrainer(Two(), {CONFIG}).fit()",
}


@pytest.fixture
def own_program(monkeypatch, tmp_path):
    """The process's program and search path are as before, whatever becomes of them."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "helper.py").write_text("")
    yield
    sys.modules.pop("helper", None)


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "a job.py"
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize("end", ENDS)
def test_a_file_is_asked_for_the_job_that_it_would_train(end, own_program, tmp_path):
    job_class, config = load_job(written(tmp_path, HEAD + ENDS[end]))

    assert (job_class.__name__, config.run.seed) == ("Two", 5)
    assert source_hash(job_class()) is not None


def test_of_a_file_that_trains_nothing_the_job_that_is_named(own_program, tmp_path):
    file = written(tmp_path, HEAD + f"CONFIG = {CONFIG}")

    assert load_job(f"{file}:One")[0].__name__ == "One"
    assert load_job(f"{file}:Two")[1].run.seed == 5
    with pytest.raises(ConfigError, match=r"where there are 2 jobs; give one of: .*job\.py:One, .*job\.py:Two"):
        load_job(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [("def", "which is no Python: invalid syntax"), ("\0", "which is no Python"), ("", "0 jobs; give one of: none")],
)
def test_a_file_that_has_no_job_is_refused(text, said, own_program, tmp_path):
    with pytest.raises(ConfigError, match=said):
        load_job(written(tmp_path, text))
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\)"):
        load_job("nowhere.py")


def test_a_sweep_takes_a_file_with_its_defaults(own_program, tmp_path, capsys):
    file = written(tmp_path, HEAD + ENDS["guarded"])

    job, config, sweep = parse([file, "--search", "run.seed=choice(1,2)", "--trials", "2", "--batch.global-size", "6"])

    assert (type(job).__name__, config.run.seed, config.batch.global_size, sweep.trials) == ("Two", 5, 6, 2)
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: elastic sweep JOB --search NAME=KIND(values)")


# ---- a run that ended ----------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_the_model_of_a_run_comes_back(undisturbed_epoch):
    ran, url = undisturbed_epoch, undisturbed_epoch.storage.url
    states = random.getstate(), torch.get_rng_state()

    model = elastic.load_model(Everything, url)

    assert (random.getstate(), torch.get_rng_state().tolist()) == (states[0], states[1].tolist())
    assert weights_sha256(model) == ran.sha
    assert not any(module.training for module in model.modules())
    assert weights_sha256(elastic.load_model(Everything(samples=LONG), url)) == ran.sha
    with pytest.raises(CheckpointError, match="model"):
        elastic.load_model(Plain(), url)
    with pytest.raises(ConfigError, match="--step is 1, but"):
        elastic.load_model(Everything, url, step=1)


def _evaluate(arguments: list[str], said: str, folder: str) -> None:
    os.chdir(folder)
    sys.stdout = sys.stderr = open(said, "w")  # noqa: SIM115 - closed by the end of the process
    code = cli.main(["evaluate", *arguments])
    sys.stdout.flush()
    os._exit(code)


@pytest.mark.processes
def test_a_run_is_evaluated_as_it_did_it_itself(undisturbed_epoch, tmp_path):
    storage = Path(undisturbed_epoch.storage.url)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(storage)
    job = ["--job", "tests.tiny_jobs:Everything"]
    cases = {
        "same": ["mine", *job, "--json"],
        "other": [str(storage), *job, "--job.width", "3"],
        "option": ["mine", *job, "--run.seed", "4"],
        "nothing": ["mine2", *job],
    }
    processes = {name: fork(_evaluate, line, str(tmp_path / name), str(tmp_path)) for name, line in cases.items()}
    for process in processes.values():
        process.join(WAIT_S)
    said = {name: (tmp_path / name).read_text() for name in cases}

    assert {name: process.exitcode for name, process in processes.items()} == {
        "same": 0,
        "other": 1,
        "option": 2,
        "nothing": 2,
    }, said
    metrics = undisturbed_epoch.result["metrics"]
    assert json.loads(said["same"]) == {"format": 1, "step": undisturbed_epoch.result["steps"], **metrics}
    assert said["other"].startswith("error: ")
    assert "--run.seed is no option of the job" in said["option"]
    assert "URL is 'mine2', which is no run" in said["nothing"]
