"""Cuts the time of one world into segments and says what each was spent on, from the rows of the world. Pure.

The `time` of a row is that of its update; what followed the update, such as an evaluation or a save, is part of
`step_s` too. The clocks of machines differ, so segments are fitted into the world's own time, one after another,
whatever their times say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from elastic.observe.causes import PRODUCTIVE
from elastic.observe.columns import columns
from elastic.placement import pipelines

_OF_STEPS = ("compute_s", "sync_s", "data_s", "checkpoint_s", "snapshot_s")
_OF_GAPS = {"form": "connect_s", "restore": "restore_s", "held": "held_s"}  # the names in a row, by cause
Parts = Mapping[str, float]
Column = np.ndarray[Any, np.dtype[np.float64]]  # one value per piece


class Segment(NamedTuple):
    """A part of a world's time.

    Args:
        begin, end: unix seconds. For steps that were put together only the difference counts.
        shares: of its seconds, by cause; they add up to 1.
        redone: the world in which this step was done again.
        first, last: it is the first or the last one of the world.
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
        microbatches: in a step; None if it is not known.
        padded: workers with fewer passes than others make up the number with passes that count for nothing.
        complete: the ledger has the seconds of evaluations, holds and snapshots.
        cell_size: workers that run a microbatch together.
        stages: the fewest of a pipeline; 1 without pipelines.
    """

    microbatches: int | None = None
    padded: bool = False
    complete: bool = False
    cell_size: int = 1
    stages: int = 1


def number(value: Any) -> float:
    """Return seconds from a record: 0 for a value that is no positive finite number."""
    if type(value) is float or type(value) is int:
        return float(value) if 0 < value < math.inf else 0.0
    return 0.0


def _eval_s(row: dict[str, Any], evaluation: dict[str, Any] | None) -> float:
    """Return the seconds of an evaluation that is part of the step; 0 if it came after the step."""
    if evaluation is None:
        return 0.0
    seconds = number(evaluation.get("eval_s"))
    return seconds if number(row.get("other_s")) >= 0.999 * seconds else 0.0


def after_s(row: dict[str, Any], evaluation: dict[str, Any] | None) -> float:
    """Return the seconds that a step went on after its update, which is the time of its row."""
    found = number(row.get("checkpoint_s")) + (number(row["snapshot_s"]) if "snapshot_s" in row else 0.0)
    return found if evaluation is None else found + _eval_s(row, evaluation)


@dataclass(frozen=True)
class _Pieces:
    """What a world did, one piece after another: its steps, and the evaluations that are not part of a step.

    Each field has one value for each of the n pieces, in the order in which they ended.

    Args:
        begin, end: unix seconds, float64 [n].
        parts: what the seconds were spent on, by cause, float64 [n] each; only their ratios matter.
        gaps: what the seconds before them were spent on, as far as their rows say it, by cause, float64 [n] each.
        redone: the world in which the step was done again.
    """

    begin: Column
    end: Column
    parts: dict[str, Column]
    gaps: dict[str, Column]
    redone: list[str | None]

    @classmethod
    def of(
        cls,
        rows: Sequence[dict[str, Any]],
        evaluations: Mapping[int, dict[str, Any]],
        redone_in: Mapping[int, str],
        workers: int,
        deal: Deal,
    ) -> _Pieces:
        """Make the pieces of a world. The arguments are those of `world_segments`."""
        eval_s, apart = np.zeros(len(rows)), dict(evaluations)
        if evaluations:
            for i, row in enumerate(rows):
                if row["step"] in evaluations and (seconds := _eval_s(row, evaluations[row["step"]])):
                    eval_s[i] = seconds
                    del apart[row["step"]]
        found = _columns(rows, "step_s", *_OF_STEPS, *_OF_GAPS.values())
        parts = _step_parts(found, eval_s, workers, deal)
        end = np.array([row["time"] for row in rows], dtype=float)
        end += found["checkpoint_s"] + found["snapshot_s"] + eval_s
        begin = end - found["step_s"]
        gaps = {cause: found[name] for cause, name in _OF_GAPS.items()}
        redone: list[str | None] = [redone_in.get(row["step"]) for row in rows] if redone_in else [None] * len(rows)
        if redone_in:
            again = np.array([world is not None for world in redone], dtype=bool)
            parts = {cause: np.where(again, 0.0, part) for cause, part in parts.items()} | {"redone": again * 1.0}
        if apart:
            ends = np.array([e["time"] for e in apart.values()], dtype=float)
            begin = np.concatenate((begin, ends - _columns(list(apart.values()), "eval_s")["eval_s"]))
            end = np.concatenate((end, ends))
            parts, gaps = (
                {cause: np.concatenate((column, np.zeros(len(apart)))) for cause, column in some.items()}
                for some in (parts, gaps)
            )
            parts["evaluation"][len(rows) :] = 1.0
            redone += [None] * len(apart)
        order = np.argsort(end, kind="stable")
        if (order[1:] < order[:-1]).any():
            redone = [redone[i] for i in order]
        parts, gaps = ({cause: column[order] for cause, column in some.items()} for some in (parts, gaps))
        return cls(begin[order], end[order], parts, gaps, redone)


def _columns(rows: Sequence[dict[str, Any]], *names: str) -> dict[str, Column]:
    """Return `number` of these columns, float64 [rows] each; 0 for rows that lack them."""
    found = map(np.asarray, columns(rows, dict.fromkeys(names, 0.0), number))
    return {name: np.where((c > 0) & (c < math.inf), c, 0.0) for name, c in zip(names, found)}


def _step_parts(found: Mapping[str, Column], eval_s: Column, workers: int, deal: Deal) -> dict[str, Column]:
    """Return what the seconds of steps were spent on, by cause, float64 [rows] each; zeros if a row does not say.

    A row is that of one worker, and the result is the average over the workers that computed the step. A worker with
    one microbatch less than others waits for them when gradients are summed: that counts as imbalance, not as
    synchronisation.

    Args:
        found: columns of the rows.
        eval_s: seconds of the evaluations that are part of the steps.
        workers: that train.
    """
    step_s, compute, sync = found["step_s"], found["compute_s"], found["sync_s"]
    parts = {"data": found["data_s"], "evaluation": eval_s}
    parts |= {cause: found[f"{cause}_s"] for cause in ("checkpoint", "snapshot")}
    count, cells = deal.microbatches, workers // deal.cell_size
    if not count or cells < 1 or count < pipelines(cells, deal.stages)[0]:
        parts[PRODUCTIVE], parts["sync"] = compute, sync
    elif deal.stages > 1:  # the passes of a stage contain its waits while the pipeline fills and empties
        pipes, stages = pipelines(cells, deal.stages)
        parts[PRODUCTIVE] = useful = compute * count / (pipes * (-(-count // pipes) + stages - 1))
        parts["imbalance"], parts["sync"] = compute - useful, sync
    else:
        # microbatches of the busiest cell, and of the first, whose rank 0 wrote the rows
        most, own = -(-count // cells), count // cells
        busy = np.minimum(compute if deal.padded else compute * most / own, compute + sync)
        parts[PRODUCTIVE] = useful = busy * count / (most * cells)
        parts["imbalance"], parts["sync"] = busy - useful, compute + sync - busy
    parts["other" if deal.complete else "unknown"] = np.maximum(0.0, step_s - sum(parts.values()))
    return {cause: np.where(step_s > 0, part, 0.0) for cause, part in parts.items()}


def _gap_parts(gaps: Mapping[str, Column], seconds: Column, rest: str) -> dict[str, Column]:
    """Return what the `seconds` before each step were spent on: at the beginning of a world, connecting and restoring.

    Args:
        gaps: seconds as the rows say them, by cause.
        rest: the cause of seconds that a row does not explain.
    """
    parts, left = {}, seconds
    for cause, column in gaps.items():
        parts[cause] = np.minimum(left, column)
        left = left - parts[cause]
    parts[rest] = parts.get(rest, 0.0) + left
    return parts


def _shares(parts: Mapping[str, float]) -> Parts:
    whole = sum(parts.values())
    return {cause: part / whole for cause, part in parts.items() if part > 0} if whole > 0 else {"unknown": 1.0}


def _at(parts: Mapping[str, Column], i: int) -> Parts:
    return _shares({cause: float(part[i]) for cause, part in parts.items()})


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
    """Yield all of the time of a world from `begin` to `end`, without a gap.

    Args:
        begin, end: unix seconds.
        rows: of the world's steps.
        evaluations: of the world, by step.
        redone_in: the world in which a step was done again, by step.
        tail: the cause of what comes after the last row.
        workers: that train in it.
        together: steps that count, and what came between them, are put together into one segment; there may be a
            hundred thousand.
    """
    pieces = _Pieces.of(rows, evaluations, redone_in, workers, deal)
    rest = "other" if deal.complete else "unknown"
    after = np.maximum(begin, np.minimum(pieces.end, end))  # pieces are sorted by their ends
    before = np.concatenate(([begin], after[:-1])) if len(after) else after
    # A step that was applied after the world broke counts as before the break.
    latest = np.maximum(before, end - np.maximum(0.0, pieces.end - pieces.begin))
    at = np.where(pieces.begin > before, np.minimum(pieces.begin, latest), before)
    stop = np.minimum(np.maximum(pieces.end, at), end)
    lengths, gaps = np.maximum(0.0, stop - at), np.maximum(0.0, at - before)
    gap_parts = _gap_parts(pieces.gaps, gaps, rest)
    apart = np.ones(len(after), dtype=bool)  # pieces that get a segment of their own
    if together and len(after):
        wholes = sum(pieces.parts.values())
        apart = np.array([world is not None for world in pieces.redone], dtype=bool) | (wholes <= 0)
        scale = np.where(apart, 0.0, lengths) / np.where(apart, 1.0, wholes)
        totals = {cause: float((part * scale).sum()) for cause, part in pieces.parts.items()}
        for cause, part in gap_parts.items():
            totals[cause] = totals.get(cause, 0.0) + float(part[1:].sum())
        if (seconds := sum(totals.values())) > 0:
            yield Segment(0.0, seconds, _shares(totals))
    for i in np.flatnonzero(apart | (np.arange(len(after)) == 0)).tolist():
        if gaps[i] > 0 and i == 0:
            first = _at(_gap_parts({c: g[:1] for c, g in pieces.gaps.items()}, gaps[:1], "form"), 0)
            yield Segment(float(before[i]), float(at[i]), first, first=True)
        elif gaps[i] > 0 and not together:
            yield Segment(float(before[i]), float(at[i]), _at(gap_parts, i))
        if lengths[i] > 0 and apart[i]:
            yield Segment(float(at[i]), float(stop[i]), _at(pieces.parts, i), pieces.redone[i])
    cursor = float(after[-1]) if len(after) else begin
    if end > cursor:
        shares = {"form": 1.0} if not len(after) and tail == "form" else {tail: 1.0}
        yield Segment(cursor, end, shares, first=not len(after), last=True)
