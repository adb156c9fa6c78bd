"""Runs that wait after their evaluations for leave to go on, as trials of a sweep do, in plain processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from elastic import cli
from elastic.errors import ConfigError
from elastic.membership.protocol import Allow
from elastic.run.prepare import PreparedRun, prepare
from elastic.worker.local import LocalRun
from tests.forked import WAIT_S, Ran, Watch, configure, local_run
from tests.tiny_jobs import Everything

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]


def held(storage: Path, workers: int) -> PreparedRun:
    """A run that is the undisturbed one, but for holding."""
    options = {"eval__every": "3st", "eval__hold": True, "scaling__max_workers": workers}
    return prepare(Everything(), configure(storage, "undisturbed", **options))


def beside(local: LocalRun, script: Callable[[], None]) -> dict[str, Any]:
    """Run a script while this thread looks after the processes; returns the run's result."""

    def checked() -> None:
        try:
            script()
        except BaseException:
            local.stop("the script failed")
            raise

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(checked)
        result = local.wait(WAIT_S)
        done.result()
    return result


def evaluated(step: int) -> Callable[[dict[str, Any]], bool]:
    return lambda record: "eval/near/loss" in record and record["step"] == step


def allow(local: LocalRun, step: int) -> None:
    local.link.request(Allow(step))


def test_a_run_that_holds_is_saved_loses_a_worker_and_goes_on_to_the_same_bits(tmp_path, undisturbed):
    watch, run = Watch(), held(tmp_path, 3)

    with local_run(run, 3, on_record=watch) as local:

        def script() -> None:
            watch.wait_for(evaluated(3))
            assert cli.main(["checkpoint", str(tmp_path / "undisturbed")]) == 0  # while it holds
            local.processes[1].kill()
            watch.wait_for(lambda r: r.get("kind") == "world_formed" and r["generation"] == "1-2")
            assert not any(r.get("step", 0) > 3 for r in watch.records if "sample_hash" in r)
            allow(local, 6)
            watch.wait_for(evaluated(6))
            local.processes[0].kill()
            watch.wait_for(lambda r: r.get("kind") == "world_formed" and r["generation"] == "1-3")
            assert cli.main(["checkpoint", str(tmp_path / "undisturbed")]) == 0  # by a world that did no step
            allow(local, 5)  # what was allowed once stays so
            allow(local, 12)

        result = beside(local, script)

    ran = Ran(run, None)
    assert result["weights_sha256"] == undisturbed.sha
    assert ran.evaluations == undisturbed.evaluations
    assert {3, 6} <= {e["step"] for e in ran.events("checkpoint_committed")}
    assert [r["step"] for r in ran.rows if "sample_hash" in r] == list(range(1, 13))


def test_a_run_that_is_stopped_where_it_holds_does_no_further_step_and_holds_there_again(tmp_path, undisturbed):
    watch, run = Watch(), held(tmp_path, 2)
    with local_run(run, 2, on_record=watch) as local:
        result = beside(local, lambda: (watch.wait_for(evaluated(3)), local.stop("that is enough")))  # type: ignore
    assert (result["status"], result["steps"]) == ("stopped", 3)

    watch, run = Watch(), held(tmp_path, 1)
    with local_run(run, 1, on_record=watch) as local:

        def script() -> None:
            watch.wait_for(lambda r: r.get("kind") == "restored")
            assert not any("sample_hash" in r for r in watch.records)
            allow(local, 12)

        result = beside(local, script)

    assert (result["status"], result["weights_sha256"]) == ("finished", undisturbed.sha)


def test_a_worker_that_joins_a_run_that_holds_goes_on_with_it(tmp_path, undisturbed):
    watch, run = Watch(), held(tmp_path, 2)

    with local_run(run, 1, on_record=watch) as local:

        def script() -> None:
            watch.wait_for(evaluated(3))
            local.add_worker()
            watch.wait_for(lambda r: r.get("kind") == "world_formed" and r["detail"]["size"] == 2)
            allow(local, 12)

        result = beside(local, script)

    assert result["weights_sha256"] == undisturbed.sha
    assert {row["world_size"] for row in Ran(run, None).history} == {1, 2}


def test_without_evaluations_there_is_nothing_to_hold_at():
    with pytest.raises(ConfigError, match=r"--eval\.hold is True; give --eval\.every"):
        configure("runs", "run", eval__every=None, eval__hold=True)
