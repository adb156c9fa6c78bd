"""The time of one world cut into segments, each with what it went into, from the rows of the world. Pure.

A row's `time` is that of its update; `step_s` is longer by what followed it: an evaluation, a save. Clocks of machines
differ, so segments are fitted into the world's own time, one after another, whatever their times say.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

from elastic.observe.causes import PRODUCTIVE

Parts = Mapping[str, float]


class Segment(NamedTuple):
    """Some of a world's time.

    Args:
        begin, end: unix seconds; of several that were put together, only how long they are together.
        shares: of its seconds, by cause; they add up to 1.
        redone: the world in which this step was done again.
        first, last: nothing of the world comes before, or after.
    """

    begin: float
    end: float
    shares: Parts
    redone: str | None = None
    first: bool = False
    last: bool = False


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
    if type(value) is float or type(value) is int:
        return float(value) if 0 < value < math.inf else 0.0
    return 0.0


def step_parts(row: dict[str, Any], eval_s: float, workers: int, deal: Deal) -> dict[str, float]:
    """What a step's seconds went into, averaged over the workers that computed it; nothing where it does not say.

    The row is that of one worker. Who has a microbatch less than others waits for them when gradients are summed: that
    is imbalance, not synchronisation.
    """
    step_s = number(row.get("step_s"))
    if step_s <= 0:
        return {}
    compute, sync = number(row.get("compute_s")), number(row.get("sync_s"))
    parts = {"data": number(row.get("data_s")), "evaluation": eval_s}
    for cause, column in _OF_STEPS:
        if column in row:
            parts[cause] = number(row[column])
    count = deal.microbatches
    if not count or workers < 1 or count < workers:
        parts[PRODUCTIVE], parts["sync"] = compute, sync
    else:
        most, own = -(-count // workers), count // workers  # of the busiest worker; of the first, whose row it is
        busy = min(compute if deal.padded else compute * most / own, compute + sync)
        parts[PRODUCTIVE] = useful = busy * count / (most * workers)
        parts["imbalance"], parts["sync"] = busy - useful, compute + sync - busy
    rest = step_s - sum(parts.values())
    if rest > 0:
        parts["other" if deal.complete else "unknown"] = rest
    return parts


_OF_STEPS = (("checkpoint", "checkpoint_s"), ("snapshot", "snapshot_s"))


def _shares(parts: Mapping[str, float]) -> Parts:
    whole = sum(parts.values())
    return {cause: part / whole for cause, part in parts.items() if part > 0} if whole > 0 else {"unknown": 1.0}


def _eval_s(row: dict[str, Any], evaluation: dict[str, Any] | None) -> float:
    """Of the evaluation, if it is a part of the step and not of what came after."""
    if evaluation is None:
        return 0.0
    seconds = number(evaluation.get("eval_s"))
    return seconds if number(row.get("other_s")) >= 0.999 * seconds else 0.0


def after_s(row: dict[str, Any], evaluation: dict[str, Any] | None) -> float:
    """How long a step went on after its update, which is the time of its row."""
    found = number(row.get("checkpoint_s")) + (number(row["snapshot_s"]) if "snapshot_s" in row else 0.0)
    return found if evaluation is None else found + _eval_s(row, evaluation)


class _Piece(NamedTuple):
    begin: float
    end: float
    parts: Parts
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
    *,
    together: bool = False,
) -> Iterator[Segment]:
    """All of the time of a world from `begin` to `end`, without a gap.

    Args:
        rows: of the world's steps.
        evaluations: of the world, by step.
        redone_in: for steps that were done again later, in which world.
        tail: the cause of what comes after the last row.
        workers: that train in it.
        together: steps that count are put together into one segment; there may be a hundred thousand.
    """
    cursor, first = begin, True
    totals: dict[str, float] = defaultdict(float)
    for piece in _pieces(rows, evaluations, redone_in, workers, deal):
        piece_begin, piece_end, parts, row, redone = piece
        at = cursor
        if piece_begin > cursor:  # one that was applied after the break is before it all the same
            at = min(piece_begin, max(cursor, end - max(0.0, piece_end - piece_begin)))
        if at > cursor:
            yield Segment(cursor, at, _gap(at - cursor, row, deal, first=first), first=first)
        stop = min(max(piece_end, at), end)
        if stop > at:
            whole = sum(parts.values()) if together and redone is None else 0.0
            if whole > 0:
                scale = (stop - at) / whole
                for cause, part in parts.items():
                    totals[cause] += part * scale
            else:
                yield Segment(at, stop, _shares(parts), redone)
        cursor, first = max(cursor, stop), False
    if totals:
        yield Segment(0.0, sum(totals.values()), _shares(totals))
    if end > cursor:
        shares = _gap(end - cursor, {}, deal, first=True) if first and tail == "form" else {tail: 1.0}
        yield Segment(cursor, end, shares, first=first, last=True)


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
        evaluation = evaluations.get(step)
        eval_s = _eval_s(row, evaluation)
        if eval_s:
            del apart[step]
        redone = redone_in.get(step)
        parts = {"redone": 1.0} if redone is not None else step_parts(row, eval_s, workers, deal)
        finish = row["time"] + after_s(row, evaluation)
        pieces.append(_Piece(finish - number(row.get("step_s")), finish, parts, row, redone))
    for evaluation in apart.values():
        seconds = number(evaluation.get("eval_s"))
        pieces.append(_Piece(evaluation["time"] - seconds, evaluation["time"], {"evaluation": 1.0}, {}, None))
    return sorted(pieces, key=itemgetter(1))


def _gap(seconds: float, row: dict[str, Any], deal: Deal, *, first: bool) -> Parts:
    """What came before a step: at the beginning of a world it was connected and the state restored."""
    rest = "form" if first else "other" if deal.complete else "unknown"
    parts, left = {}, seconds
    for cause, column in (("form", "connect_s"), ("restore", "restore_s"), ("held", "held_s")):
        parts[cause] = min(left, number(row.get(column)))
        left -= parts[cause]
    parts[rest] = parts.get(rest, 0.0) + left
    return _shares(parts) if sum(parts.values()) > 0 else {rest: 1.0}
