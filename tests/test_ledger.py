"""The append-only record of a run: written in two ways, read in one, and proof that every sample counted once."""

from __future__ import annotations

import errno
import json
import math
import os
import uuid

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.observe.ledger import (
    EVENTS,
    METRICS,
    LedgerFile,
    gaps_and_doubles,
    kept_history,
    read_records,
    read_tail,
    to_line,
)
from elastic.storage import Storage

B = 8  # global batch of the rows below


@pytest.fixture
def folder(tmp_path):
    return Storage(str(tmp_path / "run"))


@pytest.fixture
def objects():
    root = f"/{uuid.uuid4().hex}"
    yield Storage(f"memory:/{root}/run")
    memory = fsspec.filesystem("memory")
    if memory.exists(root):
        memory.rm(root, recursive=True)


@pytest.fixture(params=["folder", "objects"])
def storage(request):
    return request.getfixturevalue(request.param)


def _row(step, generation="1-1", **more):
    return {
        "step": step,
        "generation": generation,
        "first_position": (step - 1) * B,
        "count": B,
        "sample_hash": f"{step:016x}",
        "loss": 1 / step,
        **more,
    }


def _read(storage, name=METRICS):
    return [{k: v for k, v in record.items() if k != "format"} for record in read_records(storage, name)]


# ---- writing and reading ---------------------------------------------------------------------------------------


def test_a_ledger_that_was_never_written_is_empty(storage):
    assert read_records(storage, METRICS) == []


def test_what_was_added_is_read_back_in_order_before_and_after_compaction(storage):
    rows = [_row(step) for step in range(1, 6)]
    ledger = LedgerFile(storage, METRICS, epoch=1)
    for row in rows[:3]:
        ledger.add(row)
    ledger.flush()
    ledger.flush()
    ledger.add(rows[3])
    ledger.flush()
    ledger.add(rows[4])
    assert _read(storage) == rows[:4]

    ledger.compact()

    assert _read(storage) == rows
    assert storage.names() == [METRICS]
    assert all(record["format"] == 1 for record in read_records(storage, METRICS))


def test_a_later_claim_continues_the_ledger_of_an_earlier_one(storage):
    first = LedgerFile(storage, METRICS, epoch=1)
    first.add(_row(1))
    first.flush()  # this writer died without compacting
    second = LedgerFile(storage, METRICS, epoch=2)
    second.add(_row(2, "2-1"))
    second.compact()
    third = LedgerFile(storage, METRICS, epoch=3)
    third.add(_row(3, "3-1"))
    third.compact()

    assert _read(storage) == [_row(1), _row(2, "2-1"), _row(3, "3-1")]


@pytest.mark.parametrize("compacted", [False, True])
def test_the_newest_records_are_read_without_the_others(storage, compacted, monkeypatch):
    ledger, steps = LedgerFile(storage, METRICS, epoch=1), 20_000
    for step in range(1, steps + 1):
        ledger.add(_row(step))
        if step % 500 == 0:
            ledger.flush()
    if compacted:
        ledger.compact()
    whole, read = read_records(storage, METRICS), []
    plain = storage.read
    monkeypatch.setattr(storage, "read", lambda *place: read.append(plain(*place)) or read[-1])

    for count in (0, 1, 5, 700):
        assert read_tail(storage, METRICS, count) == whole[steps - count :]
    assert sum(map(len, read)) < 1 << 20, "the file has more than 3 MB"
    assert read_tail(storage, METRICS, 2 * steps) == whole


def test_the_tail_of_a_ledger_that_is_being_written_or_was_never(storage, folder):
    assert read_tail(storage, METRICS, 5) == []
    ledger = LedgerFile(folder, METRICS, epoch=1)
    ledger.add(_row(1))
    ledger.flush()
    folder.append(METRICS, b'{"step": 2, "loss": 0.')
    assert [r["step"] for r in read_tail(folder, METRICS, 5)] == [1]


def test_the_tail_after_a_broken_compaction_has_nothing_twice(objects, monkeypatch):
    ledger = LedgerFile(objects, METRICS, epoch=1)
    for step in (1, 2, 3):
        ledger.add(_row(step))
        ledger.flush()
        if step == 1:
            ledger.compact()
    with monkeypatch.context() as patch:
        patch.setattr(objects, "remove", lambda name: None)  # the segments survive, as if the writer died here
        ledger.compact()

    assert [r["step"] for r in read_tail(objects, METRICS, 9)] == [1, 2, 3]
    assert [r["step"] for r in read_tail(objects, METRICS, 2)] == [2, 3]


def test_rows_and_events_do_not_mix(storage):
    rows, events = LedgerFile(storage, METRICS, epoch=1), LedgerFile(storage, EVENTS, epoch=1)
    rows.add(_row(1))
    events.add({"kind": "run_started"})
    rows.flush()
    events.flush()

    assert _read(storage, METRICS) == [_row(1)]
    assert _read(storage, EVENTS) == [{"kind": "run_started"}]


def test_a_crash_between_the_two_halves_of_a_compaction_doubles_nothing_for_the_reader(objects, monkeypatch):
    ledger = LedgerFile(objects, METRICS, epoch=1)
    for step in (1, 2, 3):
        ledger.add(_row(step))
        ledger.flush()
    monkeypatch.setattr(objects, "remove", lambda name: None)  # the segments survive, as if the writer died here

    ledger.compact()

    assert objects.names() == [METRICS, f"{METRICS}.d"]
    assert _read(objects) == [_row(1), _row(2), _row(3)]


