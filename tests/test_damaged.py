"""A damaged checkpoint costs one checkpoint: once found it is marked, and nothing counts it any more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from elastic import cli
from elastic.checkpoint.format import MANIFEST, attempt_folder
from elastic.checkpoint.reader import Committed, marked, newest_first, problem_of
from elastic.checkpoint.retention import Policy, Retention
from elastic.membership.protocol import Commit, RestorePoint
from elastic.membership.world import Generation
from elastic.run.prepare import prepare
from elastic.storage import Storage
from tests.forked import LONG, WAIT_S, Ran, Watch, configure, fault, local_run, plan, sample_at, train
from tests.state_by_hand import load_state, save_state
from tests.test_bits import flip_a_byte
from tests.test_run_checkpoints import Office, share
from tests.tiny_jobs import Everything

PACK = "rank-0000.pack"


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A run with checkpoints of the steps 3, 6 and 9."""
    found = str(tmp_path / "run")
    for step in (3, 6, 9):
        save_state(found, step, {"model/w": torch.full((40,), float(step))}, attempt=f"1-1-{step}")
    return found


def flip(url: str, step: int) -> None:
    path = Path(url) / attempt_folder(step, f"1-1-{step}") / PACK
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict:
    assert cli.main(["checkpoints", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def steps(url: str) -> list[int]:
    return [c.step for c in newest_first(Storage(url))]


# ---- a check -------------------------------------------------------------------------------------------------------


def test_what_a_check_finds_damaged_counts_no_more_until_a_check_finds_it_whole(url, capsys):
    flip(url, 9)

    found = told(capsys, "verify", url, code=1)

    assert found["marks"] == {"marked": [9], "unmarked": [], "problem": None}
    assert steps(url) == [6, 3]
    assert load_state(url)[1].step == 6
    listed = told(capsys, "ls", url)["checkpoints"]
    assert [(c["step"], c["state"]) for c in listed] == [(9, "damaged"), (6, "complete"), (3, "complete")]
    assert f"{PACK}: has other bytes than were written" in listed[0]["problem"]
    save_state(url, 9, {"model/w": torch.ones(40)}, attempt="2-1-1")
    assert steps(url) == [9, 6, 3], "it is saved anew"

    flip(url, 9)
    assert told(capsys, "verify", url)["marks"]["unmarked"] == [9]
    assert len(steps(url)) == 4


def test_prune_keeps_the_newest_that_can_be_loaded_and_removes_what_is_marked(url, capsys):
    (Path(url) / attempt_folder(9, "1-1-9") / PACK).unlink()

    assert [r["step"] for r in told(capsys, "prune", url, "--keep-last", 1, "--yes")["removed"]] == [3]
    assert steps(url) == [6]
    assert "is missing" in problem_of(Storage(url), Committed(9, "1-1-9"))
    assert [r["step"] for r in told(capsys, "prune", url, "--keep-last", 1, "--yes")["removed"]] == [9]
    assert marked(Storage(url)) == set()
    assert steps(url) == [6]


def test_a_pin_keeps_a_damaged_one_too(url, capsys):
    told(capsys, "pin", url, "--step", 3)
    flip(url, 3)
    told(capsys, "verify", url, code=1)
    told(capsys, "prune", url, "--keep-last", 1, "--yes")
    assert steps(url) == [9]
    assert (Path(url) / attempt_folder(3, "1-1-3") / MANIFEST).exists()


# ---- the keeper ----------------------------------------------------------------------------------------------------


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    found = Storage(str(tmp_path / "kept"))
    found.in_process = True
    return found


def test_the_keeper_goes_back_to_what_can_be_loaded_at_once_and_prunes_by_that(storage):
    office = Office(storage, last=1)
    office.take("a", share(storage, 3))
    save_state(storage.url, 9, {"t0": torch.ones(5)}, attempt="1-1-9")
    after = Office(storage, last=1)
    assert after.checkpoints.restore.step == 9
    bad = Committed(9, "1-1-9")

    after.checkpoints.distrust(bad)
    assert after.checkpoints.restore == RestorePoint(), "before storage was asked"
    after.checkpoints.unloadable(bad, "rank-0000.pack is missing", damaged=True, found_by="w1-0", generation="1-1")
    assert after.checkpoints.restore == RestorePoint(3, "1-1-3")
    assert after.told == [Commit(9, "1-1-9", "rank-0000.pack is missing", anew=True)]
    assert after.noted == [
        (
            "checkpoint_damaged",
            {
                "generation": "1-1",
                "step": 9,
                "detail": {"attempt": "1-1-9", "problem": "rank-0000.pack is missing", "found_by": "w1-0"},
            },
        ),
    ]
    after.take("a", share(storage, 5))
    assert [c.step for c in newest_first(storage)] == [5], "a new one is not pruned as older than the damaged one"


def test_what_only_this_job_cannot_load_is_not_marked_and_not_in_the_way(storage):
    office = Office(storage, last=1)
    office.take("a", share(storage, 3))
    office.take("a", share(storage, 6))
    other = Committed(6, "1-1-6")
    office.checkpoints.unloadable(other, "tensor 'w' has another shape", damaged=False, found_by="w1-0")
    assert (marked(storage), office.kinds[-1]) == (set(), "checkpoint_failed")
    office.take("a", share(storage, 5))
    assert [c.step for c in newest_first(storage)] == [6, 5]


def test_a_checkpoint_that_lost_an_object_is_found_when_old_ones_are_removed(storage):
    office = Office(storage, last=2)
    office.take("a", share(storage, 3))
    office.take("a", share(storage, 6))
    storage.remove(f"{attempt_folder(6, '1-1-6')}/{PACK}")
    office.take("a", share(storage, 9))
    assert [c.step for c in newest_first(storage)] == [9, 3]
    assert office.kinds[-1] == "checkpoint_damaged"
    assert Retention(storage, Policy(last=2)).plan() == ([], set())


def test_nothing_refers_to_a_damaged_checkpoint(storage):
    office = Office(storage)
    message = share(storage, 3)
    office.take("a", message)
    office.checkpoints.unloadable(Committed(3, "1-1-3"), "damage", damaged=True, found_by="a check")
    frozen = share(storage, 6)
    size, frozen.index["bytes"] = frozen.index["bytes"], 0
    frozen.index["elsewhere"] = {f"step-00000003/1-1-3/{PACK}": [size, size]}
    office.checkpoints.take_share("a", Generation(1, 1), frozen, {"a": 0})
    assert "found damaged" in office.told[-1].error
    assert office.told[-1].anew is True


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_after_a_damaged_newest_checkpoint_a_run_goes_on_as_if_there_were_none(undisturbed_epoch, tmp_path, gate):
    """It joins without going back, keeps its new ones, counts its pause from where it went on, and is resumed."""
    job = Everything(samples=LONG)
    paused = train(job, configure(tmp_path, "run", run__stop_after="8st", checkpoint__every="4st"), workers=1)
    flip_a_byte(paused, step=8)
    options = {"run__stop_after": "3st", "checkpoint__every": "1st", "checkpoint__keep_last": 1}
    run, watch, held = prepare(job, configure(tmp_path, "run", **options)), Watch(), gate("held")
    with local_run(run, 1, on_record=watch, environment=plan(fault("step.forward", 6, 0, "hold", file=held))) as local:
        watch.wait_for_step(5)
        local.add_worker({})
        watch.wait_for(lambda r: r.get("kind") == "worker_warm" and r.get("member") == "w2-1")
        held.unlink()
        local.wait(WAIT_S)
    found = Ran(run, None)
    restored = [e for e in found.events("restored") if e["generation"].startswith("2-")]
    assert [(e["step"], e["detail"]["rung"]) for e in restored if e["detail"]["rung"] != "peer"] == [(4, "checkpoint")]
    assert found.result["steps"] == 7, "three steps from where it went on"
    assert [e["step"] for e in found.events("checkpoint_damaged")] == [8]
    assert [c.step for c in newest_first(found.storage)] == [7]

    finished = train(job, configure(tmp_path, "run", checkpoint__every="1st"), workers=1)
    assert finished.sha == undisturbed_epoch.sha
    assert marked(finished.storage) == set()


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_error_below_the_step_of_a_damaged_checkpoint_saves_what_was_done(strategy, tmp_path):
    job = Everything(samples=LONG)
    options = {"parallel__strategy": strategy}
    paused = train(job, configure(tmp_path, "run", run__stop_after="8st", checkpoint__every="4st", **options), 1)
    flip_a_byte(paused, step=8)

    broken = Everything(samples=LONG, fault="raise", fault_at=sample_at(step=7))
    failed = train(broken, configure(tmp_path, "run", **options, run__allow_change=("job.fault", "job.fault-at")), 2)

    assert failed.failure is not None
    assert [c.step for c in newest_first(failed.storage)] == [6, 4]


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_where_all_are_damaged_nothing_begins_anew_before_that_was_asked_for(tmp_path, capsys):
    options = {"run__stop_after": "2st"}
    paused = train(Everything(), configure(tmp_path, "run", **options), workers=1)
    damaged = flip_a_byte(paused, step=2)
    for _ in range(2):
        failed = train(Everything(), configure(tmp_path, "run", **options), workers=1)
        assert failed.failure is not None
        assert f"no committed checkpoint can be loaded; the newest problem: {damaged}" in failed.failure
    assert "elastic checkpoints prune" in failed.failure

    told(capsys, "prune", paused.storage.url, "--yes")
    assert train(Everything(), configure(tmp_path, "run", **options), workers=1).failure is None
