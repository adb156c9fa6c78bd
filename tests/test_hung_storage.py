"""A file system that hangs: a call that never returns. Here it is a FIFO that nobody reads, where it really is so."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastic.errors import StorageHung
from elastic.observe.ledger import METRICS, LedgerFile, gaps_and_doubles, read_records
from elastic.run import answering
from elastic.run.answering import AnsweringStorage
from elastic.run.prepare import prepare
from elastic.storage import Storage
from tests.forked import WAIT_S, B, Ran, Watch, configure, fault, local_run, plan, wait_until
from tests.test_bits import assert_same_training
from tests.tiny_jobs import Everything


@pytest.fixture(autouse=True)
def shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "HUNG_S", 0.5)
    monkeypatch.setattr(answering, "AGAIN_S", 0.2)


def helpers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "keeper-storage"]


@contextmanager
def hanging(path: Path) -> Iterator[None]:
    """Whoever opens this file to write to it hangs, until the end; then it is what it was before."""
    aside = path.with_name("aside")
    if path.exists():
        path.rename(aside)
    fifo = path.with_name("fifo")
    os.mkfifo(fifo)
    os.link(fifo, path)
    try:
        yield
    finally:
        if aside.exists():
            aside.rename(path)
        else:
            path.unlink()
        before = helpers()
        reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # who hangs comes back
        wait_until(lambda: not all(helper.is_alive() for helper in before), "whoever hangs")
        os.close(reading)
        fifo.unlink()


def test_what_does_not_answer_is_left_behind_and_told(tmp_path: Path) -> None:
    told: list[str] = []
    storage = AnsweringStorage(Storage(str(tmp_path)), told.append)
    storage.append("whole", b"one")
    with hanging(tmp_path / "metrics.jsonl"):
        with pytest.raises(StorageHung, match=r"did not answer for 0.5 s, asked to append to metrics.jsonl"):
            storage.append("metrics.jsonl", b"x")
        assert len(told) == 1
        with pytest.raises(StorageHung, match=r"for 0.2 s"):  # nothing has answered since
            storage.append("metrics.jsonl", b"x")
        storage.append("whole", b"two")
    assert storage.read("whole") == b"onetwo"
    with pytest.raises(FileNotFoundError):
        storage.read("none")
    storage.close()


def test_a_create_that_is_done_after_all_is_no_other_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, later = AnsweringStorage(Storage(str(tmp_path)), lambda _: None), threading.Event()
    at_once = Storage.create

    def create(self: Storage, name: str, data: bytes) -> None:
        later.wait(WAIT_S)
        at_once(self, name, data)

    with monkeypatch.context() as slow:
        slow.setattr(Storage, "create", create)
        with pytest.raises(StorageHung):
            storage.create("manifest", b"ours")
        later.set()
        wait_until((tmp_path / "manifest").exists, "the create that was left behind")
    storage.create("manifest", b"ours")
    with pytest.raises(FileExistsError):
        storage.create("manifest", b"another's")
    storage.close()


def test_rows_that_are_written_after_all_are_read_once(tmp_path: Path) -> None:
    storage = AnsweringStorage(Storage(str(tmp_path)), lambda _: None)
    ledger = LedgerFile(storage, METRICS, 1)
    ledger.add({"step": 1})
    ledger.flush()
    with hanging(tmp_path / METRICS):
        ledger.add({"step": 2})
        ledger.flush()
    with (tmp_path / METRICS).open("a") as file:  # by who was left behind
        file.write('{"format": 1, "step": 2}\n')
    ledger.add({"step": 3})
    ledger.flush()
    assert [r["step"] for r in read_records(storage, METRICS)] == [1, 2, 3]
    ledger.compact()
    assert [r["step"] for r in read_records(storage, METRICS)] == [1, 2, 3]
    storage.close()


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_a_run_whose_ledger_hangs_goes_on_and_says_so(undisturbed: Ran, tmp_path: Path, gate) -> None:
    first, second = gate("first"), gate("second")
    faults = [fault("step.forward", 6, 0, "hold", file=first), fault("step.forward", 9, 0, "hold", file=second)]
    run, watch = prepare(Everything(), configure(tmp_path, "run", scaling__max_workers=2)), Watch()
    with local_run(run, 2, on_record=watch, environment=plan(*faults)) as local:
        watch.wait_for_step(5)
        with hanging(tmp_path / "run" / METRICS):
            first.unlink()
            hung = watch.wait_for(lambda r: r.get("kind") == "storage_hung")
            watch.wait_for_step(8)
        second.unlink()
        local.wait(WAIT_S)

    ran = Ran(run, None)
    assert hung["detail"].endswith("did not answer for 0.5 s, asked to append to metrics.jsonl")
    assert [e["detail"] for e in ran.events("storage_hung")] == [hung["detail"]]
    assert not ran.events("ledger_not_written")
    assert gaps_and_doubles(ran.rows, B) == []
    assert [r["step"] for r in ran.rows if "sample_hash" in r] == list(range(1, 13))
    assert_same_training(ran, undisturbed)
