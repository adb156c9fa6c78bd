"""Reads what a sweep left behind: its folder, the ranking of its trials, and the text of `elastic report`.

<storage>/<sweep>/sweep.json      what was searched and how, who drives it, how it stands, and the best trial
<storage>/<sweep>/trials.jsonl    a line an event: started, report, verdict, ended <storage>/<sweep>/drivers/        one
file for each command that drove it <storage>/<sweep>/<sweep>-0003/   a run like any other
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic.errors import ConfigError
from elastic.observe.ledger import read_records
from elastic.run.folder import ALIVE_S
from elastic.run.process import has_ended
from elastic.storage import Storage
from elastic.tools.text import show

FORMAT = 1
SWEEP, TRIALS, DRIVERS = "sweep.json", "trials.jsonl", "drivers"


@dataclass
class TrialRecord:
    """What is known of a trial.

    Args:
        options: those that it has now.
        started_with: those that it began with.
        value: the newest value of the sweep's metric.
        best: its best value.
    """

    number: int
    run: str
    options: dict[str, Any]
    started_with: dict[str, Any]
    status: str = "running"
    evaluations: int = 0
    step: int = 0
    value: float | None = None
    best: float | None = None
    message: str = ""
    seconds: float = 0.0
    cost: float | None = None
    weights_sha256: str | None = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)


def read_sweep(storage: Storage) -> dict[str, Any] | None:
    """Return the contents of sweep.json, or None if there is no sweep.

    Raises:
        ConfigError: it has a format that this version does not know.
    """
    try:
        found = json.loads(storage.read(SWEEP))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if found.get("format") != FORMAT:
        raise ConfigError(
            f"{storage.path(SWEEP)} has format {found.get('format')!r}, this version reads {FORMAT}; use the version "
            "of elastic-train that wrote it, or a newer one"
        )
    return found


def open_sweep(url: str) -> tuple[Storage, dict[str, Any]]:
    """Open the folder of a sweep, and return it with its sweep.json.

    Raises:
        ConfigError: there is no sweep.
    """
    storage = Storage(url, option="SWEEP", read_only=True)
    found = read_sweep(storage)
    if found is None:
        raise ConfigError(f"SWEEP is {url!r}, which is no sweep; give a folder with a {SWEEP}")
    return storage, found


def read_trials(storage: Storage, metric: str, mode: str) -> list[TrialRecord]:
    """Return all trials of a sweep, by number."""
    return collect(read_records(storage, TRIALS), metric, mode)


def collect(lines: Iterable[dict[str, Any]], metric: str, mode: str) -> list[TrialRecord]:
    """Return the trials that these lines describe. A driver that was killed may have left some lines twice."""
    found: dict[int, TrialRecord] = {}
    for line in lines:
        number, kind = line["trial"], line["kind"]
        if kind == "started":
            found.setdefault(number, TrialRecord(number, line["run"], line["options"], line["options"]))
            continue
        trial = found.get(number)
        if trial is None:
            continue
        if kind == "report":
            if any(r["evaluation"] == line["evaluation"] for r in trial.reports):
                continue
            trial.reports.append(line)
            trial.evaluations, trial.step = line["evaluation"], line["step"]
            trial.value = line["metrics"].get(metric)
            trial.best = better(trial.best, trial.value, mode)
        elif kind == "verdict":
            if any(v["evaluation"] == line["evaluation"] for v in trial.verdicts):
                continue
            trial.verdicts.append(line)
            if line["do"] == "exploit":
                trial.options = line["options"]
        elif kind == "ended":
            trial.status, trial.message, trial.step = line["status"], line["message"], line["step"]
            trial.seconds, trial.cost = line["seconds"], line["cost"]
            trial.weights_sha256 = line["weights_sha256"]
            trial.value = line["metrics"].get(metric, trial.value)
            trial.best = better(trial.best, trial.value, mode)
    return [found[number] for number in sorted(found)]


def better(one: float | None, other: float | None, mode: str) -> float | None:
    """Return the better of two values; either may be None or NaN."""
    values = [v for v in (one, other) if v is not None and not math.isnan(v)]
    return (min(values) if mode == "min" else max(values)) if values else None


def ranking(trials: Iterable[TrialRecord], mode: str) -> list[TrialRecord]:
    """Sort trials by their newest values, the best first; those without a value come last."""

    def key(trial: TrialRecord) -> tuple[bool, float, int]:
        value = trial.value
        bad = value is None or math.isnan(value) or trial.status == "failed"
        return bad, 0.0 if bad or value is None else value if mode == "min" else -value, trial.number

    return sorted(trials, key=key)


def best_trial(trials: Iterable[TrialRecord], mode: str) -> TrialRecord | None:
    """Return the best trial that ended and did not fail; its last checkpoint is the one to keep."""
    ended = [t for t in trials if t.status in ("finished", "stopped") and t.value is not None]
    return next(iter(ranking(ended, mode)), None)


def state_of(sweep: dict[str, Any], now: float) -> str:
    """Return a sweep's state: the one it wrote last, but `lost` if a running sweep has not been heard of."""
    silent = now - sweep["heartbeat"] >= ALIVE_S or has_ended(sweep.get("owner_process"))
    return "lost" if sweep["status"] == "running" and silent else str(sweep["status"])


