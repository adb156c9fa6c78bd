"""The course of a run, as tools show it: curves, world sizes, marked events, stalls. Pure.

Time counts only while a command drives the run: the time between two commands is left out.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from elastic.observe.columns import columns, floats
from elastic.observe.ledger import COLUMNS, finite
from elastic.observe.thinning import BUCKETS, bands, edges, means, thinned

MOST_CURVES = 8  # the most curves of the job's own metrics, and the most of its evaluations
MOST_EVENTS = 200
PARTS = {
    "compute": ("compute_s",),
    "synchronisation": ("sync_s",),
    "data": ("data_s",),
    "checkpoint": ("checkpoint_s",),
    "restore": ("connect_s", "restore_s"),
    "other": ("other_s",),
}
_MOST = 1e300  # a number of which others can still be made
_AT_A_TIME = 1000  # rows
_PAUSE_S = 5.0  # a longer time between the records of two commands counts as a pause
_LOST = ("member_lost", "member_evicted", "world_broken")
_TONES = {
    "bad": (
        *_LOST,
        "worker_failed",
        "run_failed",
        "checkpoint_failed",
        "process_ended",
        "world_stalled",
        "fallback_restart",
        "sample_failed",
        "node_quarantined",
    ),
    "warn": (
        "notice",
        "handed_over",
        "parked",
        "member_late",
        "yielded",
        "checkpoint_skipped",
        "snapshot_skipped",
        "slow_evaluation",
    ),
    "good": ("world_formed", "resumed", "run_finished", "worker_warm"),
    "save": ("checkpoint_committed",),
}
TONE_OF = {kind: tone for tone, kinds in _TONES.items() for kind in kinds}
_MARKS = {
    "member_lost": "worker lost",
    "member_evicted": "worker evicted",
    "worker_failed": "worker failed",
    "handed_over": "handed over",
    "parked": "parked",
    "resumed": "resumed",
    "run_failed": "run failed",
}


def number(value: Any) -> float:
    """Return a value of a ledger as a float; NaN if it is no finite number, because anybody may have written the
    file."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MOST:
        return float(value)
    return math.nan


def _likeness(row: dict[str, Any]) -> tuple[Any, int, str]:
    """What a row has in common with most: its generation, the number of its columns and the last of them."""
    return row.get("generation"), len(row), next(reversed(row))


def _generation(record: dict[str, Any]) -> tuple[int, int]:
    epoch, _, n = str(record.get("generation", "")).partition("-")
    return (int(epoch), int(n)) if epoch.isdecimal() and n.isdecimal() else (0, 0)


