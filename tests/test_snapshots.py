"""Copies of a sharded state in the memory of two nodes: nodes are lost at every moment of a snapshot, and the run goes
on from memory with the same bits; where no copy is left, from a checkpoint, and the ledger says why."""

from __future__ import annotations

import os
import re
import resource
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import elastic.worker.local
from elastic.errors import RunFailed
from elastic.run.forecast import measure, snapshot_bytes
from elastic.run.prepare import prepare
from elastic.snapshot.cadence import FIRST
from elastic.snapshot.client import VaultClient
from elastic.snapshot.holdings import Holding
from elastic.worker.ladder import next_rung
from elastic.worker.local import LocalRun
from elastic.worker.snapshot_restore import survey
from tests.forked import LONG, WAIT_S, Ran, Watch, configure, fault, local_run, plan, wait_until
from tests.slowly import slow
from tests.test_bits import assert_same_training, flip_a_byte
from tests.tiny_jobs import Everything

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]

MIB = 1 << 20
WORKERS = 3  # on nodes of their own: 0 and 1 are partners, 2's partner is 0


def snapshots(storage: object, every: str = "4st", strategy: str = "fsdp", **options: Any):
    defaults = {"parallel__strategy": strategy, "recovery__snapshot_every": every, "scaling__workers_per_node": 1}
    return configure(storage, "run", **{**defaults, "scaling__max_workers": WORKERS, **options})


class Nodes:
    """The nodes of a run: what their vaults hold, and killing them."""

    def __init__(self, local: LocalRun, watch: Watch):
        self.local, self.watch = local, watch
        self.names = [local.node_of(i) for i in range(len(local.processes))]

    def parts(self, step: int, n: int | None = None) -> int:
        """Whole parts of a step's snapshot, in all vaults that answer; of those that world `n` took, if it is given."""
        return sum(h.id.step == step and n in (None, h.id.n) for held in self.held().values() for h in held)

    def held(self) -> dict[str, list[Holding]]:
        """What the vaults hold, by URL, of those that answer."""
        living = [v.url for v in self.local.vaults.values() if v.process.poll() is None]
        return survey(living, self.local.token)

    def wait_for_parts(self, step: int, count: int) -> None:
        wait_until(lambda: self.parts(step) >= count, f"{count} parts of the snapshot of step {step}")

    def node_of_rank(self, rank: int) -> int:
        """The node (and the worker's place in `processes`, as each has one)."""
        world = self.watch.wait_for(lambda r: r.get("kind") == "world_formed")
        return [p.pid for p in self.local.processes].index(world["detail"]["pids"][rank])

    def lose(self, *nodes: int) -> None:
        """With everything on them."""
        for node in nodes:
            self.local.vaults[self.names[node]].kill()
        for node in nodes:
            self.local.processes[node].kill()


@contextmanager
def running(config: Any, *faults: dict, in_vaults: tuple = (), workers: int = WORKERS):
    """Yields the run and its nodes once the first snapshot, of step 4, is complete; the run goes to its end after."""
    run, watch = prepare(Everything(samples=LONG), config), Watch()
    environment = {"environment": plan(*faults), "in_vaults": plan(*in_vaults)}
    with local_run(run, workers, on_record=watch, **environment) as local:
        yield run, Nodes(local, watch)
        local.wait(WAIT_S)


def assert_restored(run: Any, undisturbed: Ran, step: int, *, applied: int, rung: str = "snapshot") -> str:
    """The same training, of which the steps after `step` up to `applied` were done again. Returns the reason."""
    found = Ran(run, None)
    assert_same_training(found, undisturbed)
    (restored,) = found.events("restored")
    assert (restored["step"], restored["detail"]["rung"]) == (step, rung)
    done = Counter(row["step"] for row in found.rows if "sample_hash" in row)
    assert {s for s, count in done.items() if count > 1} <= set(range(step + 1, applied + 1))
    assert max(done.values()) <= 2
    return restored["detail"]["reason"]


# ---- a node is lost at any moment of a snapshot ----------------------------------------------------------------------

