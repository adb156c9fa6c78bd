"""The account of real runs in plain processes: nothing is left unexplained, and a run that may cost no more pauses."""

from __future__ import annotations

import math

import pytest

from elastic.run import keeper
from elastic.run.accounts import account_of_run
from tests.forked import configure, fault, train
from tests.tiny_jobs import Everything

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server"), pytest.mark.timeout(120)]


def test_a_run_that_lost_a_worker_goes_on_pauses_at_its_most_cost_and_accounts_for_every_second(tmp_path, monkeypatch):
    monkeypatch.setattr(keeper, "HEARTBEAT_S", 0.1)
    options = {"run__duration": "100000st", "observe__price": ("node=7200/h", "3600"), "eval__every": "2st"}

    limited = configure(tmp_path, "run", **options, run__stop_after="8st")
    first = train(Everything(), limited, 2, faults=[fault("step.forward", step=4, rank=1)])
    most = round(first.result["cost"] + 1, 2)  # a second of a worker more
    paused = train(Everything(), configure(tmp_path, "run", **options, run__max_cost=most), 2)

    assert first.failure is paused.failure is None
    assert first.result["steps"] == 8
    assert paused.result["status"] == "stopped"
    assert paused.result["message"].startswith(f"paused by --run.max-cost {most}: the run has cost ")
    assert paused.result["steps"] >= 8

    found = account_of_run(paused.run.folder)
    assert math.fsum(found.seconds.values()) == pytest.approx(found.whole_s)
    assert found.cost == pytest.approx(found.whole_s), "the price of a worker is 1 a second"
    assert paused.result["cost"] == pytest.approx(found.cost, abs=1e-4)
    assert paused.result["cost"] > most > first.result["cost"] > 0
    assert found.seconds["unknown"] == found.seconds["left_over"] == found.seconds["under_way"] == 0
    named = ("startup/data", "startup/model", "productive", "evaluation", "sync", "detect", "form", "restore", "ending")
    assert all(found.seconds[cause] > 0 for cause in named), found.seconds
    lost, restarted = found.interruptions
    assert (lost.kind, lost.generation, len(lost.members)) == ("lost", "1-2", 1)
    assert 0 <= lost.step <= 3, "the newest step of which a row had come"
    assert lost.cost > 0
    assert (restarted.kind, restarted.generation) == ("restarted", "2-1")