class History:
    """The history of one run, updated as records arrive. If a step was done again, the row of its highest generation
    counts."""

    def __init__(self) -> None:
        self._steps, self._times = array("q"), array("d")
        self._curves: dict[str, array[float]] = {"loss": array("d")}
        self._phases: set[str] = set()  # whose losses have curves of their own
        self._parts = {name: array("d") for name in (*PARTS, "step")}
        self._amounts = array("d")  # samples or tokens
        self._worlds = array("q")
        self._newest = (0, 0)
        self._like: tuple[Any, int, str] | None = None  # the likeness of the last row that was added
        self._evaluations: dict[str, dict[int, float]] = {}
        self.events: list[dict[str, Any]] = []
        self._stalls: list[dict[str, Any]] = []
        self.row: dict[str, Any] = {}  # the newest row
        self.redone = 0

    # ---- adding records ----------------------------------------------------------------------------------------

    def add_rows(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows of `metrics.jsonl`, in the order in which they were written. Invalid rows are left out."""
        waiting = iter(rows)
        while part := list(islice(waiting, _AT_A_TIME)):
            if self._goes_on(part):
                self._take(part)
            else:
                self._add_each(part)

    def _goes_on(self, rows: list[dict[str, Any]]) -> bool:
        """Whether these are valid rows of the next steps of the same world, with the same metrics. Nearly all rows of a
        long ledger are, and to look at many of them together is faster."""
        if not self._like:
            return False
        count, (generation, length, last) = len(rows), self._like
        steps: list[Any] = [row.get("step") for row in rows]
        times: list[Any] = [row.get("time") for row in rows]
        return (
            steps == list(range(self.step + 1, self.step + 1 + count))
            and {*map(type, steps)} == {int}
            and {*map(type, times)} == {float}
            and -_MOST < min(times) <= max(times) < _MOST
            and [row.get("generation") for row in rows] == [generation] * count
            and [*map(len, rows)] == [length] * count
            and [*map(next, map(reversed, rows))] == [last] * count
            and all("sample_hash" in row for row in rows)
        )

    def _add_each(self, rows: list[dict[str, Any]]) -> None:
        fresh: list[dict[str, Any]] = []  # added together, column by column
        step = self.step
        for row in rows:
            if "sample_hash" not in row:
                self._add_evaluation(row)
                continue
            this, time = row.get("step"), number(row.get("time"))
            if not isinstance(this, int) or not 0 <= this < 1 << 60 or math.isnan(time):
                continue
            if _likeness(row) != self._like or this <= step:
                generation = _generation(row)
                if generation < self._newest or (generation == self._newest and this <= step):
                    continue  # the row is of a world that was given up meanwhile, or was added before
                self._take(fresh)
                fresh = []
                if this <= step:
                    self._drop_from(this)
                if self._times and generation != self._newest:
                    at = self._times[-1]
                    gap = time - at - max(0.0, number(row.get("step_s")))
                    self._stalls.append({"step": this, "from": at, "time": time, "seconds": gap})
                self._newest, self._like = generation, _likeness(row)
                self._find_curves(row)
            step = this
            fresh.append(row)
        self._take(fresh)

    def add_recent(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows from the run's server that may not be in the ledger yet, up to the first gap."""
        step, next_ones = self.step, []
        for row in rows:
            if "sample_hash" not in row:
                next_ones.append(row)
            elif row.get("step") == step + 1:
                next_ones.append(row)
                step += 1
        self.add_rows(next_ones)

    def _add_evaluation(self, row: dict[str, Any]) -> None:
        step = row.get("step")
        if not isinstance(step, int) or not 0 <= step < 1 << 60:
            return
        for name, value in row.items():
            known = name in self._evaluations or len(self._evaluations) < MOST_CURVES
            if known and name.startswith("eval/") and not math.isnan(found := number(value)):
                self._evaluations.setdefault(name, {})[step] = found

    def _find_curves(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            new = name not in COLUMNS and name not in self._curves and len(self._curves) <= MOST_CURVES
            if new and not math.isnan(number(value)):
                self._curves[name] = array("d", [math.nan]) * len(self._steps)

    def _take(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        for phase in {row.get("phase") for row in rows} - self._phases if "phase" in rows[-1] else ():
            if isinstance(phase, str) and len(self._curves) <= MOST_CURVES:
                self._phases.add(phase)
                self._curves[f"{phase}/loss"] = array("d", [math.nan]) * len(self._steps)
        self._steps.extend([row["step"] for row in rows])
        absent = {"time": 0.0, **dict.fromkeys(self._curves, math.nan), "step_s": 0.0}
        absent |= {term: 0.0 for terms in PARTS.values() for term in terms}
        found = dict(zip(absent, columns(rows, absent, number)))
        for phase in self._phases:
            found[f"{phase}/loss"] = array(
                "d", [v if row.get("phase") == phase else math.nan for v, row in zip(found["loss"], rows)]
            )
        for name, column in (("time", self._times), *self._curves.items(), ("step_s", self._parts["step"])):
            column.extend(found[name])
        for name, terms in PARTS.items():
            first, *others = (found[term] for term in terms)
            self._parts[name].extend(map(sum, zip(first, *others)) if others else first)
        self._amounts.extend(floats([row.get("tokens") or row.get("samples") for row in rows], number))
        sizes = [row.get("world_size") for row in rows]
        self._worlds.extend([s if isinstance(s, int) and 0 <= s < 1 << 31 else 0 for s in sizes])
        self.row = rows[-1]

    def _drop_from(self, step: int) -> None:
        keep = bisect_left(self._steps, step)
        self.redone += len(self._steps) - keep
        columns: list[array[Any]] = [self._steps, self._times, self._amounts, self._worlds]
        for column in (*columns, *self._curves.values(), *self._parts.values()):
            del column[keep:]

    def add_events(self, events: Iterable[dict[str, Any]]) -> None:
        """Add events of `events.jsonl`, in the order in which they were written. Invalid events are left out."""
        for event in events:
            if isinstance(event.get("kind"), str) and not math.isnan(number(event.get("time"))):
                self.events.append(event)

    # ---- results -----------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        return self._steps[-1] if self._steps else 0

    def rate(self, last: int = 50) -> tuple[float | None, float | None]:
        """Return the steps and the samples (or tokens) per second over the `last` steps of the present world; None if
        they cannot be computed."""
        first = max(0, len(self._times) - last)
        while first < len(self._times) and self._worlds[first] != self._worlds[-1]:
            first += 1
        if len(self._times) - first < 2 or (elapsed := self._times[-1] - self._times[first]) <= 0:
            return None, None
        amount = self._amounts[-1] - self._amounts[first]
        return (len(self._times) - 1 - first) / elapsed, None if math.isnan(amount) else amount / elapsed

    def clock(self) -> Callable[[float], float]:
        """Return a function from unix seconds to the seconds for which the run had been driven by then."""
        begins, ends = self._spells()
        if not begins:
            return lambda at: 0.0
        before, total = [], 0.0
        for begin, end in zip(begins, ends, strict=True):
            before.append(total)
            total += end - begin

        def driven(at: float) -> float:
            spell = max(0, bisect_right(begins, at) - 1)
            last = spell == len(begins) - 1
            return before[spell] + max(0.0, (at if last else min(at, ends[spell])) - begins[spell])

        return driven

    def _spells(self) -> tuple[list[float], list[float]]:
        """Return when each command that drove the run began, and the times of their last records; unix seconds."""
        starts = sorted(e["time"] for e in self.events if e["kind"] == "run_started")
        times = sorted((*(e["time"] for e in self.events), *self._times[:: max(1, len(self._times) // 5000)]))
        times += [self._times[-1]] if self._times else []
        times.sort()
        if not times:
            return [], []
        begins, ends = [times[0]], []
        for start in starts:
            last = times[max(0, bisect_left(times, start) - 1)]
            if start - last > _PAUSE_S:
                ends.append(last)
                begins.append(start)
        return begins, [*ends, times[-1]]

    def worlds(self) -> list[tuple[float, int, str]]:
        """Return the changes of the number of workers that train: time (unix seconds), number, generation."""
        found: list[tuple[float, int, str]] = []
        newest = ""
        for event in self.events:
            kind, generation, detail = event["kind"], str(event.get("generation", "")), event.get("detail")
            if kind == "world_formed" and isinstance(detail, dict) and isinstance(detail.get("size"), int):
                newest = generation
                found.append((event["time"], max(0, detail["size"]), generation))
                continue
            over = (kind in _LOST and generation == newest) or kind in ("parked", "run_finished", "run_failed")
            if over and found and found[-1][1]:
                found.append((event["time"], 0, generation))
        return found

    def marks(self) -> list[dict[str, Any]]:
        """Return what happened to the members, for a picture: for each event the time (unix seconds), the tone, a word
        and the step."""
        found, size = [], 0
        for event in self.events:
            kind, detail, word = event["kind"], event.get("detail"), _MARKS.get(event["kind"])
            if kind == "notice" and event.get("member") is None and event.get("node"):
                word = "node goes away"
            elif kind == "notice" and str(detail).startswith("drained"):
                word = "drained"
            elif kind == "scaled" and isinstance(detail, dict):
                word = f"scaled to {detail.get('max_workers')}"
            elif kind == "world_formed" and isinstance(detail, dict) and isinstance(detail.get("size"), int):
                if size and detail["size"] > size:
                    word = f"{detail['size'] - size} joined"
                size = detail["size"]
            elif kind == "run_started":
                size = 0
            if word is not None:
                tone = TONE_OF.get(kind, "plain")
                found.append({"time": event["time"], "tone": tone, "word": word, "step": self.step_at(event["time"])})
        return found

    def step_at(self, at: float) -> int:
        """Return the newest step that was done at this time (unix seconds)."""
        before = bisect_right(self._times, at)
        return self._steps[before - 1] if before else 0

    def stalls(self) -> list[dict[str, Any]]:
        """Return the stalls between two worlds: the step before which each happened, its seconds, and what happened
        meanwhile."""
        found = []
        words = {"world_formed": "", "worker_warm": "", "restored": "", "checkpoint_committed": ""}
        starts = {e["time"] for e in self.events if e["kind"] == "run_started"}
        times = [e["time"] for e in self.events]
        for stall in self._stalls:
            first, last = bisect_left(times, stall["from"]), bisect_right(times, stall["time"])
            between = [e for e in self.events[max(0, first - 8) : last] if stall["from"] <= e["time"] <= stall["time"]]
            if any(e["time"] in starts for e in between):
                continue  # the run was started again
            why = dict.fromkeys(_why(e) for e in between if words.get(e["kind"], e["kind"]))
            reason = ", ".join(word for word in why if word) or "members were taken in"
            found.append({"step": stall["step"], "seconds": max(0.0, round(stall["seconds"], 4)), "why": reason})
        return found

    def totals(self) -> dict[str, float]:
        """Return the seconds of all steps, by what they were spent on."""
        return {name: math.fsum(filter(math.isfinite, column)) for name, column in self._parts.items()}

    def view(self) -> dict[str, Any]:
        """Return all of this as JSON values, small enough to be sent repeatedly."""
        driven = self.clock()
        rate, amount_rate = self.rate()
        ranges = edges(len(self._steps))
        ends = [end - 1 for _, end in ranges]
        worlds, marks = self.worlds(), self.marks()
        notable = [e for e in self.events if e["kind"] != "restored"][-MOST_EVENTS:]
        return {
            "steps": [self._steps[i] for i in ends],
            "elapsed": [round(driven(self._times[i]), 3) for i in ends],
            "curves": {name: bands(curve, ranges) for name, curve in self._curves.items()},
            "evaluations": {
                name: [[step, driven(self._time_of(step)), values[step]] for step in thinned(sorted(values))]
                for name, values in self._evaluations.items()
            },
            "split": {name: means(self._parts[name], ranges) for name in PARTS},
            "totals": {name: round(seconds, 6) for name, seconds in self.totals().items()},
            "worlds": [[round(driven(at), 3), size, generation] for at, size, generation in worlds[-5 * BUCKETS :]],
            "marks": [{**mark, "elapsed": round(driven(mark["time"]), 3)} for mark in marks[-BUCKETS:]],
            "saves": [
                [round(driven(e["time"]), 3), e.get("step")] for e in self.events if e["kind"] == "checkpoint_committed"
            ][-BUCKETS:],
            "stalls": self.stalls(),
            "events": [
                {
                    **finite(event),
                    "tone": TONE_OF.get(event["kind"], "plain"),
                    "elapsed": round(driven(event["time"]), 3),
                }
                for event in notable
            ],
            "elapsed_s": round(driven(self._last_time()), 3),
            "began": self._first_time(),
            "rate": rate,
            "amount_rate": amount_rate,
            "amount": "tokens" if self.row.get("tokens") else "samples",
            "redone": self.redone,
        }

    def _time_of(self, step: int) -> float:
        at = bisect_left(self._steps, step)
        return self._times[min(at, len(self._times) - 1)] if self._times else 0.0

    def _first_time(self) -> float | None:
        first = [*self._times[:1], *(e["time"] for e in self.events[:1])]
        return min(first) if first else None

    def _last_time(self) -> float:
        return max((*self._times[-1:], *(e["time"] for e in self.events[-1:])), default=0.0)


def _why(event: dict[str, Any]) -> str:
    kind, detail = event["kind"], str(event.get("detail", "")).split("\n", 1)[0]
    who = f" {event['member']}" if event.get("member") else ""
    if kind == "notice":
        return detail if not who else f"{who.strip()} {detail}"
    return f"{kind.replace('_', ' ')}{who}"
