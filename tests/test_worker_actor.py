"""The actor of a worker, without Ray: how its function ends, and what a job is told that asks Ray Train."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic.cluster.worker_actor import Placed, WorkerActor, WorkerStatus, _AtImport
from elastic.errors import RunFailed
from tests.forked import wait_until

PLACED = Placed("mine", 2, {"CPU": 1.0})


class Here:
    """Looks like a function in Ray's object store."""

    def __init__(self, function: Callable[[], Any]):
        self._function = function

    def get(self) -> Callable[[], Any]:
        return self._function


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Placed]:
    """What is told when a module that stands in for Ray Train is imported."""
    told: list[Placed] = []
    (tmp_path / "stands_in.py").write_text("loaded = True")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "stands_in", raising=False)
    monkeypatch.setattr(_AtImport, "NAME", "stands_in")

    def tell(hook: _AtImport) -> None:
        assert sys.modules["stands_in"].loaded
        told.append(hook._placed)

    monkeypatch.setattr(_AtImport, "tell", tell)
    return told


def ended(function: Callable[[], Any]) -> WorkerStatus:
    actor = WorkerActor()
    assert actor.status() == WorkerStatus(running=True)
    actor.begin(Here(function), PLACED)  # type: ignore[arg-type]
    wait_until(lambda: not actor.status().running, "the end of a function")
    return actor.status()


def test_the_end_of_a_function_shows_in_the_status(named: list[Placed]) -> None:
    def fail(error: BaseException) -> Callable[[], str]:
        def run() -> str:
            raise error

        return run

    assert ended(lambda: "finished") == WorkerStatus(running=False, returned="finished")
    assert ended(fail(RunFailed("for people"))) == WorkerStatus(running=False, error="for people")
    for error in (ValueError("of the job"), SystemExit(3)):
        text = ended(fail(error)).error
        assert text is not None
        assert text.startswith("Traceback")
        assert type(error).__name__ in text
    assert named == []


def test_the_context_of_ray_train_is_set_at_the_moment_a_job_imports_it(named: list[Placed]) -> None:
    def train() -> str:
        assert named == []
        importlib.import_module("stands_in")
        return "finished"

    finders = len(sys.meta_path)
    assert ended(train).returned == "finished"
    assert named == [PLACED]
    assert len(sys.meta_path) == finders
    assert ended(lambda: "finished").returned == "finished"  # the module is there
    assert named == [PLACED, PLACED]