MOMENTS = [  # of which rank; parts that are there when its node is lost, of six
    ("snapshot.kept", 0, 5, 4),
    ("snapshot.complete", 2, 6, 8),
    *slow(
        ("snapshot.begin", 0, 4, 4),
        ("snapshot.staged", 2, 4, 4),
        ("snapshot.kept", 2, 5, 4),
        ("snapshot.sent", 0, 6, 8),
        ("snapshot.complete", 0, 6, 8),
    ),
]


@pytest.mark.parametrize(("point", "rank", "parts", "restored"), MOMENTS)
def test_a_node_that_is_lost_in_a_snapshot_leaves_a_complete_one(
    undisturbed_epoch, tmp_path, gate, point, rank, parts, restored
):
    """All wait in step 6 until the snapshot of step 4 is complete; a node is lost in that of step 8."""
    first, later, there = gate("first"), gate("later"), tmp_path / "there"
    next_step = 10 if point == "snapshot.complete" else 9
    faults = [
        fault("step.forward", 6, 1, "hold", file=first),
        fault("step.forward", next_step, 1, "hold", file=later),
        fault(point, 8, rank, "hold", file=later, only=there),
    ]
    with running(snapshots(tmp_path), *faults) as (run, nodes):
        nodes.wait_for_parts(4, 6)
        first.unlink()
        wait_until(there.exists, point)
        nodes.wait_for_parts(8, parts)
        nodes.lose(nodes.node_of_rank(rank))
        later.unlink()

    reason = assert_restored(run, undisturbed_epoch, restored, applied=next_step - 1)
    assert f"shard {rank} of 3 was lost" in reason
    assert (f"the snapshot of step 8 lost shard {rank} of 3 in every vault" in reason) == (restored == 4)


@pytest.mark.parametrize("point", ["vault.receiving", *slow("vault.begin", "vault.whole")])
def test_a_vault_that_dies_in_a_snapshot_costs_that_one(undisturbed_epoch, tmp_path, gate, point):
    """Then a worker dies too: its part is in a vault that lives, or in the one that died. Both have a second copy."""
    first, later = gate("first"), gate("later")
    faults = [fault("step.forward", 6, 1, "hold", file=first), fault("step.forward", 10, 1, "hold", file=later)]
    dying = (fault(point, 8, only=tmp_path / "one"),)
    with running(snapshots(tmp_path), *faults, in_vaults=dying) as (run, nodes):
        nodes.wait_for_parts(4, 6)
        first.unlink()
        nodes.watch.wait_for(lambda r: r.get("kind") == "snapshot_skipped" and r["step"] == 8)
        nodes.watch.wait_for_step(9)
        nodes.local.processes[nodes.node_of_rank(2)].kill()
        later.unlink()

    # One that dies while its partner's part comes may leave a copy of each part, which nobody had agreed on.
    restored = Ran(run, None).events("restored")[0]["step"]
    assert restored == 4 or (point, restored) == ("vault.receiving", 8)
    assert_restored(run, undisturbed_epoch, restored, applied=9)
    assert "failed" in Ran(run, None).events("snapshot_skipped")[0]["detail"]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_vault_that_died_or_stands_still_is_started_again_and_has_the_next_snapshots(
    number, undisturbed_epoch, tmp_path, gate, monkeypatch
):
    """It held one copy of every part of the snapshot of step 4, and holds one of every part of step 8's."""
    monkeypatch.setattr(elastic.worker.local, "HANG_TIMEOUT_S", 4.0)
    first, later = gate("first"), gate("later")
    faults = [fault("step.forward", 6, 1, "hold", file=first), fault("step.forward", 10, 1, "hold", file=later)]
    run, watch = prepare(Everything(samples=LONG), snapshots(tmp_path, scaling__max_workers=2)), Watch()
    with local_run(run, 2, on_record=watch, environment=plan(*faults)) as local:
        nodes = Nodes(local, watch)
        nodes.wait_for_parts(4, 4)
        vault, died = local.vaults[nodes.names[0]], local.vaults[nodes.names[0]].process
        with ThreadPoolExecutor(1) as pool:
            end = pool.submit(local.wait, WAIT_S)  # as the command does
            os.kill(died.pid, number)
            wait_until(lambda: nodes.held().get(vault.url) == [], "an empty vault at the same address")
            first.unlink()
            nodes.wait_for_parts(8, 4)
            watch.wait_for_step(9)
            nodes.lose(1)
            later.unlink()
            end.result(WAIT_S)

    assert_restored(run, undisturbed_epoch, 8, applied=9)
    why = (
        "it ended: killed by SIGKILL, perhaps since memory ran out (see dmesg)"
        if number == signal.SIGKILL
        else "it did not answer for 4 s and was ended"
    )
    assert Ran(run, None).events("vault_restarted")[0]["detail"] == {"node": nodes.names[0], "why": why}


