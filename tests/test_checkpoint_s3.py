"""The engine on a real S3, behind a proxy that makes faults: what is committed loads, and nothing is left over."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field

import pytest
import torch

from elastic.checkpoint import downloads, writer
from elastic.checkpoint.format import Manifest
from elastic.checkpoint.loader import load_all
from elastic.checkpoint.reader import newest_first, read_manifest
from elastic.checkpoint.retention import Policy, Retention
from elastic.checkpoint.save import Save
from elastic.checkpoint.saver import Saver
from elastic.checkpoint.tensors import Shard
from elastic.checkpoint.uploader import LEAST_PART_BYTES
from elastic.errors import CheckpointError, StorageError
from elastic.storage import Storage
from tests import forked
from tests.alone import restore_newest
from tests.state_by_hand import load_state, save_state
from tests.test_checkpoint_faults import KEEPER_POINTS, UPLOADER_POINTS, keep
from tests.test_checkpoint_hostile import Ledger, fresh, trained

pytestmark = [pytest.mark.processes, pytest.mark.long]
MIB = 1 << 20


@dataclass
class Rig:
    """A bucket, a saver with parts as small as S3 takes, and a state of several of them."""

    storage: Storage
    saver: Saver
    state: dict[str, torch.Tensor] = field(
        default_factory=lambda: {
            "big": torch.arange(5 * MIB, dtype=torch.int32),
            "small": torch.ones(3),
            "odd": torch.tensor(True),
        }
    )

    def begin(self, step: int) -> None:
        self.saver.start(step, "1-1-1", [Shard.whole(n, t) for n, t in self.state.items()])

    def save(self, step: int) -> Save:
        self.begin(step)
        return self.saver.wait(100)

    def commit(self, save: Save) -> None:
        assert save.error is None
        assert save.index is not None
        writer.commit(self.storage, "1-1-1", Manifest(save.step, 0, "", {}, {}), [save.index])

    def newest(self) -> int:
        """The step of the newest checkpoint, after comparing every bit."""
        checkpoint = next(newest_first(self.storage))
        loaded = load_all(self.storage, checkpoint.folder, read_manifest(self.storage, checkpoint))
        assert all(torch.equal(loaded[n], t) for n, t in self.state.items())
        return checkpoint.step

    def objects(self) -> list[str]:
        """All that lies below the folder of checkpoints."""
        return sorted(path.rpartition("checkpoints/")[2] for path in self.storage.fs.find(self.storage.root))

    def unfinished(self) -> list[str]:
        bucket = self.storage.root.partition("/")[0]
        return [u["Key"] for u in self.storage.fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])]


@pytest.fixture
def rig(bucket):
    storage = Storage(f"{bucket}/run")
    saver = Saver(storage, part_bytes=LEAST_PART_BYTES)
    yield Rig(storage, saver)
    saver.close()


def test_parts_go_up_together_and_ranges_come_down_together(rig, front):
    rig.commit(rig.save(1))
    up = [r for r in front.records() if r.method == "PUT" and "partNumber" in r.query]
    assert len(up) == 5
    assert max(r.began for r in up) < min(r.ended for r in up), "all at once"

    assert rig.newest() == 1
    down = [r for r in front.records() if r.method == "GET" and r.key.endswith(".pack")]
    assert len(down) == 11
    assert sum(r.received_bytes for r in down) == sum(t.nbytes for t in rig.state.values()), "no byte twice"


@pytest.mark.parametrize(
    "faults",
    [
        [{"method": "PUT", "key": "rank-0000.pack", "status": 503, "count": 4}],
        [{"method": "PUT", "key": "rank-0000.pack", "cut": "request", "after_bytes": MIB, "count": 2}],
        [{"method": "PUT", "key": "rank-0000.pack", "cut": "response", "count": 2}],
        [{"method": "POST", "key": "rank-0000.pack", "cut": "response", "count": 2}],
        [{"method": "PUT", "key": "manifest.json", "cut": "response", "count": 1}],
    ],
    ids=[
        "slow down",
        "cut while sending",
        "answers lost",
        "answers to begin and complete lost",
        "commit's answer lost",
    ],
)
def test_faults_while_saving_cost_time_only(rig, front, faults):
    for fault in faults:
        front.fault(**fault)

    rig.commit(rig.save(1))

    assert front.unused() == 0
    assert rig.newest() == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"method": "GET", "key": "rank-0000.pack", "status": 503, "count": 4},
        {"method": "GET", "key": "rank-0000.pack", "cut": "response", "after_bytes": MIB, "count": 3},
        {"method": "GET", "key": "manifest.json", "cut": "response", "after_bytes": 10, "count": 1},
    ],
    ids=["slow down", "cut in the middle", "manifest cut"],
)
def test_faults_while_loading_cost_time_only(rig, front, fault):
    rig.commit(rig.save(1))
    front.fault(**fault)

    assert rig.newest() == 1
    assert front.unused() == 0


def test_a_save_with_credentials_that_expired_fails_and_the_next_takes_new_ones(rig, front, monkeypatch):
    rig.commit(rig.save(1))
    other = Rig(rig.storage, Saver(rig.storage))
    try:
        with monkeypatch.context() as expired:
            expired.setenv("AWS_SECRET_ACCESS_KEY", "expired")
            failed = other.save(2)
        assert "could not be uploaded: PermissionError" in (failed.error or "")
        assert rig.newest() == 1
        other.commit(other.save(3))
    finally:
        other.saver.close()
    assert rig.newest() == 3


def test_keys_that_expired_before_a_load_are_told_and_no_older_checkpoint_is_taken_for_that(rig, front):
    state, ledger = trained(), Ledger()
    for step in (1, 2):
        rig.saver.start(step, "1-1-1", state.shards(0, 1))
        index = rig.saver.wait(100).index
        writer.commit(rig.storage, "1-1-1", Manifest(step, 0, "", {}, state.values()), [index])
    front.fault(method="GET", key=r"\.pack", status=400, code="ExpiredToken", count=1000)

    with pytest.raises(StorageError) as caught:
        restore_newest(fresh(), rig.storage, ledger, convert=False)

    assert str(caught.value).startswith(f"{rig.storage.url} could not be read: PermissionError: ")
    assert "\n" not in str(caught.value)
    assert ledger.said == []
    front.clear()
    found = restore_newest(fresh(), rig.storage, ledger, convert=False)
    assert found is not None
    assert found.step == 2


def test_what_a_killed_uploader_left_is_swept_once_a_newer_checkpoint_is_committed(rig):
    rig.commit(rig.save(1))
    bucket, _, base = rig.storage.root.partition("/")
    for step in (2, 4):
        rig.storage.fs.call_s3(
            "create_multipart_upload",
            Bucket=bucket,
            Key=f"{base}/checkpoints/step-{step:08d}/1-1-1/rank-0000.pack",
        )
    assert len(rig.unfinished()) == 2

    rig.commit(rig.save(3))
    Retention(rig.storage, Policy(last=1)).prune()

    assert [key.rpartition("checkpoints/")[2] for key in rig.unfinished()] == ["step-00000004/1-1-1/rank-0000.pack"]
    left = {path.rpartition("checkpoints/")[2] for path in rig.storage.fs.find(rig.storage.root)}
    assert left == {f"step-00000003/1-1-1/{name}" for name in ("rank-0000.pack", "rank-0000.index", "manifest.json")}
    assert rig.newest() == 3


def whole(*steps: int) -> list[str]:
    """The objects of these checkpoints."""
    names = ("manifest.json", "rank-0000.index", "rank-0000.pack")
    return [f"step-{step:08d}/1-1-1/{name}" for step in steps for name in names]


@pytest.mark.parametrize("point", UPLOADER_POINTS)
def test_uploaders_that_are_all_killed_cost_that_save_and_a_prune_removes_what_it_left(rig, point, monkeypatch):
    rig.commit(rig.save(1))
    other = Rig(rig.storage, Saver(rig.storage, part_bytes=LEAST_PART_BYTES))
    try:
        with monkeypatch.context() as planned:
            planned.setenv("ELASTIC_FAULTS", json.dumps([{"point": point, "do": "kill"}]))
            failed = other.save(2)
        left = rig.unfinished()
        why = "could not be uploaded: the uploader process was ended by SIGKILL, as those before"
        assert failed.error == f"checkpoints/step-00000002/1-1-1/rank-0000.pack {why}"
        assert len(left) == (point in ("upload.part", "upload.before_complete"))
        assert rig.newest() == 1

        other.commit(other.save(3))
    finally:
        other.saver.close()
    Retention(rig.storage, Policy(last=1)).prune()
    assert rig.newest() == 3
    assert rig.unfinished() == []
    assert rig.objects() == whole(3)


@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("point", KEEPER_POINTS)
def test_a_keeper_that_is_killed_anywhere_leaves_whole_checkpoints_and_the_next_prune_the_rest(rig, point):
    for step in (1, 2):
        rig.commit(rig.save(step))
    index = rig.save(4).index

    process = forked._context.Process(target=keep, args=(rig.storage.url, point, index, dict(os.environ)))
    process.start()
    process.join(60)

    assert process.exitcode == -9
    assert rig.newest() == (2 if point == "checkpoint.before_manifest" else 4)
    if point == "checkpoint.before_manifest":
        rig.commit(rig.save(5))
    Retention(rig.storage, Policy(last=1)).prune()
    assert rig.objects() == whole(rig.newest())
    assert rig.unfinished() == []


def test_a_prune_beside_a_save_leaves_its_unfinished_upload_alone(rig, front):
    for step in (1, 2):
        rig.commit(rig.save(step))
    front.fault(method="PUT", key="step-00000003.*partNumber=2(&|$)", delay_s=60)
    rig.begin(3)
    forked.wait_until(lambda: front.unused() == 0, "part 2 to be on its way")

    Retention(rig.storage, Policy(last=1)).prune()

    assert len(rig.unfinished()) == 1
    front.release()
    rig.commit(rig.saver.wait(100))
    assert rig.newest() == 3
    Retention(rig.storage, Policy(last=1)).prune()
    assert rig.objects() == whole(3)
    assert rig.unfinished() == []


def test_of_two_who_commit_one_step_at_one_moment_exactly_one_succeeds(rig):
    save = rig.save(1)
    start, outcomes = threading.Barrier(2), list[str]()

    def race(seed: int) -> None:
        start.wait(30)
        try:
            writer.commit(rig.storage, "1-1-1", Manifest(1, seed, "", {}, {}), [save.index])
            outcomes.append(f"won {seed}")
        except FileExistsError:
            outcomes.append("lost")

    threads = [threading.Thread(target=race, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert sorted(o.split()[0] for o in outcomes) == ["lost", "won"]
    winner = int(next(o for o in outcomes if o != "lost").split()[1])
    assert read_manifest(rig.storage, next(newest_first(rig.storage))).seed == winner


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "swap"])
@pytest.mark.parametrize("what", ["rank-0000.pack", "manifest.json"])
def test_any_damage_to_any_object_is_found_and_told(rig, damage, what):
    rig.commit(rig.save(1))
    rig.state["small"] += 1
    rig.commit(rig.save(2))
    newest, before = newest_first(rig.storage)
    name, data = f"{newest.folder}/{what}", rig.storage.read(f"{newest.folder}/{what}")
    if damage == "truncate":
        rig.storage.replace(name, data[:-1])
    elif damage == "flip":
        rig.storage.replace(name, data[:40] + bytes([data[40] ^ 1]) + data[41:])
    elif damage == "swap":
        rig.storage.replace(name, rig.storage.read(f"{before.folder}/{what}"))
    else:
        rig.storage.remove(name)

    listed = list(newest_first(rig.storage))

    if (damage, what) == ("delete", "manifest.json"):
        assert listed == [before]
        return
    with pytest.raises(CheckpointError, match=name):
        load_all(rig.storage, newest.folder, read_manifest(rig.storage, newest))


def test_a_pack_that_was_cut_short_or_is_gone_is_told(rig):
    rig.commit(rig.save(1))
    folder = next(newest_first(rig.storage)).folder
    manifest = read_manifest(rig.storage, next(newest_first(rig.storage)))
    pack = f"{folder}/rank-0000.pack"
    data = rig.storage.read(pack)

    rig.storage.replace(pack, data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=f"{pack} is too short for the tensor"):
        load_all(rig.storage, folder, manifest)
    reader = downloads.RangeReader(rig.storage)
    for start in (len(data) // 2 - 2, len(data)):
        with pytest.raises(CheckpointError, match=f"{pack} is too short"):
            reader.read(pack, start, [memoryview(bytearray(4))])
    rig.storage.remove(pack)
    with pytest.raises(CheckpointError, match=f"{pack} is missing"):
        reader.read(pack, 0, [memoryview(bytearray(4))])


def test_a_state_is_saved_and_loaded_without_a_run(bucket):
    state = {"a": torch.randn(10, 10), "b": torch.tensor(7)}

    save_state(f"{bucket}/model", 5, state, {"note": "x"})
    loaded, manifest = load_state(f"{bucket}/model")

    assert all(torch.equal(loaded[n], t) for n, t in state.items())
    assert manifest.values == {"note": "x"}
    with pytest.raises(FileExistsError):
        save_state(f"{bucket}/model", 5, state)
    with pytest.raises(CheckpointError, match="has no committed checkpoint of step 6"):
        load_state(f"{bucket}/model", step=6)
