"""Rows on their way from a worker to the ledger: each arrives, and counts once, whatever is lost in between."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elastic.membership.outbox import Outbox, Outgoing, row_key
from elastic.membership.protocol import Done, Rows, Share
from elastic.membership.world import Generation
from elastic.run.record import Record, Spans


def row(step: int, generation: str = "1-1", **more: object) -> dict:
    return {"step": step, "generation": generation, "time": float(step), "step_s": 0.5, "sample_hash": "0", **more}


def evaluation(step: int, generation: str = "1-1") -> dict:
    return {"step": step, "generation": generation, "time": float(step), "eval/loss": 1.0}


WORLD = Generation(1, 1)
SHARE = Share(4, "1-1-a", 1, {}, None, None, False, {})


def taken(outbox: Outbox) -> list[Outgoing]:
    messages = []
    while (said := outbox.take()) is not None:
        messages.append(said)
    return messages


def kinds(messages: list[Outgoing]) -> list[type]:
    return [type(message) for message, _ in messages]


@given(st.lists(st.integers(0, 60)))
def test_spans_are_a_set_of_numbers(numbers: list[int]) -> None:
    spans, known = Spans(), set()
    for number in numbers:
        assert spans.add(number) == (number not in known)
        known.add(number)


@given(st.lists(st.sampled_from(["step", "evaluate", "send", "flush", "confirm", "crash"]), max_size=60))
def test_every_row_reaches_the_ledger_once(happens: list[str]) -> None:
    """The server writes and confirms now and then, and dies with what it has not written or confirmed."""
    outbox, record, step = Outbox(), Record(1), 0
    ledger: list[dict] = []
    received: list[dict] = []
    to_confirm: list[tuple] = []
    outbox.report(WORLD)

    def send() -> None:
        for message, _ in taken(outbox):
            for r in message.rows:
                to_confirm.append(row_key(r))
                if record.take_row(r):
                    received.append(r)

    def flush() -> None:
        ledger.extend(received)
        received.clear()

    for what in [*happens, "crash", "send", "flush"]:
        if what == "step":
            step += 1
            outbox.record(row(step), WORLD, report=True)
        elif what == "evaluate" and step:
            outbox.record(evaluation(step), WORLD, report=True)
        elif what == "send":
            send()
        elif what == "flush":
            flush()
        elif what == "confirm":
            flush()
            outbox.recorded(to_confirm)
            to_confirm.clear()
        elif what == "crash":
            received.clear()
            to_confirm.clear()
            record = Record(1)
            record.replay([r for r in ledger if "sample_hash" in r or "eval/loss" in r], [])
            outbox.resend(WORLD)

    keys = [row_key(r) for r in ledger]
    assert len(keys) == len(set(keys))
    assert [r["step"] for r in ledger if "sample_hash" in r] == list(range(1, step + 1))


def test_who_does_not_report_keeps_rows_in_case_it_must() -> None:
    outbox = Outbox()
    for step in (1, 2, 3):
        outbox.record(row(step), WORLD, report=False)
    assert taken(outbox) == []
    outbox.recorded([("1-1", 1, False)])
    outbox.left_world()

    outbox.report(Generation(1, 2))

    ((message, generation),) = taken(outbox)
    assert generation == Generation(1, 2)
    assert [row_key(row) for row in message.rows] == [("1-1", 2, False), ("1-1", 3, False)]


def test_a_row_that_was_recorded_before_this_worker_had_it_is_not_kept() -> None:
    outbox = Outbox()
    outbox.recorded([("1-1", 1, False)])
    outbox.record(row(1), WORLD, report=False)
    outbox.report(WORLD)

    assert taken(outbox) == []


def test_a_share_of_a_checkpoint_is_said_again_after_the_rows_until_it_is_decided_on() -> None:
    outbox = Outbox()
    outbox.report(WORLD)
    outbox.record(row(4), WORLD, report=True)
    outbox.put(SHARE, WORLD)
    assert kinds(taken(outbox)) == [Rows, Share]
    assert outbox.waiting

    outbox.resend(WORLD)
    assert kinds(taken(outbox)) == [Rows, Share]

    outbox.decided(4, "1-1-a")
    outbox.resend(WORLD)
    assert kinds(taken(outbox)) == [Rows]
    assert not outbox.waiting


def test_a_share_of_a_checkpoint_goes_with_its_world_and_an_outcome_stays_until_the_run_is_over() -> None:
    outbox = Outbox()
    outbox.put(SHARE, WORLD)
    outbox.put(Done(0, "finished", "", {}), WORLD)
    taken(outbox)
    outbox.left_world()
    outbox.resend(WORLD)
    assert kinds(taken(outbox)) == [Done]

    outbox.over()
    assert not outbox.waiting


def test_a_restarted_keeper_knows_what_the_ledger_says() -> None:
    rows = [row(1), row(2), row(3, "1-2", time=9.0), row(7, "2-1"), evaluation(2)]
    events = [
        {"kind": "run_started", "generation": "1-0", "time": 0.0, "step": 40},
        {"kind": "world_formed", "generation": "1-1", "time": 0.5, "detail": {"size": 3}},
        {"kind": "member_lost", "generation": "1-0", "time": 1.0, "member": "spare"},
        {"kind": "member_lost", "generation": "1-1", "time": 2.5, "member": "b"},
        {"kind": "world_formed", "generation": "1-2", "time": 3.0, "detail": {"size": 2}},
        {"kind": "world_broken", "generation": "1-2", "time": 8.0},
        {"kind": "world_formed", "generation": "1-2", "time": 8.0, "detail": {"size": 2}},
        {"kind": "checkpoint_committed", "generation": "1-2", "time": 9.0, "step": 3, "detail": {"attempt": "1-2-x"}},
        {"kind": "world_formed", "generation": "2-1", "time": 5.0, "detail": {"size": 9}},
    ]
    record = Record(1)

    record.replay(rows, events)

    assert record.last_row == rows[2]
    assert record.last_eval == {"eval/loss": 1.0}
    assert record.stalls == [{"step": 3, "seconds": 6.5}]
    assert (record.started, record.claim_step, record.worlds) == (0.0, 40, 2)
    assert record.gone == {"spare", "b"}
    assert record.faults == 1, "a world that broke lost nobody by itself"
    assert record.committed == {(3, "1-2-x")}
    assert not record.take_row(row(2))
    assert record.take_row(row(2, "1-2"))


def test_an_evaluation_that_a_broken_world_repeats_counts_once_and_one_after_lost_steps_again() -> None:
    record = Record(1)
    first = [row(1), row(2), evaluation(3), row(3)]  # in the order in which a worker says them
    assert all(map(record.take_row, first))
    assert not record.take_row(evaluation(3, "1-2")), "some had ended with it when the world broke"
    assert record.evaluated_step == 3

    again = [row(2, "1-3"), evaluation(3, "1-3"), row(3, "1-3")]
    assert all(map(record.take_row, again))

    record.restored(3)
    assert not record.take_row(evaluation(3, "1-4")), "the same state is evaluated again"
    record.restored(2)
    assert all(map(record.take_row, [evaluation(3, "1-5"), row(3, "1-5")])), "the step before it was the last one left"

    fresh = Record(1)
    restored = {"kind": "restored", "time": 3.5, "step": 2, "generation": "1-2", "detail": {"rung": "snapshot"}}
    rows = [row(1), row(2), evaluation(3), row(3)]
    for i, one in enumerate(rows):
        one["time"] = float(i)
    fresh.replay([*rows, {**evaluation(3, "1-2"), "time": 4.0, "eval/loss": 0.5}], [restored])
    assert fresh.last_eval == {"eval/loss": 0.5}