# ---- what is lost, and where the state comes from then ---------------------------------------------------------------


def lose_after_step_5(undisturbed: Ran, config: Any, gate: Any, lost: Any, **expected: Any) -> str:
    """All wait in step 6 until the snapshot of step 4 is complete."""
    held = gate("held")
    with running(config, fault("step.forward", 6, 1, "hold", file=held)) as (run, nodes):
        nodes.wait_for_parts(4, 6)
        nodes.watch.wait_for_step(5)
        if config.checkpoint.every is not None:
            nodes.watch.wait_for(lambda r: r.get("kind") == "checkpoint_committed")
        lost(nodes)
        held.unlink()
    return assert_restored(run, undisturbed, applied=5, **expected)


@pytest.mark.long
def test_a_worker_alone_is_lost_and_the_vault_of_its_node_has_its_part(undisturbed_epoch, tmp_path, gate):
    lose_after_step_5(
        undisturbed_epoch, snapshots(tmp_path), gate, lambda nodes: nodes.local.processes[2].kill(), step=4
    )


@pytest.mark.long
def test_two_nodes_that_are_not_partners_are_lost_and_memory_still_has_all(undisturbed_epoch, tmp_path, gate):
    reason = lose_after_step_5(undisturbed_epoch, snapshots(tmp_path), gate, lambda nodes: nodes.lose(1, 2), step=4)
    assert reason.startswith("of the state of step 5, shard")


def test_two_partners_are_lost_and_the_newest_checkpoint_is_left(undisturbed_epoch, tmp_path, gate):
    config = snapshots(tmp_path, checkpoint__every="3st")

    reason = lose_after_step_5(
        undisturbed_epoch, config, gate, lambda nodes: nodes.lose(0, 1), step=3, rung="checkpoint"
    )

    assert reason.startswith("of the state of step 5, shard")
    assert "; the snapshot of step 4 lost shard" in reason


@pytest.mark.long
def test_a_checkpoint_that_is_newer_than_the_snapshot_is_taken(undisturbed_epoch, tmp_path, gate):
    config = snapshots(tmp_path, checkpoint__every="5st")

    reason = lose_after_step_5(undisturbed_epoch, config, gate, lambda nodes: nodes.lose(2), step=5, rung="checkpoint")

    assert "; the newest complete snapshot is of step 4, a checkpoint of step 5" in reason


@pytest.mark.long
def test_a_snapshot_is_taken_where_the_newer_checkpoint_is_damaged(undisturbed_epoch, tmp_path, gate):
    """Of checkpoints of steps 3 and 6 and a snapshot of step 4: what is damaged is told, and no more is done again
    than must be."""
    held = gate("held")
    config = snapshots(tmp_path, checkpoint__every="3st")
    with running(config, fault("step.forward", 7, 1, "hold", file=held)) as (run, nodes):
        nodes.wait_for_parts(4, 6)
        nodes.watch.wait_for(lambda r: r.get("kind") == "checkpoint_committed" and r["step"] == 6)
        damaged = flip_a_byte(Ran(run, None), step=6)
        nodes.lose(2)
        held.unlink()

    reason = assert_restored(run, undisturbed_epoch, 4, applied=6)

    assert "; the checkpoint of step 6 cannot be loaded" in reason
    (found,) = Ran(run, None).events("checkpoint_damaged")
    assert found["step"] == 6
    assert damaged in found["detail"]["problem"]