def test_the_next_compaction_after_such_a_crash_doubles_nothing_either(objects, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(objects, "remove", lambda name: None)
        first = LedgerFile(objects, METRICS, epoch=1)
        first.add(_row(1))
        first.compact()
    second = LedgerFile(objects, METRICS, epoch=2)
    second.add(_row(2))

    second.compact()

    assert _read(objects) == [_row(1), _row(2)]


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_tail_costs_the_torn_record_only(folder, cut):
    ledger = LedgerFile(folder, METRICS, epoch=1)
    for step in (1, 2, 3):
        ledger.add(_row(step))
    ledger.flush()
    whole = folder.read(METRICS)
    folder.replace(METRICS, whole[:-1] if cut == 1 else whole[:-cut])

    found = _read(folder)

    assert found == [_row(1), _row(2), _row(3)][: 3 if cut == 1 else 2]  # without its newline a record is still whole


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_what_is_written_after_a_torn_tail_is_not_torn_with_it(folder, cut):
    first = LedgerFile(folder, METRICS, epoch=1)
    first.add(_row(1))
    first.add(_row(2))
    first.flush()
    folder.replace(METRICS, folder.read(METRICS)[:-cut])

    second = LedgerFile(folder, METRICS, epoch=2)
    second.add(_row(2, "2-1"))
    second.add(_row(3, "2-1"))
    second.flush()

    assert _read(folder)[-2:] == [_row(2, "2-1"), _row(3, "2-1")]
    assert gaps_and_doubles(_read(folder), B) == []


@given(st.dictionaries(st.text(max_size=5), st.floats() | st.integers() | st.text(max_size=9) | st.none(), max_size=5))
def test_a_line_is_strict_json_whatever_the_numbers(record):
    line = to_line(record)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(line, parse_constant=refuse)
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert found == {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def test_a_number_that_is_not_finite_becomes_null_however_deep_it_lies():
    line = to_line({"kind": "restored", "detail": {"loss": math.nan, "all": [1.0, math.inf]}})

    assert json.loads(line) == {"kind": "restored", "detail": {"loss": None, "all": [1.0, None]}}


# ---- history ---------------------------------------------------------------------------------------------------


def test_of_a_step_that_was_done_again_the_highest_generation_is_kept():
    rows = [_row(1), _row(2), _row(3), _row(3, "1-10"), _row(3, "1-9"), _row(2, "1-2"), _row(4, "2-1")]

    kept = kept_history(rows)

    assert [(row["step"], row["generation"]) for row in kept] == [(1, "1-1"), (2, "1-2"), (3, "1-10"), (4, "2-1")]


def test_evaluation_rows_are_no_steps():
    rows = [_row(1), {"step": 1, "generation": "1-1", "eval/loss": 0.5}, _row(2)]

    assert [row["step"] for row in kept_history(rows)] == [1, 2]
    assert gaps_and_doubles(rows, B) == []


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(1, 9), st.integers(0, 29)), max_size=5))
def test_a_run_that_was_broken_off_and_repeated_anywhere_lost_and_doubled_nothing(steps, breaks):
    rows, step = [], 0
    for generation, (progress, back_to) in enumerate([*breaks, (steps, 0)], start=1):
        for _ in range(progress):
            if step < steps:
                step += 1
                rows.append(_row(step, f"1-{generation}"))
        if generation <= len(breaks):
            step = min(step, back_to)  # the next world starts from an earlier checkpoint

    assert gaps_and_doubles(rows, B) == []
    kept = kept_history(rows)
    assert [row["step"] for row in kept] == list(range(1, steps + 1))
    positions = [p for row in kept for p in range(row["first_position"], row["first_position"] + row["count"])]
    assert positions == list(range(steps * B))


@given(st.integers(2, 30), st.data())
def test_a_lost_step_is_found(steps, data):
    lost = data.draw(st.integers(1, steps - 1))
    rows = [_row(step) for step in range(1, steps + 1) if step != lost]

    assert gaps_and_doubles(rows, B) == [f"step {lost} is missing before step {lost + 1}"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"first_position": 0}, "step 2 took 8 positions from 0"),
        ({"count": B - 1}, "step 2 took 7 positions from 8"),
        ({"count": 2 * B}, "step 2 took 16 positions from 8"),
    ],
)
def test_samples_that_were_lost_or_taken_twice_are_found(changed, said):
    rows = [_row(1), {**_row(2), **changed}, _row(3)]

    assert gaps_and_doubles(rows, B) == [said]


def test_a_file_that_cannot_be_appended_to_gets_segments_until_it_can(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path / "run"))
    ledger = LedgerFile(storage, METRICS, 1)

    def record(step: int) -> None:
        ledger.add({"step": step})
        ledger.flush()

    def refuse(name: str, data: bytes) -> None:
        raise PermissionError(1, "Operation not permitted")

    record(1)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "append", refuse)
        record(2)
        assert [r["step"] for r in read_records(storage, METRICS)] == [1, 2]
    record(3)
    assert sorted(r["step"] for r in read_records(storage, METRICS)) == [1, 2, 3]
    ledger.compact()
    assert storage.names() == [METRICS]
    assert sorted(r["step"] for r in read_records(storage, METRICS)) == [1, 2, 3]


def test_what_was_appended_in_part_is_taken_back_so_that_it_can_be_tried_again(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path / "run"))
    storage.append("file", b"first\n")
    write = os.write

    def fill(fd: int, data: bytes) -> int:
        if len(data) > 2:
            return write(fd, data[: len(data) - 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill)
        with pytest.raises(OSError, match="No space left"):
            storage.append("file", b"second\n")
    assert storage.read("file") == b"first\n"
    storage.append("file", b"second\n")
    assert storage.read("file") == b"first\nsecond\n"
