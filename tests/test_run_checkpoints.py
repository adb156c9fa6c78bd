"""What the keeper makes of the shares of a checkpoint, of who sends them late or twice, and of another claim."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from elastic.checkpoint.cadence import auto_interval, save_interval
from elastic.checkpoint.reader import newest_first
from elastic.checkpoint.retention import Policy
from elastic.checkpoint.saver import Saver
from elastic.checkpoint.tensors import Shard
from elastic.membership.protocol import Commit, HostMessage, RestorePoint, Share, Wished
from elastic.membership.world import Generation
from elastic.run.checkpoints import Checkpoints, Keeping
from elastic.run.record import Record
from elastic.storage import Storage

RANKS = {"a": 0, "b": 1}
HEADER = {"seed": 0, "config_digest": "d", "values": {}}


class Office:
    """A keeper without threads and without a server: what was noted and told."""

    def __init__(self, storage: Storage, *, every_s: float | None = None, **policy: Any):
        self.noted: list[tuple[str, dict[str, Any]]] = []
        self.told: list[HostMessage] = []
        self.owned, self.flushed = True, 0
        self.record = Record(1)
        keeping = Keeping(
            lambda kind, **fields: self.noted.append((kind, fields)),
            self.told.append,
            lambda: self.owned,
            lambda: not self.owned,
            self._flush,
        )
        self.checkpoints = Checkpoints(storage, 1, Policy(**policy), every_s, self.record, keeping)

    def _flush(self) -> None:
        self.flushed += 1

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.noted]

    def take(self, member: str, message: Share) -> None:
        self.checkpoints.take_share(member, Generation(1, 1), message, RANKS)


@pytest.fixture
def storage(tmp_path):
    found = Storage(str(tmp_path / "run"))
    found.in_process = True
    return found


def share(storage: Storage, step: int, rank: int = 0, shares: int = 1, **changed: Any) -> Share:
    """What a worker says when its bytes are durable."""
    saver, name = Saver(storage), f"1-1-{step}"
    try:
        saver.start(step, name, [Shard.whole(f"t{rank}", torch.ones(5))], rank=rank)
        save = saver.wait(60)
    finally:
        saver.close()
    header = HEADER if rank == 0 else None
    return replace(Share(step, name, shares, save.index, header, None, False, save.facts), **changed)


def steps(storage: Storage) -> list[int]:
    return [c.step for c in newest_first(storage)]


def test_a_checkpoint_is_committed_when_all_have_sent_their_share_and_all_are_told(storage):
    office = Office(storage)
    office.take("b", share(storage, 3, rank=1, shares=2))
    assert (steps(storage), office.told) == ([], [])

    office.take("a", share(storage, 3, rank=0, shares=2))

    assert steps(storage) == [3]
    assert office.told == [Commit(3, "1-1-3")]
    assert office.kinds == ["checkpoint_committed"]
    assert office.flushed == 1, "no committed step is missing in the ledger"
    assert office.checkpoints.restore == RestorePoint(3, "1-1-3")


def test_a_share_that_is_sent_again_is_answered_again_and_commits_nothing_twice(storage):
    office, message = Office(storage), share(storage, 3)
    office.take("a", message)
    office.take("a", message)

    assert office.kinds == ["checkpoint_committed"]
    assert [m.error for m in office.told] == [None, None]


def test_a_share_that_failed_fails_the_attempt_for_all_who_send_theirs_later(storage):
    office = Office(storage)
    office.take("b", share(storage, 3, rank=1, shares=2, error="no memory"))
    office.take("a", share(storage, 3, rank=0, shares=2))

    assert steps(storage) == []
    assert office.kinds == ["checkpoint_failed"]
    assert [m.error for m in office.told] == ["no memory", "no memory"]
    assert office.checkpoints.failed == {"step": 3, "error": "no memory"}


def test_shares_of_a_world_that_is_over_do_not_make_a_checkpoint_whole(storage):
    office = Office(storage)
    office.take("a", share(storage, 3, rank=0, shares=2))
    office.checkpoints.world_formed(Generation(1, 2))
    office.take("b", share(storage, 3, rank=1, shares=2))

    assert steps(storage) == []


def test_a_fenced_keeper_commits_nothing(storage):
    office = Office(storage)
    office.owned = False
    office.take("a", share(storage, 3))

    assert steps(storage) == []
    assert office.told[0].error == "a newer claim owns the run"


def test_two_keepers_that_commit_one_attempt_agree_on_one(storage):
    one, other, message = Office(storage), Office(storage), share(storage, 3)
    one.take("a", message)
    other.take("a", message)

    assert one.kinds == ["checkpoint_committed"]
    assert other.kinds == ["checkpoint_failed"]
    assert "FileExistsError" in other.told[0].error
    assert steps(storage) == [3]


def test_a_restarted_keeper_knows_what_the_one_before_committed(storage):
    before, message = Office(storage), share(storage, 3)
    before.take("a", message)
    after = Office(storage)
    after.checkpoints.recovered(None)
    after.take("a", message)

    assert after.told == [Commit(3, "1-1-3")]
    assert after.kinds == ["checkpoint_committed"]
    assert after.record.committed == {(3, "1-1-3")}


def test_what_the_policy_does_not_keep_goes_with_each_commit(storage):
    office = Office(storage, last=2, every=3)
    for step in range(1, 8):
        office.take("a", share(storage, step))
    assert steps(storage) == [7, 6, 3]


def test_a_wish_comes_once_an_interval_and_not_outside_of_a_world(storage):
    office = Office(storage, every_s=0.0)
    first = office.checkpoints.due_at
    office.checkpoints.wish(True)
    office.checkpoints.wish(False)

    assert office.told == [Wished("save", "it is time")]
    assert (math.isfinite(first), office.checkpoints.due_at) == (True, math.inf)
    office.take("a", share(storage, 3))
    assert math.isfinite(office.checkpoints.due_at), "the next is due an interval after this one"
    assert Office(storage).checkpoints.due_at == math.inf, "steps say when"


def test_auto_goes_by_costs_and_faults_and_a_time_by_the_clock():
    assert save_interval(None, [1.0], 100, 3) == math.inf
    assert save_interval(7.5, [1.0], 100, 3) == 7.5
    assert save_interval(0.0, [1.0], 100, 3) == auto_interval([1.0], 100, 3)


def test_room_is_made_of_what_nobody_writes_to_any_more_and_of_what_the_policy_lets_go(storage):
    office = Office(storage, last=2)
    for step in (3, 6):
        office.take("a", share(storage, step))
    office.checkpoints.world_formed(Generation(1, 2))
    for name in ("1-1-3", "1-2-1", "1-2-2"):  # of a world before, one that failed, and one that is under way
        storage.replace(f"checkpoints/step-00000009/{name}/rank-0000.pack", b"bytes")
    failed = share(storage, 6, attempt="1-2-1", error="full")
    failed = replace(failed, step=9)
    office.checkpoints.take_share("a", Generation(1, 2), failed, RANKS)

    office.checkpoints.make_room(9)

    kind, made = office.noted[-1]
    assert kind == "room_made"
    assert [name.rpartition("/")[2] for name in made["detail"]["removed"]] == ["1-2-1", "1-1-3", "1-1-3"]
    assert storage.names("checkpoints/step-00000009") == ["1-2-2"]
    assert steps(storage) == [6]