@pytest.mark.long
def test_where_the_snapshot_is_lost_too_the_checkpoint_before_the_damaged_one_is_taken(
    undisturbed_epoch, tmp_path, gate
):
    held = gate("held")
    config = snapshots(tmp_path, checkpoint__every="3st")
    with running(config, fault("step.forward", 7, 1, "hold", file=held)) as (run, nodes):
        nodes.wait_for_parts(4, 6)
        nodes.watch.wait_for(lambda r: r.get("kind") == "checkpoint_committed" and r["step"] == 6)
        flip_a_byte(Ran(run, None), step=6)
        nodes.lose(0, 1)
        held.unlink()

    reason = assert_restored(run, undisturbed_epoch, 3, applied=6, rung="checkpoint")

    assert "; the snapshot of step 4 lost shard" in reason
    assert "; the checkpoint of step 6 cannot be loaded" in reason


@given(st.none() | st.integers(0, 9), st.none() | st.integers(0, 9))
def test_the_rung_that_leaves_the_least_to_be_done_again_is_next(snapshot, checkpoint):
    rung = next_rung(snapshot, checkpoint)

    steps = {"snapshot": snapshot, "checkpoint": checkpoint, "fresh": 0}
    assert steps[rung] == max(s for s in (snapshot, checkpoint, 0) if s is not None)
    assert (rung == "fresh") == (snapshot is None and checkpoint is None)
    assert rung == "snapshot" or snapshot is None or snapshot < checkpoint, "of equals the faster"


def test_every_worker_is_lost_and_new_ones_find_the_snapshot(undisturbed_epoch, tmp_path, gate):
    held = gate("held")
    faults = [fault("step.forward", 6, 1, "hold", file=held)]
    with running(snapshots(tmp_path), *faults) as (run, nodes):
        nodes.wait_for_parts(4, 6)
        nodes.local.add_worker(environment={})  # on a fourth node, whose vault has nothing
        nodes.watch.wait_for(lambda r: r.get("kind") == "worker_warm" and r["member"] == "w1-3")
        for process in nodes.local.processes[:2]:
            process.kill()
        held.unlink()

    assert_restored(run, undisturbed_epoch, 4, applied=5)
    assert Ran(run, None).column("world_size") == [3] * 4 + [2] * 8


@pytest.mark.long
def test_after_a_loss_every_part_has_two_copies_again(undisturbed_epoch, tmp_path, gate):
    """Two partners are lost one after the other: in between, the first new world has taken a snapshot of its own."""
    first, later = gate("first"), gate("later")
    faults = [fault("step.forward", 6, None, "hold", file=first), fault("step.forward", 7, None, "hold", file=later)]
    run, watch = prepare(Everything(samples=LONG), snapshots(tmp_path, scaling__max_workers=4)), Watch()
    with local_run(run, 4, on_record=watch, environment=plan(*faults)) as local:
        nodes = Nodes(local, watch)
        nodes.wait_for_parts(4, 8)
        nodes.lose(0)
        first.unlink()
        watch.wait_for_step(6)
        wait_until(lambda: nodes.parts(4, n=2) == 6, "the new world's snapshot of step 4")
        nodes.lose(2)
        later.unlink()
        local.wait(WAIT_S)

    found = Ran(run, None)
    assert_same_training(found, undisturbed_epoch)
    assert [(e["step"], e["detail"]["rung"]) for e in found.events("restored")] == [(4, "snapshot")] * 2
    assert found.column("world_size") == [4] * 4 + [2] * 8


# ---- where none are taken, and what they take ------------------------------------------------------------------------