def best_run(url: str) -> tuple[str, int] | None:
    """Return the URL of a sweep's best run and the step of its pinned checkpoint; None if `url` is no sweep.

    Raises:
        ConfigError: the sweep has no best trial yet.
    """
    storage = Storage(url, option="URL", read_only=True)
    found = read_sweep(storage)
    if found is None:
        return None
    if not found.get("best"):
        raise ConfigError(f"URL is {url!r}, a sweep of which no trial has ended yet; wait for one, or give a run")
    return f"{storage.url}/{found['best']['run']}", found["best"]["step"]


# ---- elastic report ------------------------------------------------------------------------------------------------


def report(arguments: argparse.Namespace) -> int:
    """Carry out the verb, and return the exit code."""
    storage, sweep = open_sweep(arguments.url)
    trials = ranking(read_trials(storage, sweep["metric"], sweep["mode"]), sweep["mode"])
    written = []
    if arguments.plots:
        from elastic.tools.output import write_file
        from elastic.tools.sweep_pictures import sweep_pictures

        name = storage.url.rstrip("/").rsplit("/", 1)[-1]
        drawn = sweep_pictures(name, trials, sweep["fixed"]["search"], sweep["metric"], sweep["mode"])
        written = [write_file(f"{arguments.plots}/{file}", draw, "--plots") for file, draw in drawn.items()]
    values: dict[str, Any] = {
        "sweep": {**sweep, "status": state_of(sweep, time.time())},
        "trials": [asdict(t) for t in trials],
    }
    values["written"] = written

    def text() -> str:
        ranking_text = report_text(storage.url, sweep, trials)
        return ranking_text + (f"\n\nwritten: {', '.join(written)}" if written else "")

    show(arguments, values, text)
    return 0


def report_text(url: str, sweep: dict[str, Any], ranked: list[TrialRecord]) -> str:
    """Format the ranking for people."""
    from elastic.tools.text import age_text, table

    state, metric = state_of(sweep, time.time()), sweep["metric"]
    steps = sum(t.step for t in ranked)
    fixed = sweep["fixed"]
    how = f"{fixed['searcher']}, {fixed['scheduler'] if fixed['scheduler'] != 'none' else 'no scheduler'}"
    lines = [f"{url}: {state}, {len(ranked)} of {fixed['trials']} trials, {steps} steps; {how}"]
    if sweep.get("message"):
        lines.append(sweep["message"])
    names = list(fixed["search"])
    rows = [
        (
            place,
            t.run,
            t.status,
            t.step,
            _number(t.value),
            *(_number(t.options.get(n)) for n in names),
            age_text(t.seconds) if t.seconds else "",
        )
        for place, t in enumerate(ranked, start=1)
    ]
    head = ("rank", "trial", "status", "step", metric, *names, "time")
    lines += ["", table(head, rows, ",".join(("rank", "step", metric, *names, "time")))]
    failed = [t for t in ranked if t.status == "failed" and t.message]
    lines += [f"{t.run} failed: {t.message.splitlines()[-1]}" for t in failed[:5]]
    best = sweep.get("best")
    if best:
        lines += [
            "",
            f"best: {url}/{best['run']}, step {best['step']} (pinned)",
            f"elastic checkpoints export {url} weights.safetensors",
        ]
    return "\n".join(lines)


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
