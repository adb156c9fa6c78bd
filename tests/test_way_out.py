"""Every way in which a run ends before its end: the newest state is saved, and the same command goes on from it.

Of an error in the job's code and of a loss that is not finite see `test_failures`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic.checkpoint.reader import newest_first
from elastic.errors import Interrupted
from elastic.membership.protocol import Drain, Leaving
from elastic.run.prepare import prepare
from elastic.run.signals import handled_by
from elastic.worker.local import LocalRun
from tests.forked import LONG, WAIT_S, Ran, Watch, configure, fault, local_run, plan, train, wait_until
from tests.tiny_jobs import Everything

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]
JOB = Everything(samples=LONG)


def goes_on(tmp_path: Path, undisturbed: Ran, least: int) -> Ran:
    """The newest checkpoint is of step `least` or a later one; from it the run ends as one to which nothing happened.
    Returns what it was before."""
    config = configure(tmp_path, "run")
    before = Ran(prepare(JOB, config), None)
    step = next(newest_first(before.storage)).step
    assert step >= least
    ran = train(JOB, config, workers=1)
    assert [e["step"] for e in ran.events("restored") if e["generation"].startswith("2-")] == [step]
    assert ran.sha == undisturbed.sha
    return before


def signalled(local: LocalRun, said: list[str], then: Callable[[], None]) -> None:
    """Ends with the run; `then` is called when the host has heard of the first signal."""
    waiting = threading.Thread(target=lambda: (wait_until(lambda: bool(said), "the host to hear of it"), then()))
    waiting.start()
    try:
        local.wait(WAIT_S)
    finally:
        waiting.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(number, undisturbed_epoch, tmp_path, gate):
    held, watch, run = gate("held"), Watch(), prepare(JOB, configure(tmp_path, "run", scaling__max_workers=2))
    faults, said = plan(fault("step.forward", 5, 1, "hold", file=held)), []
    with (
        local_run(run, 2, on_record=watch, print_line=said.append, environment=faults) as local,
        handled_by(local.drive.on_signal),
    ):
        watch.wait_for_step(4)
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted) as ended:
            signalled(local, said, held.unlink)

    assert said == [f"{number.name}: saving and ending; once more ends at once"]
    assert (
        str(ended.value)
        == f"run run was interrupted by {number.name}; give --run.storage {tmp_path} --run.name run to go on"
    )
    assert ended.value.exit_code == 130
    before = Ran(run, None)
    assert before.result["status"] == "stopped"
    assert before.column("step")[-1] == next(newest_first(before.storage)).step, "not a step is lost"
    goes_on(tmp_path, undisturbed_epoch, 5)


def test_a_second_signal_ends_at_once(tmp_path, gate):
    held, watch, run = gate("held"), Watch(), prepare(JOB, configure(tmp_path, "run", scaling__max_workers=2))
    faults, said = plan(fault("step.forward", 5, 1, "hold", file=held)), []
    with (
        local_run(run, 2, on_record=watch, print_line=said.append, environment=faults) as local,
        handled_by(local.drive.on_signal),
    ):
        watch.wait_for_step(4)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            signalled(local, said, lambda: os.kill(os.getpid(), signal.SIGINT))
        held.unlink()

    assert Ran(run, None).result["message"] == "interrupted twice, nothing saved since the newest checkpoint"
    assert list(newest_first(run.folder.storage)) == []


def test_a_run_whose_node_gets_notice_saves_before_its_only_worker_goes(undisturbed_epoch, tmp_path, gate):
    """Nobody takes over, so the state is made safe in time; then the node is gone, and later the run goes on."""
    first, later, watch = gate("first"), gate("later"), Watch()
    run = prepare(JOB, configure(tmp_path, "run", scaling__max_workers=1))
    faults = plan(fault("step.forward", 5, 0, "hold", file=first), fault("step.forward", 8, 0, "hold", file=later))
    with local_run(run, 1, on_record=watch, environment=faults) as local:
        watch.wait_for_step(4)
        local.link.request(Leaving(local.node_of(0), 1.0))
        first.unlink()
        watch.wait_for(lambda r: r.get("kind") == "checkpoint_committed")
        local.stop("its node is gone")
        local.processes[0].kill()
        local.wait(WAIT_S)

    assert Ran(run, None).result["status"] == "stopped"
    goes_on(tmp_path, undisturbed_epoch, 5)


def test_who_stops_or_leaves_saves_first_and_the_evaluation_is_done_by_who_goes_on(undisturbed, tmp_path, gate):
    """A worker that is drained leaves before the evaluation of that step, and a run that is stopped ends before."""
    drained, stopped, watch = gate("drained"), gate("stopped"), Watch()
    run = prepare(Everything(), configure(tmp_path, "run", eval__every="3st", scaling__max_workers=2))
    faults = plan(
        fault("step.forward", 3, 0, "hold", file=drained),
        fault("step.forward", 6, 0, "hold", file=stopped),
        fault("eval.begin", 6, 0, "raise"),
    )
    with local_run(run, 2, on_record=watch, environment=faults) as local:
        watch.wait_for_step(2)
        local.link.request(Drain("w1-1", 0.0, "a test"))
        drained.unlink()
        watch.wait_for_step(5)
        local.stop("enough")
        stopped.unlink()
        local.wait(WAIT_S)

    before = Ran(run, None)
    assert before.result["status"] == "stopped"
    assert [e["generation"] for e in before.rows if "eval/near/loss" in e] == ["1-2"], "by the world that goes on"
    assert next(newest_first(before.storage)).step == 6
    assert before.result["metrics"] == {}

    ran = train(Everything(), configure(tmp_path, "run", eval__every="3st"), workers=1)
    assert ran.sha == undisturbed.sha
    assert ran.evaluations == undisturbed.evaluations