@pytest.mark.long
def test_none_are_taken_where_others_hold_the_state_anyway(undisturbed_epoch, tmp_path, gate):
    held = gate("held")
    config = snapshots(tmp_path, "1st", "hsdp", scaling__max_workers=2)
    faults = [fault("step.forward", 6, 1, "hold", file=held)]
    with running(config, *faults, workers=2) as (run, nodes):
        nodes.watch.wait_for_step(5)
        assert [nodes.parts(step) for step in range(6)] == [0] * 6
        nodes.lose(1)
        held.unlink()

    found = Ran(run, None)
    assert_same_training(found, undisturbed_epoch)
    assert found.events("restored") == []
    assert [row.get("snapshot") for row in found.history if row["world_size"] == 2] == [None] * 5
    planned = found.events("snapshots_planned")
    assert planned == []


@pytest.mark.long
def test_memory_is_stated_before_the_first_step_and_is_what_is_used(tmp_path, gate):
    held = gate("held")
    config, job = snapshots(tmp_path), Everything(samples=LONG, width=96)
    run, watch = prepare(job, config), Watch()
    with local_run(run, 3, on_record=watch, environment=plan(fault("step.forward", 6, 1, "hold", file=held))) as local:
        nodes = Nodes(local, watch)
        nodes.wait_for_parts(4, 6)
        taken = 0
        for vault in local.vaults.values():
            client = VaultClient(vault.url, local.token, 10)
            taken += client.memory()["held"]
            client.close()
        held.unlink()
        local.wait(WAIT_S)

    (planned,) = Ran(run, None).events("snapshots_planned")
    assert planned["step"] == 0
    assert sum(planned["detail"]["bytes"].values()) == pytest.approx(taken * 2, rel=0.05)
    forecast = snapshot_bytes(measure(job, 0), config, WORKERS)
    assert sorted(forecast.values()) == pytest.approx(sorted(planned["detail"]["bytes"].values()), rel=0.01)
    n = nodes.names
    assert planned["detail"]["partners"] == {n[0]: n[1], n[1]: n[0], n[2]: n[0]}


def test_snapshots_that_do_not_fit_are_refused_before_the_first_step(tmp_path, gate):
    held = gate("held")
    run = prepare(Everything(samples=LONG, width=1700), snapshots(tmp_path))
    at_start = fault("world.connected", do="hold", file=held)
    with local_run(run, 3, environment=plan(at_start)) as local:
        for vault in local.vaults.values():
            pages = int(Path(f"/proc/{vault.process.pid}/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 256 * MIB  # threads may take some of it
            resource.prlimit(vault.process.pid, resource.RLIMIT_AS, (limit, limit))
        held.unlink()
        with pytest.raises(RunFailed) as refused:
            local.wait(WAIT_S)

    found = re.search(
        r"snapshots take ([0-9.]+) MiB of host 127.0.0.1, which has ([0-9.]+) MiB left", str(refused.value)
    )
    assert found is not None, str(refused.value)
    assert str(refused.value).startswith("--recovery.snapshot-every is on, but snapshots take")
    assert float(found[1]) > 256 >= float(found[2])
    assert Ran(run, None).rows == []


@pytest.mark.long
def test_auto_takes_them_too(undisturbed_epoch, tmp_path, gate):
    held = gate("held")
    with running(snapshots(tmp_path, "auto"), fault("step.forward", FIRST + 2, 1, "hold", file=held)) as (run, nodes):
        nodes.wait_for_parts(FIRST, 6)
        nodes.lose(2)
        held.unlink()

    assert_restored(run, undisturbed_epoch, FIRST, applied=FIRST + 1)


def test_a_run_on_one_node_is_told_that_a_lost_node_takes_all_along(undisturbed_epoch, tmp_path, gate):
    held = gate("held")
    config = snapshots(tmp_path, scaling__workers_per_node=3)
    with running(config, fault("step.forward", 6, 1, "hold", file=held)) as (run, nodes):
        nodes.wait_for_parts(4, 3)
        nodes.local.processes[0].kill()
        held.unlink()

    assert_restored(run, undisturbed_epoch, 4, applied=5)
    (planned,) = Ran(run, None).events("snapshots_planned")
    assert planned["detail"]["warning"] == "one failure domain only: when a node is lost, all copies are lost"
