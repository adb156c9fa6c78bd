"""Whoever dies, wherever: the newest committed checkpoint loads, with the right bits, and nothing torn is listed."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch

import elastic.run.ending
import elastic.run.ledger_writer
from elastic import fault
from elastic.checkpoint import writer
from elastic.checkpoint.chunks import all_chunks
from elastic.checkpoint.format import Manifest
from elastic.checkpoint.loader import load_all
from elastic.checkpoint.reader import newest_first, read_manifest
from elastic.checkpoint.retention import Policy, Retention
from elastic.checkpoint.saver import Saver
from elastic.checkpoint.tensors import Shard
from elastic.errors import CheckpointError, RunFailed
from elastic.run.prepare import prepare
from elastic.storage import Storage
from tests import forked, leaks
from tests.disks import MIB, small_disk
from tests.forked import Ran, Watch, configure, local_run, train
from tests.forked import fault as fault_at
from tests.slowly import slow
from tests.tiny_jobs import Everything, Plain

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]

WORKER_POINTS = ["checkpoint.before_report", *slow("checkpoint.before_stage", "checkpoint.staged")]
UPLOADER_POINTS = ["upload.before_complete", *slow("upload.begin", "upload.part", "upload.end")]
KEEPER_POINTS = ["checkpoint.before_manifest", "checkpoint.after_manifest", "prune.after_manifest"]


def _kill(point: str, tmp_path: Path, **more: object) -> dict[str, object]:
    """One process dies there, at step 6, once."""
    return {"point": point, "step": 6, "do": "kill", "only": str(tmp_path / "happened"), **more}


def _run(tmp_path: Path, workers: int, faults: list[dict[str, object]], then: str | None = None) -> Ran:
    """A run that saves every 3 steps. It goes beyond step 4 when the first of them is committed, and beyond step 8 when
    there is one more event of the kind `then`."""
    config = configure(tmp_path, "run", checkpoint__every="3st", eval__every="3st", scaling__max_workers=workers)
    run, watch, failure = prepare(Everything(), config), Watch(), None
    until = [(4, "checkpoint_committed"), *([(8, then)] if then else [])]
    gates = [tmp_path / f"step {step}" for step, _ in until]
    for gate in gates:
        gate.touch()
    holds = [{"point": "step.forward", "step": s, "do": "hold", "file": str(g)} for (s, _), g in zip(until, gates)]
    environment = {"ELASTIC_FAULTS": json.dumps([*holds, *faults])}
    with local_run(run, workers, environment=environment, on_record=watch) as local:
        try:
            for count, ((_, kind), gate) in enumerate(zip(until, gates)):
                watch.wait_for(lambda r, kind=kind, step=3 * count: r.get("kind") == kind and r["step"] > step)
                gate.unlink()
            local.wait(forked.WAIT_S)
        except RunFailed as error:
            failure = str(error)
    return Ran(run, failure)


@pytest.fixture(scope="module")
def undisturbed_every_3(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return _run(tmp_path_factory.mktemp("undisturbed-3"), 1, [])


def test_a_run_writes_what_does_not_change_once(undisturbed_every_3):
    """Its frozen layer, of 17 x 16 numbers, is in its first checkpoint; the second, of which it is known that the first
    was committed, refers to it."""
    first, second, *_ = [e["detail"] for e in undisturbed_every_3.events("checkpoint_committed")]
    storage = undisturbed_every_3.storage

    assert first["written"] == first["bytes"] == second["bytes"] == second["written"] + 17 * 16 * 4
    sixth = next(c for c in newest_first(storage) if c.step == 6)
    chunks = all_chunks(storage, sixth.folder, read_manifest(storage, sixth))
    for name in ("model/frozen.weight", "model/frozen.bias"):
        (chunk,) = chunks[name].chunks
        assert chunk.pack.startswith("step-00000003/")


# ---- workers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", WORKER_POINTS)
def test_a_run_whose_only_worker_dies_while_it_saves_goes_on_from_the_checkpoint_before(
    point, tmp_path, undisturbed_every_3
):
    killed = _run(tmp_path, 1, [_kill(point, tmp_path)])

    assert (tmp_path / "happened").exists()
    assert "ended without a result" in (killed.failure or "")
    assert [c.step for c in newest_first(killed.storage)] == [3]
    resumed = train(Everything(), configure(tmp_path, "run", checkpoint__every="3st", eval__every="3st"), 2)
    assert resumed.events("restored")[0]["step"] == 3
    assert resumed.sha == undisturbed_every_3.sha
    assert resumed.state() == undisturbed_every_3.state()


def test_a_worker_that_dies_while_two_save_costs_no_checkpoint_since_the_other_saves_it_again(
    tmp_path, undisturbed_every_3
):
    ran = _run(tmp_path, 2, [_kill("checkpoint.staged", tmp_path, rank=1)], "checkpoint_committed")

    assert ran.failure is None
    assert ran.sha == undisturbed_every_3.sha
    committed = [e["step"] for e in ran.events("checkpoint_committed")]
    assert committed == [3, 6, 9, 12]


# ---- the uploader --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", UPLOADER_POINTS)
def test_a_dead_uploader_costs_nothing_as_another_one_does_its_work(point, tmp_path, undisturbed_every_3):
    ran = _run(tmp_path, 2, [_kill(point, tmp_path, rank=0)], "checkpoint_committed")

    assert (tmp_path / "happened").exists()
    assert ran.failure is None
    assert ran.sha == undisturbed_every_3.sha
    (restarted,) = ran.events("uploader_restarted")
    assert (restarted["step"], restarted["detail"]) == (6, "the uploader process was ended by SIGKILL")
    assert [e["step"] for e in ran.events("checkpoint_committed")] == [3, 6, 9, 12]
    assert not list(Path(ran.storage.root).glob("checkpoints/*/*/.tmp-*")), "nothing is left of the first try"
    assert ran.state() == undisturbed_every_3.state()


@pytest.mark.parametrize("do", ["stop", "kill"])
def test_the_last_save_survives_its_uploader(do, tmp_path, undisturbed_every_3):
    """One that stands still is replaced in as long as a worker may; at the end of a run nobody saves again later."""
    points = ["upload.part"] if do == "stop" else ["upload.begin", "upload.part"]
    faults = [fault_at(point, step=12, do=do, only=tmp_path / point) for point in points]
    config = configure(tmp_path, "run", checkpoint__every="3st", eval__every="3st", recovery__hang_timeout="6s")
    ran = train(Everything(), config, workers=1, faults=faults)

    assert ran.failure is None
    assert ran.sha == undisturbed_every_3.sha
    why = "stood still for 6 s" if do == "stop" else "was ended by SIGKILL"
    assert [e["detail"] for e in ran.events("uploader_restarted")] == [f"the uploader process {why}"] * len(points)
    assert next(newest_first(ran.storage)).step == 12


def test_the_last_save_survives_its_workers_while_one_lives(tmp_path, undisturbed_every_3):
    points = {"checkpoint.staged": 1, "checkpoint.before_report": 0}
    faults = [fault_at(point, step=12, rank=rank, only=tmp_path / point) for point, rank in points.items()]
    config = configure(tmp_path, "run", checkpoint__every="3st", eval__every="3st")
    ran = train(Everything(), config, workers=3, faults=faults)
    assert ran.failure is None
    assert ran.sha == undisturbed_every_3.sha
    assert all((tmp_path / point).exists() for point in points)


def test_the_last_save_is_tried_again_with_room_that_is_made(tmp_path):
    """A full disk at the end: what unfinished attempts left goes, and the oldest checkpoint, but never the last."""
    with small_disk(tmp_path, 16 * MIB) as disk:  # a checkpoint has 6 MB
        config = configure(disk.path, "run", run__duration="6st", checkpoint__every="2st", checkpoint__keep_last=2)
        ran = train(Plain(width=700), config, workers=1)
        assert ran.failure is None
        assert [e["step"] for e in ran.events("checkpoint_failed")] == [6]
        (made,) = ran.events("room_made")
        assert made["detail"]["removed"] == ["checkpoints/step-00000002/1-1-1"]
        assert [c.step for c in newest_first(ran.storage)] == [6, 4]


def test_an_uploader_dies_with_its_worker(tmp_path):
    before = leaks.take()
    with leaks.adopting_orphans():
        parent = forked._context.Process(target=_save_and_die, args=(str(tmp_path),))
        parent.start()
        parent.join(30)
        assert parent.exitcode == 7
        assert leaks.wait_until_clean(before) == []


def _save_and_die(url: str) -> None:
    saver = Saver(Storage(url))
    os.environ["ELASTIC_FAULTS"] = json.dumps([{"point": "upload.part", "do": "stop"}])
    saver.start(1, "1-1-1", [Shard.whole("t", torch.zeros(100))])
    while saver._uploader is None or not _stopped(saver._uploader._process.pid):
        threading.Event().wait(0.01)
    os._exit(7)


def _stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


# ---- the keeper ----------------------------------------------------------------------------------------------------


def _write(storage: Storage, step: int, attempt: str = "1-1-1") -> dict:
    storage.in_process = True
    saver = Saver(storage)
    try:
        saver.start(step, attempt, [Shard.whole("t", torch.full((50,), float(step)))])
        index = saver.wait(60).index
    finally:
        saver.close()
    assert index is not None
    return index


def _commit(storage: Storage, step: int, index: dict, attempt: str = "1-1-1") -> None:
    writer.commit(storage, attempt, Manifest(step, 0, "", {}, {}), [index])


def keep(url: str, point: str, index: dict, environment: dict[str, str]) -> None:
    """What a keeper does with the last share of step 4, and dies at a point."""
    os.environ.update(environment)
    os.environ["ELASTIC_FAULTS"] = json.dumps([{"point": point, "do": "kill"}])
    fault.read_plan()
    storage = Storage(url)
    _commit(storage, 4, index)
    Retention(storage, Policy(last=1)).prune()


@pytest.mark.parametrize("point", KEEPER_POINTS)
def test_a_keeper_that_dies_in_a_commit_or_while_it_prunes_leaves_whole_checkpoints(point, tmp_path):
    storage = Storage(str(tmp_path / "run"))
    for step in (1, 2, 3):
        _commit(storage, step, _write(storage, step))
    index = _write(storage, 4)

    process = forked._context.Process(target=keep, args=(storage.url, point, index, {}))
    process.start()
    process.join(60)

    assert process.exitcode == -9
    listed = list(newest_first(storage))
    assert listed[0].step == (3 if point == "checkpoint.before_manifest" else 4)
    for checkpoint in listed:  # nothing torn is listed
        loaded = load_all(storage, checkpoint.folder, read_manifest(storage, checkpoint))
        assert torch.equal(loaded["t"], torch.full((50,), float(checkpoint.step)))
    if point == "checkpoint.before_manifest":
        _commit(storage, 5, _write(storage, 5))
    Retention(storage, Policy(last=2)).prune()
    left = [c.step for c in newest_first(storage)]
    assert len(left) == 2
    assert storage.names("checkpoints") == sorted(f"step-{s:08d}" for s in left), "nothing is left over"


def test_of_two_who_commit_one_attempt_exactly_one_succeeds(tmp_path):
    storage = Storage(str(tmp_path / "run"))
    for step in range(1, 9):
        index = _write(storage, step)
        outcomes: list[str] = []
        start = threading.Barrier(2)

        def race(seed: int, step: int = step, index: dict = index, outcomes=outcomes, start=start) -> None:
            start.wait()
            try:
                writer.commit(storage, "1-1-1", Manifest(step, seed, "", {}, {}), [index])
                outcomes.append(f"won {seed}")
            except FileExistsError:
                outcomes.append("lost")

        threads = [threading.Thread(target=race, args=(seed,)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(o.split()[0] for o in outcomes) == ["lost", "won"]
        winner = int(next(o for o in outcomes if o.startswith("won")).split()[1])
        assert read_manifest(storage, next(newest_first(storage))).seed == winner


# ---- storage that fails --------------------------------------------------------------------------------------------


def test_a_full_disk_fails_a_save_and_leaves_nothing_of_it(tmp_path):
    with small_disk(tmp_path, 4 * MIB) as disk:
        storage = Storage(str(disk.path / "run"))
        _commit(storage, 1, _write(storage, 1))
        disk.fill(leave=MIB)
        saver = Saver(storage)
        try:
            saver.start(2, "1-1-2", [Shard.whole("t", torch.ones(MIB))])
            assert "No space left on device" in (saver.wait(60).error or "")
            assert os.listdir(disk.path / "run/checkpoints/step-00000002/1-1-2") == [], "not even a part of it"
            disk.free()
            saver.start(3, "1-1-3", [Shard.whole("t", torch.full((50,), 3.0))])
            _commit(storage, 3, saver.wait(60).index, "1-1-3")
        finally:
            saver.close()
        assert [c.step for c in newest_first(storage)] == [3, 1]


def test_a_disk_that_is_full_for_a_while_is_waited_for(tmp_path, undisturbed_every_3, gate):
    held, watch = gate("held"), Watch()
    with small_disk(tmp_path, 2 * MIB) as disk:
        options = {"checkpoint__every": "3st", "eval__every": "3st", "checkpoint__keep_last": 2}
        run = prepare(Everything(), configure(disk.path, "run", **options))
        faults = [{"point": "step.forward", "step": 8, "do": "hold", "file": str(held)}]
        with local_run(run, 1, environment={"ELASTIC_FAULTS": json.dumps(faults)}, on_record=watch) as local:
            watch.wait_for(lambda r: r.get("kind") == "checkpoint_committed" and r["step"] == 6)
            disk.fill()
            held.unlink()
            made = watch.wait_for(lambda r: r.get("kind") == "room_made")
            *failed, oldest = made["detail"]["removed"]
            assert oldest == "checkpoints/step-00000003/1-1-1"
            assert all(name.startswith(("checkpoints/step-00000009/", "checkpoints/step-00000012/")) for name in failed)
            watch.wait_for_step(9)
            disk.free()
            local.wait(forked.WAIT_S)
        ran = Ran(run, None)
        assert ran.sha == undisturbed_every_3.sha
        assert [row["step"] for row in ran.rows if "sample_hash" in row] == list(range(1, 13))


def test_a_run_whose_disk_stays_full_saves_what_it_holds_and_ends_with_one_sentence(
    tmp_path, undisturbed_every_3, gate, monkeypatch
):
    held, later, watch = gate("held"), gate("later"), Watch()
    monkeypatch.setattr(elastic.run.ledger_writer, "LEDGER_S", 1.0)
    monkeypatch.setattr(elastic.run.ending, "ENDING_PATIENCE_S", 0.1)
    with small_disk(tmp_path, 2 * MIB) as disk:
        run = prepare(Everything(), configure(disk.path, "run", checkpoint__every="3st", run__duration="1000st"))
        faults = [
            {"point": "step.forward", "step": 5, "do": "hold", "file": str(held)},
            {"point": "step.forward", "step": 8, "do": "hold", "file": str(later)},
        ]
        with local_run(run, 1, environment={"ELASTIC_FAULTS": json.dumps(faults)}, on_record=watch) as local:
            watch.wait_for(lambda r: r.get("kind") == "checkpoint_committed")
            disk.fill()
            held.unlink()
            watch.wait_for(lambda r: r.get("kind") == "ledger_not_written")
            later.unlink()
            watch.wait_for(lambda r: r.get("kind") == "checkpoint_failed" and r["step"] == 8)  # that of its end
            disk.free()
            with pytest.raises(RunFailed) as failed:
                local.wait(forked.WAIT_S)
        assert "\n" not in str(failed.value)
        assert f"{disk.path}/run could not be written: OSError: [Errno 28] No space left" in str(failed.value)
        ran = Ran(run, None)
        assert ran.result["status"] == "failed"
        step = ran.rows[-1]["step"]
        assert str(failed.value).endswith(f"; saved is step {step}")
        assert next(newest_first(ran.storage)).step == step
        assert [row["step"] for row in ran.rows if "sample_hash" in row] == list(range(1, step + 1))


def test_a_run_whose_folder_is_removed_says_so_and_saves_all_anew(tmp_path, undisturbed_every_3, gate):
    first, later, watch = gate("first"), gate("later"), Watch()
    run = prepare(Everything(), configure(tmp_path, "run", checkpoint__every="3st", eval__every="3st"))
    faults = [{"point": "step.forward", "step": s, "do": "hold", "file": str(f)} for s, f in ((8, first), (10, later))]
    with local_run(run, 1, environment={"ELASTIC_FAULTS": json.dumps(faults)}, on_record=watch) as local:
        watch.wait_for(lambda r: r.get("kind") == "checkpoint_committed" and r["step"] == 6)
        watch.wait_for_step(7)
        os.rename(run.folder.storage.root, tmp_path / "gone")  # at once: the run writes into it meanwhile
        shutil.rmtree(tmp_path / "gone")
        watch.wait_for(lambda r: r.get("kind") == "folder_removed")
        first.unlink()
        watch.wait_for(lambda r: r.get("kind") == "checkpoint_committed" and r["step"] in (8, 9))
        later.unlink()
        local.wait(forked.WAIT_S)
    ran = Ran(run, None)
    assert ran.sha == undisturbed_every_3.sha
    assert ran.state() == undisturbed_every_3.state(), "frozen layers were written anew"
    assert ran.storage.names("claims") == ["000001.json"]
    again = train(Everything(), configure(tmp_path, "run", run__take_over=True, checkpoint__every="3st"), 1)
    assert again.sha == ran.sha


def test_a_save_and_a_prune_at_one_time_leave_each_other_alone(tmp_path, gate):
    """What the save refers to stays, what it wrote so far stays, and all that is kept loads."""
    storage, held = Storage(str(tmp_path / "run")), gate("held")
    frozen, moving = torch.arange(1000.0), torch.zeros(10)
    shards = [Shard.whole("frozen", frozen, frozen=True), Shard.whole("moving", moving)]
    saver = Saver(storage)
    environment = pytest.MonkeyPatch()
    hold = {"point": "upload.before_complete", "do": "hold", "file": str(held)}
    there = {step: tmp_path / f"step {step} is there" for step in (3, 4)}
    environment.setenv(
        "ELASTIC_FAULTS", json.dumps([{**hold, "step": step, "only": str(file)} for step, file in there.items()])
    )
    try:
        for step in range(1, 6):
            moving += 1
            saver.start(step, f"1-1-{step}", shards)
            if step in (3, 4):
                forked.wait_until(there[step].exists, f"the upload of step {step}")
                for _ in range(3):
                    Retention(storage, Policy(last=1)).prune()
                held.unlink()
            index = saver.wait(60).index
            held.touch()
            assert index is not None
            _commit(storage, step, index, f"1-1-{step}")
            saver.committed(step, f"1-1-{step}")
            newest = next(newest_first(storage))
            loaded = load_all(storage, newest.folder, read_manifest(storage, newest))
            assert newest.step == step
            assert torch.equal(loaded["frozen"], frozen)
            assert torch.equal(loaded["moving"], moving)
    finally:
        environment.undo()
        saver.close()
    Retention(storage, Policy(last=1)).prune()
    assert [p.name for p in (tmp_path / "run").rglob("*.pack")] == ["rank-0000.pack"] * 2, "the first's and the last's"


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "swap"])
@pytest.mark.parametrize("what", ["pack", "manifest"])
def test_any_damage_to_any_object_is_found_and_told(damage, what, tmp_path):
    storage = Storage(str(tmp_path / "run"))
    for step in (1, 2):
        _commit(storage, step, _write(storage, step))
    newest, before = newest_first(storage)
    name = "rank-0000.pack" if what == "pack" else "manifest.json"
    path, other = (tmp_path / "run" / c.folder / name for c in (newest, before))
    data = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(data[:-1])
    elif damage == "flip":
        path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    elif damage == "delete":
        path.unlink()
    else:
        path.write_bytes(other.read_bytes())

    if damage == "delete" and what == "manifest":
        assert [c.step for c in newest_first(storage)] == [1]
        return
    with pytest.raises(CheckpointError, match=f"{newest.folder}/{name}"):
        load_all(storage, newest.folder, read_manifest(storage, newest))


def test_a_save_that_is_due_while_one_still_runs_is_put_off_or_left_out_with_an_event(tmp_path, undisturbed_every_3):
    def ran(name: str, when_busy: str) -> Ran:
        environment = {
            "ELASTIC_FAULTS": json.dumps([{"point": "upload.part", "step": 3, "do": "sleep", "seconds": 0.5}])
        }
        config = configure(tmp_path, name, checkpoint__every="3st", checkpoint__when_busy=when_busy, eval__every="3st")
        run = prepare(Everything(), config)
        watch = Watch()
        with local_run(run, 1, environment=environment, on_record=watch) as local:
            local.wait(forked.WAIT_S)
        return Ran(run, None)

    for name, when_busy in (("left", "skip"), ("put", "delay")):
        found = ran(name, when_busy)
        skipped = found.events("checkpoint_skipped")
        assert skipped
        assert skipped[0]["step"] == 6
        assert skipped[0]["detail"].startswith(name)
        assert found.sha == undisturbed_every_3.sha
        steps = [e["step"] for e in found.events("checkpoint_committed")]
        assert (steps[0], steps[-1]) == (3, 12)
