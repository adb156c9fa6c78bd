"""The time of one world cut into segments, each with what it went into, from the rows of the world. Pure.

A row's `time` is that of its update; `step_s` is longer by what followed it: an evaluation, a save. Clocks of machines
differ, so segments are fitted into the world's own time, one after another, whatever their times say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from elastic.observe.causes import PRODUCTIVE

Parts = Mapping[str, float]


class Segment(NamedTuple):
    """Some of a world's time.

    Args:
        begin, end: unix seconds.
        shares: of its seconds, by cause; they add up to 1.
        redone: the world in which this step was done again.
    """

    begin: float
    end: float
    shares: Parts
    redone: str | None = None


@dataclass(frozen=True)
class Deal:
    """How a step's microbatches are dealt, as far as it is known.

    Args:
        microbatches: V; None where it is not known.
        padded: whoever has fewer passes than others makes as many nevertheless.
        complete: the ledger tells of evaluations, holds and snapshots.
    """

    microbatches: int | None = None
    padded: bool = False
    complete: bool = False


def number(value: Any) -> float:
    """Of seconds in a record: 0 for what is none."""
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        return float(value) if 0 < value < math.inf else 0.0
    return 0.0


def step_shares(row: dict[str, Any], eval_s: float, workers: int, deal: Deal) -> Parts:
    """What a step's seconds went into, averaged over the workers that computed it.

    The row is that of one worker. Who has a microbatch less than others waits for them when gradients are summed: that
    is imbalance, not synchronisation.
    """
    step_s = number(row.get("step_s"))
    if step_s <= 0:
        return {"unknown": 1.0}
    compute, sync = number(row.get("compute_s")), number(row.get("sync_s"))
    parts = {
        "data": number(row.get("data_s")),
        "checkpoint": number(row.get("checkpoint_s")),
        "snapshot": number(row.get("snapshot_s")),
        "evaluation": eval_s,
        **_computed(compute, sync, workers, deal),
    }
    rest = "other" if deal.complete else "unknown"
    parts[rest] = max(0.0, step_s - sum(parts.values()))
    whole = sum(parts.values())
    return {cause: seconds / whole for cause, seconds in parts.items() if seconds > 0}


def _computed(compute: float, sync: float, workers: int, deal: Deal) -> dict[str, float]:
    count = deal.microbatches
    if not count or workers < 1 or count < workers:
        return {PRODUCTIVE: compute, "sync": sync}
    most, own = -(-count // workers), count // workers  # of the busiest worker; of the first, whose row it is
    busy = min(compute if deal.padded else compute * most / own, compute + sync)
    useful = busy * count / (most * workers)
    return {PRODUCTIVE: useful, "imbalance": busy - useful, "sync": compute + sync - busy}


def _eval_s(row: dict[str, Any], evaluation: dict[str, Any] | None) -> float:
    """Of the evaluation, if it is a part of the step and not of what came after."""
    seconds = number(evaluation.get("eval_s")) if evaluation is not None else 0.0
    return seconds if number(row.get("other_s")) >= 0.999 * seconds else 0.0


def after_s(row: dict[str, Any], evaluation: dict[str, Any] | None) -> float:
    """How long a step went on after its update, which is the time of its row."""
    return _eval_s(row, evaluation) + number(row.get("checkpoint_s")) + number(row.get("snapshot_s"))


class _Piece(NamedTuple):
    begin: float
    end: float
    shares: Parts
    row: dict[str, Any]
    redone: str | None


def world_segments(
    begin: float,
    end: float,
    rows: Sequence[dict[str, Any]],
    evaluations: Mapping[int, dict[str, Any]],
    redone_in: Mapping[int, str],
    tail: str,
    workers: int,
    deal: Deal,
) -> Iterator[Segment]:
    """All of the time of a world from `begin` to `end`, without a gap.

    Args:
        rows: of the world's steps.
        evaluations: of the world, by step.
        redone_in: for steps that were done again later, in which world.
        tail: the cause of what comes after the last row.
        workers: that train in it.
    """
    cursor, first = begin, True
    for piece in _pieces(rows, evaluations, redone_in, workers, deal):
        length = max(0.0, piece.end - piece.begin)
        at = min(max(piece.begin, cursor), max(cursor, end - length))  # one that was applied after the break is before
        if at > cursor:
            yield Segment(cursor, at, _gap(at - cursor, piece.row, deal, first=first))
        stop = min(max(piece.end, at), end)
        if stop > at:
            yield Segment(at, stop, piece.shares, piece.redone)
        cursor, first = max(cursor, stop), False
    if end > cursor:
        shares = _gap(end - cursor, {}, deal, first=True) if first and tail == "form" else {tail: 1.0}
        yield Segment(cursor, end, shares)


def _pieces(
    rows: Sequence[dict[str, Any]],
    evaluations: Mapping[int, dict[str, Any]],
    redone_in: Mapping[int, str],
    workers: int,
    deal: Deal,
) -> list[_Piece]:
    pieces, apart = [], dict(evaluations)
    for row in rows:
        step = row["step"]
        eval_s = _eval_s(row, apart.get(step))
        if eval_s:
            del apart[step]
        shares = step_shares(row, eval_s, workers, deal)
        finish = row["time"] + after_s(row, evaluations.get(step))
        redone = redone_in.get(step)
        if redone is not None:
            shares = {"redone": 1.0}
        pieces.append(_Piece(finish - number(row.get("step_s")), finish, shares, row, redone))
    for evaluation in apart.values():
        seconds = number(evaluation.get("eval_s"))
        pieces.append(_Piece(evaluation["time"] - seconds, evaluation["time"], {"evaluation": 1.0}, {}, None))
    return sorted(pieces, key=lambda piece: piece.end)


def _gap(seconds: float, row: dict[str, Any], deal: Deal, *, first: bool) -> Parts:
    """What came before a step: at the beginning of a world it was connected and the state restored."""
    rest = "form" if first else "other" if deal.complete else "unknown"
    parts, left = {}, seconds
    for cause, column in (("form", "connect_s"), ("restore", "restore_s"), ("held", "held_s")):
        parts[cause] = min(left, number(row.get(column)))
        left -= parts[cause]
    parts[rest] = parts.get(rest, 0.0) + left
    whole = math.fsum(parts.values())
    return {cause: part / whole for cause, part in parts.items() if part > 0} if whole > 0 else {rest: 1.0}
