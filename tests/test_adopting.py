"""A run that goes on from another run's checkpoint, with its own options."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic.checkpoint.reader import newest_first, read_manifest
from elastic.errors import CheckpointError
from elastic.observe.ledger import gaps_and_doubles
from elastic.run.folder import RunFolder
from elastic.storage import Storage
from elastic.tools.adopting import adopt, adopted
from tests.forked import B, Ran, configure, train
from tests.tiny_jobs import Plain

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.usefixtures("fork_server")]


def folder(tmp_path: Path, name: str) -> RunFolder:
    return RunFolder(Storage(str(tmp_path / name)))


def half(tmp_path: Path, name: str, **options: object) -> Ran:
    ran = train(Plain(**options), configure(tmp_path, name, run__stop_after="6st"), workers=1)
    assert ran.failure is None
    return ran


def other_half(tmp_path: Path, name: str, **options: object) -> Ran:
    ran = train(Plain(**options), configure(tmp_path, name, run__allow_change=("job.lr",)), workers=2)
    assert ran.failure is None
    return ran


def test_it_goes_on_as_the_other_would_have_with_these_options_and_counts_each_sample_once(tmp_path):
    first, other = half(tmp_path, "first", lr=0.01), half(tmp_path, "other", lr=0.05)
    assert first.sha != other.sha

    for _ in range(2):  # the second time there is nothing to do
        adopt(folder(tmp_path, "first"), folder(tmp_path, "other"), 6, timeout_s=1)

    storage, source = Storage(str(tmp_path / "first")), str(tmp_path / "other")
    assert adopted(storage, 6, source)
    assert not adopted(storage, 6, str(tmp_path / "another"))
    assert len([c for c in newest_first(storage) if "adopts" in c.attempt]) == 1
    ran, twin = other_half(tmp_path, "first", lr=0.02), other_half(tmp_path, "other", lr=0.02)
    assert ran.sha == twin.sha
    assert gaps_and_doubles(ran.rows, B) == []
    assert adopted(storage, 6, source)


def test_tensors_are_the_others_and_options_of_the_optimizer_its_own(tmp_path):
    half(tmp_path, "first", lr=0.01)
    theirs = half(tmp_path, "other", lr=0.03).state()

    adopt(folder(tmp_path, "first"), folder(tmp_path, "other"), 6, timeout_s=1)

    storage = folder(tmp_path, "first").storage
    values = read_manifest(storage, next(newest_first(storage))).values
    assert [list(group) for group in values["groups"]] == [["params"]]
    assert values["states"] == theirs["values"]["states"]


def test_what_never_comes_is_not_waited_for_for_ever(tmp_path):
    half(tmp_path, "first")

    with pytest.raises(CheckpointError, match="waited 0 s for the checkpoint of step 7"):
        adopt(folder(tmp_path, "first"), folder(tmp_path, "first"), 7, timeout_s=0)


def test_another_model_is_refused(tmp_path):
    half(tmp_path, "first")
    half(tmp_path, "other", width=8)

    with pytest.raises(CheckpointError, match=r"has model/0.bias of shape \(8,\).*same model"):
        adopt(folder(tmp_path, "first"), folder(tmp_path, "other"), 6, timeout_s=1)

    assert not adopted(folder(tmp_path, "first").storage, 6, str(tmp_path / "other"))
