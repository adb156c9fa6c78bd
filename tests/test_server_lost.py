"""The membership server is killed: training goes on, another rebuilds itself, and each row is recorded once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from elastic.observe.ledger import gaps_and_doubles
from elastic.run.prepare import PreparedRun, prepare
from elastic.worker.hosting import HostProcess
from elastic.worker.local import LocalRun
from tests.forked import WAIT_S, B, Ran, Watch, configure, fault, local_run, plan, wait_until
from tests.tiny_jobs import Everything

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]


class Hosted:
    """A run whose host has a process of its own."""

    def __init__(self, run: PreparedRun, local: LocalRun, watch: Watch):
        assert isinstance(local.hosting, HostProcess)
        self.run, self.local, self.watch, self.host = run, local, watch, local.hosting

    @property
    def ran(self) -> Ran:
        return Ran(self.run, None)

    def kill_host(self) -> None:
        process = self.host.process
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.wait(WAIT_S)

    def when_saved(self, held: Path) -> None:
        """Let the workers go on once the first checkpoint is committed: what a broken world was saving is not."""
        self.wait_for_event("checkpoint_committed", step=4)
        held.unlink()

    def wait_for_event(self, kind: str, **fields: Any) -> dict[str, Any]:
        wanted = {"kind": kind, **fields}
        return self.watch.wait_for(lambda r: wanted.items() <= r.items())


@contextmanager
def hosted(config: Any, workers: int, *, in_workers: list[dict], in_host: list[dict]) -> Iterator[Hosted]:
    watch, run = Watch(), prepare(Everything(), config)
    options = {"environment": plan(*in_workers), "own_host": plan(*in_host), "on_record": watch}
    with local_run(run, workers, **options) as local:
        yield Hosted(run, local, watch)


def small(tmp_path: Path, workers: int = 3, **options: Any) -> Any:
    return configure(
        tmp_path, "run", scaling__max_workers=workers, checkpoint__every="4st", eval__every="3st", **options
    )


def dying(held: Path, mark: Path) -> list[dict]:
    """One worker dies in step 6, when it is let go."""
    return [fault("step.forward", 6, 1, "hold", file=held), fault("step.forward", 6, 1, only=mark)]


def assert_recorded_once(ran: Ran, undisturbed: Ran, *, worlds: int) -> None:
    """The same bits; every step, evaluation and checkpoint is in the ledger once, and the end of the run too."""
    assert ran.sha == undisturbed.sha
    assert ran.column("loss") == undisturbed.column("loss")
    assert gaps_and_doubles(ran.rows, B) == []
    steps = [r["step"] for r in ran.rows if "sample_hash" in r]
    assert steps == list(range(1, 13))
    assert ran.evaluations == undisturbed.evaluations
    assert [r["step"] for r in ran.rows if "sample_hash" not in r] == [3, 6, 9, 12]
    saved = [e["step"] for e in ran.events("checkpoint_committed")]
    if worlds > 1 and 6 in saved:  # who had not heard of a commit when its world broke saves again in the next
        saved.remove(6)
    assert saved == [4, 8, 12]
    assert ran.events("checkpoint_failed") == []
    assert len(ran.events("run_finished")) == 1
    assert len({row["generation"] for row in ran.history}) == worlds
    assert not ran.events("member_late")


def test_training_goes_on_while_the_server_is_away_and_it_rebuilds_itself(undisturbed, tmp_path, gate):
    first, away, later = gate("first"), gate("away"), gate("later")
    reached = tmp_path / "the-fence-of-step-9-was-passed"
    in_workers = [
        fault("step.forward", 5, 0, "hold", file=first),
        fault("step.after_fence", 9, 0, "sleep", seconds=0, only=reached),
        fault("step.forward", 10, 1, "hold", file=later),
    ]
    in_host = [fault("host.recovering", do="hold", file=away)]
    with hosted(small(tmp_path), 3, in_workers=in_workers, in_host=in_host) as run:
        run.watch.wait_for_step(4)  # these rows are lost with the server: they are written once a second
        run.kill_host()
        first.unlink()
        wait_until(reached.exists, "step 9 in the absence of the server")
        away.unlink()
        resumed = run.wait_for_event("resumed")
        later.unlink()
        run.local.wait(WAIT_S)
        pids = [p.pid for p in run.local.processes]

    ran = run.ran
    assert resumed["generation"] == "1-1"
    (formed,) = ran.events("world_formed")
    assert formed["detail"]["pids"] == pids
    assert_recorded_once(ran, undisturbed, worlds=1)
    assert ran.result["stalls"] == []


POINTS = [
    ("ledger.rows", 6),
    ("checkpoint.before_manifest", 4),
    ("checkpoint.after_manifest", 8),
    ("checkpoint.before_manifest", 12),
    ("checkpoint.after_manifest", 12),
    ("run.closing", 12),
    ("run.closed", 12),
]


@pytest.mark.parametrize(("point", "step"), POINTS)
def test_a_server_killed_at(point, step, undisturbed, tmp_path):
    in_host = [fault(point, step, only=tmp_path / "mark")]
    with hosted(small(tmp_path, 2), 2, in_workers=[], in_host=in_host) as run:
        run.local.wait(WAIT_S)
        codes = [p.wait(WAIT_S) for p in run.local.processes]
        assert run.host.restarts == 1

    assert codes == [0, 0]
    assert_recorded_once(run.ran, undisturbed, worlds=1)


def test_a_server_that_stands_still_is_ended_within_the_lease(undisturbed, tmp_path):
    in_host = [fault("checkpoint.before_manifest", 4, do="stop", only=tmp_path / "mark")]
    with hosted(small(tmp_path, 2, recovery__lease="15s"), 2, in_workers=[], in_host=in_host) as run:
        run.local.wait(WAIT_S)
        assert run.host.restarts == 1

    assert_recorded_once(run.ran, undisturbed, worlds=1)
    assert [e["detail"].get("why") for e in run.ran.events("run_started")] == [
        None,
        "the host of the run did not answer for 5 s and was ended",
    ]


def test_rows_that_are_recorded_are_not_recorded_again_if_nobody_was_told(undisturbed, tmp_path, gate):
    held = gate("held")
    in_workers = [fault("step.forward", 6, 1, "hold", file=held)]
    in_host = [fault("ledger.recorded", only=tmp_path / "mark")]
    with hosted(small(tmp_path, 2), 2, in_workers=in_workers, in_host=in_host) as run:
        run.wait_for_event("resumed")
        held.unlink()
        run.local.wait(WAIT_S)

    assert_recorded_once(run.ran, undisturbed, worlds=1)


@pytest.mark.parametrize(("point", "n"), [("world.breaking", 1), ("world.forming", 2)])
def test_a_server_killed_while_a_world_is_broken_or_formed(point, n, undisturbed, tmp_path, gate):
    held = gate("held")
    in_workers = dying(held, tmp_path / "worker")
    in_host = [fault(point, n, only=tmp_path / "host")]
    with hosted(small(tmp_path), 3, in_workers=in_workers, in_host=in_host) as run:
        run.when_saved(held)
        run.local.wait(WAIT_S)

    ran = run.ran
    assert ran.column("world_size") == [3] * 5 + [2] * 7
    assert_recorded_once(ran, undisturbed, worlds=2)


def test_a_server_killed_when_its_new_world_has_not_connected_yet(undisturbed, tmp_path, gate):
    first, held = gate("first"), gate("held")
    in_workers = [*dying(first, tmp_path / "worker"), fault("world.assigned", 5, None, "hold", file=held)]
    with hosted(small(tmp_path), 3, in_workers=in_workers, in_host=[]) as run:
        run.when_saved(first)
        run.wait_for_event("world_formed", generation="1-2")
        run.kill_host()
        held.unlink()
        run.local.wait(WAIT_S)

    ran = run.ran
    assert ran.column("world_size") == [3] * 5 + [2] * 7
    assert_recorded_once(ran, undisturbed, worlds=2)


def test_a_server_and_a_worker_killed_together(undisturbed, tmp_path, gate):
    held = gate("held")
    in_workers = [fault("step.forward", 6, 0, "hold", file=held)]
    with hosted(small(tmp_path), 3, in_workers=in_workers, in_host=[]) as run:
        run.watch.wait_for_step(5)
        run.wait_for_event("checkpoint_committed", step=4)
        run.local.processes[2].kill()
        run.kill_host()
        held.unlink()
        run.local.wait(WAIT_S)

    ran = run.ran
    assert ran.column("world_size") == [3] * 5 + [2] * 7
    assert_recorded_once(ran, undisturbed, worlds=2)


def test_a_server_killed_while_the_run_is_parked(undisturbed, tmp_path, gate):
    config, held = small(tmp_path, 2, scaling__min_workers=2), gate("held")
    with hosted(config, 2, in_workers=dying(held, tmp_path / "worker"), in_host=[]) as run:
        run.when_saved(held)
        run.wait_for_event("parked")
        run.kill_host()
        wait_until(lambda: len([r for r in run.watch.records if r.get("kind") == "parked"]) == 2, "parked again")
        run.local.add_worker()
        run.local.wait(WAIT_S)

    ran = run.ran
    assert ran.column("world_size") == [2] * 12
    assert_recorded_once(ran, undisturbed, worlds=2)
