"""Runs with random options in which random things happen: the bits, the evaluations and the samples are always those of
a run to which nothing happened. `RANDOM_FAULTS=0:500 python -m pytest tests/test_random_faults.py` tries more of them.
"""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from elastic.errors import RunFailed
from elastic.run.prepare import prepare
from tests import mishaps
from tests.forked import LONG, STDOUT, WAIT_S, Ran, Watch, configure, fault, local_run, plan, train
from tests.fresh import seeds
from tests.mishaps import Happening, Mishap, Output
from tests.nccl_manners import Manners
from tests.test_bits import assert_same_training
from tests.tiny_jobs import Everything, Talking

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server"), pytest.mark.timeout(240)]

POINTS = [
    "step.forward",
    "step.reduce",
    "step.before_fence",
    "step.after_fence",
    "eval.begin",
    "checkpoint.before_stage",
    "checkpoint.staged",
    "checkpoint.before_report",
    "world.assigned",
    "world.connected",
    "state.moving",
    "snapshot.begin",
    "snapshot.staged",
    "snapshot.kept",
    "snapshot.sent",
    "snapshot.complete",
    "snapshot.reading",
]


def draw(seed: int, folder: Path) -> tuple[int, dict[str, Any], list[dict[str, Any]], list[Mishap], int]:
    """Workers to start, options, what happens inside and outside, and how many of those that are lost are replaced."""
    r = random.Random(seed)
    strategy = r.choice(["ddp", "ddp", "fsdp", "hsdp"])
    most = 4 if strategy == "hsdp" else r.choice([2, 3, 4])
    spares = r.choice([0, 0, 1])
    options = {
        "parallel__strategy": strategy,
        "scaling__max_workers": most,
        "scaling__spares": spares,
        "scaling__min_workers": r.choice([1, 1, 2, most]),
        "scaling__workers_per_node": 2 if strategy == "hsdp" else 1,
        "recovery__max_wait": r.choice(["0.3s", "2s"]),
        "checkpoint__every": r.choice([None, "2st", "3st", "5st"]),
    }
    if strategy != "ddp":
        options["recovery__snapshot_every"] = r.choice([None, "1st", "3st", "4st"])
    faults = []
    for number in range(r.choice([1, 2, 3, 4])):
        do = r.choice(["kill"] * 6 + ["sleep", "lock", "raise"])
        point = "step.forward" if do == "raise" else r.choice(POINTS)
        step, rank = r.choice([None, *range(1, 13)]), r.choice([None, *range(most)])
        more = {"seconds": r.choice([0.05, 0.3])} if do in ("sleep", "lock") else {}
        faults.append(fault(point, step, rank, do, only=folder / f"fault-{number}", **more))
    outside = [mishaps.draw(r) for _ in range(r.choice([0, 1, 1, 2]))]
    options["data__workers"] = int(any(m.what == "a loader process dies" for m in outside))  # they start slowly
    return most + spares, {k: v for k, v in options.items() if v is not None}, faults, outside, r.choice([0, 0, 1, 2])


@pytest.fixture(scope="module")
def alone(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One worker, to which nothing happens."""
    return train(Everything(samples=LONG), configure(tmp_path_factory.mktemp("alone"), "run", eval__every="3st"), 1)


@pytest.mark.parametrize("seed", seeds(range(40, 52), fresh=12, variable="RANDOM_FAULTS"))
def test_whatever_happens(seed: int, alone: Ran, tmp_path: Path) -> None:
    _go_through(seed, alone, tmp_path, {})


@pytest.mark.parametrize("seed", seeds(range(52, 54), fresh=6, variable="RANDOM_FAULTS"))
def test_whatever_happens_over_nccl(seed: int, alone: Ran, tmp_path: Path) -> None:
    creation = ["freeable", "blocks"][seed % 2]
    _go_through(seed, alone, tmp_path, Manners(create_s=0.02, creation=creation).environment())


def _go_through(seed: int, alone: Ran, tmp_path: Path, environment: dict[str, str]) -> None:
    """A run that ends, because too few workers are left, is started again."""
    workers, options, faults, outside, more = draw(seed, tmp_path)
    ends: list[str] = []
    while True:
        watch = Watch()
        run = prepare(Talking(samples=LONG), configure(tmp_path, "run", eval__every="3st", **options))
        told = {**environment, **plan(*faults), STDOUT: ["/dev/null", "/dev/full"][seed % 2]}
        with (
            closing(Output(watch)) as output,
            local_run(run, workers, on_record=output, environment=told, own_host={}) as local,
        ):
            try:
                with Happening(local, watch, output, tmp_path / "run", outside, more).going_on():
                    local.wait(WAIT_S)
                break
            except RunFailed as error:
                ends.append(str(error))
        assert len(ends) <= len(faults) + len(outside), ends
        faults, outside = [], []

    found = Ran(run, None)
    assert_same_training(found, alone)
    assert found.evaluations == alone.evaluations
