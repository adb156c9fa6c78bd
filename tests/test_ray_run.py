"""Runs on a Ray cluster: the same bits as without Ray, resumed and interrupted; errors; the trainer as a library."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from elastic.observe.ledger import METRICS, gaps_and_doubles, kept_history, read_records
from elastic.storage import Storage
from jobs.bench.nodes import Command, LocalCluster, result
from jobs.digits import CONFIG, Digits
from tests.forked_command import ForkedCommand
from tests.ray_cluster import slow_job, undisturbed

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
STEPS = 40
JOB = (
    "--run.duration",
    f"{STEPS}st",
    "--run.exactness",
    "bitwise",
    "--batch.microbatches",
    "8",
    "--scaling.max-workers",
    "3",
    "--observe.log-every",
    "0.05",
)


def digits(cluster: LocalCluster, storage: Path, name: str, *options: str) -> Command:
    return ForkedCommand(
        "-m",
        "jobs.digits",
        "--cluster.address",
        cluster.address,
        "--run.storage",
        str(storage),
        "--run.name",
        name,
        *JOB,
        *options,
    )


def test_interrupted_and_resumed_at_another_size_a_run_has_the_bits_of_one_plain_process(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    # given a run in a world of three that is interrupted, after nobody reads its output any more
    run = digits(cluster, tmp_path, "run", "--scaling.min-workers", "3")
    run.wait_for_step(5)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), run.process.stdout.fileno())
    run.signal(signal.SIGTERM)
    assert run.wait() == 130, run.output
    assert "3 workers -> 3 rounds" in run.output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "stopped"
    assert 5 <= status["step"] < STEPS

    # when it is resumed in a world of two, with loader processes, to its end
    two = ("--scaling.min-workers", "2", "--scaling.max-workers", "2")
    last = digits(cluster, tmp_path, "run", *two, "--data.workers", "1")
    assert last.wait() == 0, last.output
    assert "2 workers -> 4 rounds" in last.output

    # then nothing was lost or counted twice, and the weights are those of the undisturbed run
    rows = read_records(Storage(str(tmp_path / "run")), METRICS)
    assert gaps_and_doubles(rows, 64) == []
    assert {row["world_size"] for row in kept_history(rows)} == {2, 3}
    sha = result(tmp_path / "run")["weights_sha256"]
    assert sha == undisturbed(Digits, CONFIG, tmp_path / "twin", "run", *JOB, steps=STEPS)
    assert sha in last.output
    assert str(tmp_path / "run") in last.output

    # and when it is started once more, it prints its result and trains nothing
    again = digits(cluster, tmp_path, "run")
    assert again.wait() == 0, again.output
    assert sha in again.output
    assert "world formed" not in again.output


def test_a_second_interrupt_ends_at_once(cluster: LocalCluster, tmp_path: Path) -> None:
    run = slow_job(cluster, tmp_path, "twice", "--run.duration", "100000st", "--scaling.max-workers", "1")
    run.wait_for_step(3)
    run.signal(signal.SIGINT)
    run.wait_for(lambda line: "saving and ending" in line or "run finished" in line)
    run.signal(signal.SIGINT)
    assert run.wait(60) == 130, run.output


def test_an_error_in_the_job_ends_the_run_with_its_traceback(cluster: LocalCluster, tmp_path: Path) -> None:
    """The job and its data are of a script, which neither workers nor their loader processes can import."""
    job = tmp_path / "bad_job.py"
    job.write_text(
        "from jobs.digits import Digits, Images\nimport elastic\n\n\n"
        "class Data(Images):\n    pass\n\n\n"
        "class Bad(Digits):\n"
        "    def train_data(self):\n        return Data(held_out=False)\n\n"
        "    def after_step(self, model, step):\n"
        "        print('about to fail')\n        raise ZeroDivisionError('on purpose')\n\n\n"
        "if __name__ == '__main__':\n    elastic.main(Bad)\n"
    )
    run = ForkedCommand(
        str(job),
        "--cluster.address",
        cluster.address,
        "--run.storage",
        str(tmp_path),
        "--run.name",
        "bad",
        "--scaling.max-workers",
        "1",
        "--data.workers",
        "1",
    )
    assert run.wait() == 1, run.output
    assert "ZeroDivisionError: on purpose" in run.output
    assert "failed at the update of step 1: ZeroDivisionError: on purpose" in run.output
    assert result(tmp_path / "bad")["status"] == "failed"
    (log,) = (tmp_path / "bad" / "logs").iterdir()
    said = re.findall(r"^\d{4}-\d\d-\d\d [\d:]+ \[rank 0, \w+\] about to fail$", log.read_text(), re.MULTILINE)
    assert len(said) == 4, "it is repeated three times, and Ray shows what is said again only once"


def test_the_trainer_works_inside_a_notebook(cluster: LocalCluster, tmp_path: Path) -> None:
    """A program without a file, whose job, data and collate function no other process can import."""
    cells = (
        "import ray, elastic\nfrom dataclasses import dataclass\n"
        "from jobs.digits import Digits, Images\n"
        "class Data(Images):\n    pass\n"
        "@dataclass\nclass Mine(Digits):\n"
        "    def train_data(self):\n        return Data(held_out=False)\n"
        "    def collate_fn(self, samples):\n        return samples\n"
        f"ray.init(address={cluster.address!r})\n"
        f"config = elastic.TrainConfig(run=elastic.RunOptions(storage={str(tmp_path)!r}, duration='3st'), "
        "scaling=elastic.ScalingOptions(max_workers=1), data=elastic.DataOptions(workers=1))\n"
        "result = elastic.ElasticTrainer(Mine(), config).fit()\n"
        "assert ray.is_initialized()\nprint('ENDED', result.status, result.steps, sorted(result.metrics))\n"
    )
    run = ForkedCommand("-c", cells)
    assert run.wait() == 0, run.output
    assert "ENDED finished 3 ['eval/accuracy', 'eval/loss']" in run.output
