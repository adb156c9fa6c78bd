"""Removing checkpoints of a run, or whole runs, that are no longer needed. Live runs remove their own checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from elastic import fault
from elastic.checkpoint.format import ATTEMPT, FOLDER, MANIFEST, step_folder
from elastic.checkpoint.reader import (
    Committed,
    attempts,
    mark,
    marked,
    newest_first,
    steps_with_attempts,
    unmark,
    with_manifest,
)
from elastic.checkpoint.retention import Policy, Removal, Retention, pins, removals
from elastic.checkpoint.uploads import sweep_uploads
from elastic.errors import ConfigError, ElasticError
from elastic.membership.protocol import Kept, Prune
from elastic.run.folder import CLAIMS, CONFIG, STATUS, RunFolder
from elastic.storage import Storage
from elastic.tools.live import LiveRun
from elastic.tools.target import Hold, hold, list_names, refuse_live

_RUN = {CONFIG, STATUS, CLAIMS}  # a folder with any of these is a run, even if it was never started or is half removed
PRUNE_S = 600.0
Total = Callable[[int], Callable[[int], None]]


def silent(total: int) -> Callable[[int], None]:
    return lambda done: None


# ---- checkpoints of a run ------------------------------------------------------------------------------------------


def policy_of(
    folder: RunFolder,
    *,
    last: int | None = None,
    every: int | None = None,
    best: int | None = None,
    metric: str | None = None,
    mode: Literal["min", "max"] | None = None,
) -> Policy:
    """Return the policy of a run as it was configured, with the values that are given here instead. `every` is in
    steps.

    Raises:
        ConfigError: a value is too small, or only the run itself can convert the configured one into steps.
    """
    check_keep(last, every, best)
    stored = folder.config()
    keep: dict[str, Any] = stored["config"]["checkpoint"] if stored else {}
    if every is None and keep.get("keep_every") is not None:
        text = str(keep["keep_every"])
        if not text.endswith("st"):
            raise ConfigError(f"the run keeps every {text} by --checkpoint.keep-every; give that as --keep-every STEPS")
        every = int(float(text.removesuffix("st").replace("_", "")))
    default = Policy()
    return Policy(
        last if last is not None else keep.get("keep_last", default.last),
        every,
        best if best is not None else keep.get("keep_best", default.best),
        metric or keep.get("best_metric", default.metric),
        mode or keep.get("best_mode", default.mode),
    )


def prune_checkpoints(folder: RunFolder, policy: Policy, *, yes: bool) -> list[Removal]:
    """Remove the checkpoints that the policy does not keep, and the remains of unfinished saves.

    It may be interrupted anywhere: manifests are removed first, so that no incomplete checkpoint is listed, and the
    next call removes the rest.

    Args:
        yes: if False, nothing is removed, and the result is what would be.

    Raises:
        ConfigError: the run is live.
        FencedError: another command began to drive the run meanwhile.
    """
    if not yes:
        refuse_live(folder, "prune")
        return _removals(folder.storage, policy, folder.newest_epoch() + 1)[0]
    with hold(folder, "prune") as held:
        return _prune_held(folder.storage, policy, held)


def _prune_held(storage: Storage, policy: Policy, held: Hold) -> list[Removal]:
    going, needed = _removals(storage, policy, held.epoch)
    held.check()
    retention, marks = Retention(storage, policy), marked(storage)
    retention.prune()
    for checkpoint in with_manifest(storage):
        if checkpoint in retention.damaged:
            mark(storage, checkpoint, retention.damaged[checkpoint])
    for removal in going:
        attempt = Committed(removal.step, removal.attempt)
        for name in storage.names(attempt.folder):  # objects that the retention of a live run may not remove
            if f"{attempt.folder}/{name}" not in needed:
                storage.remove(f"{attempt.folder}/{name}")
        if attempt in marks:
            unmark(storage, attempt)
        for empty in (attempt.folder, step_folder(attempt.step)):
            if not storage.names(empty):
                storage.remove(empty)
    sweep_uploads(storage, FOLDER, keep=lambda name: not _is_before(name.split("/"), held.epoch))
    return going


def prune_live(live: LiveRun, given: dict[str, Any], *, yes: bool) -> list[Removal]:
    """Have a live run remove the checkpoints that its policy, with the `given` values replaced, does not keep.

    Its keeper does so between two commits. Attempts that are being written, and all attempts newer than the newest
    committed checkpoint, are kept.

    Raises:
        ElasticError: the run cannot be reached, or could not remove them.
    """
    answer = live.ask(Prune(Kept(**given), yes), timeout_s=PRUNE_S)
    return [Removal(**removal) for removal in answer["removals"]]


def check_keep(last: int | None, every: int | None, best: int | None) -> None:
    """Refuse numbers that are too small.

    Raises:
        ConfigError: with the option and its least value.
    """
    for option, value, least in (("--keep-last", last, 1), ("--keep-every", every, 1), ("--keep-best", best, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{option} is {value}; give {least} or more")


def _removals(storage: Storage, policy: Policy, epoch: int) -> tuple[list[Removal], set[str]]:
    """Return the attempts to remove, and the names of the objects in them that are needed elsewhere. Unfinished
    attempts of claims before `epoch` can be removed, because they have no writer any more."""
    gone, needed = Retention(storage, policy).plan()
    committed = set(newest_first(storage))
    found = {Committed(s, a) for s in steps_with_attempts(storage) for a in attempts(storage, s)}
    pinned = {a for a in marked(storage) if a.step in pins(storage)}  # their objects may yet be restored by hand
    dead = {a for a in found - committed - pinned if _is_before([FOLDER, step_folder(a.step), a.attempt], epoch)}
    return removals(storage, dead | set(gone), set(with_manifest(storage)), needed), needed


def _is_before(parts: Sequence[str], epoch: int) -> bool:
    """Whether a path below FOLDER belongs to an attempt of a claim before `epoch`."""
    match = ATTEMPT.match(parts[2]) if len(parts) > 2 else None
    return match is not None and int(match[1]) < epoch


# ---- whole runs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFacts:
    """The facts that decide whether a run is removed.

    Args:
        last: when the run was last driven, unix seconds.
        live: who drives it now.
        pinned: the steps of its pinned checkpoints.
        group: the job and the metric; the best run of each group is kept.
        score: the value of the metric, negated if greater is better.
        problem: why the run cannot be read.
    """

    name: str
    status: str
    last: float
    live: str | None = None
    pinned: tuple[int, ...] = ()
    group: str = ""
    score: float | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Decision:
    """What is done with a run, and the reason."""

    name: str
    status: str
    age_s: float
    do: Literal["keep", "keep final", "remove"]
    why: str


def decide(runs: Iterable[RunFacts], now: float, older_than_s: float, *, keep_final: bool) -> list[Decision]:
    """Decide what is done with each run. A run is removed if it is readable, not live, not pinned, not the best of its
    group, and was not driven for `older_than_s` seconds; with `keep_final` its newest checkpoint is kept."""
    runs = sorted(runs, key=lambda r: r.name)
    best: dict[str, RunFacts] = {}
    for run in runs:
        known = best.get(run.group)
        if run.score is not None and (known is None or known.score is None or run.score < known.score):
            best[run.group] = run

    def reason(run: RunFacts) -> str | None:
        if run.problem is not None:
            return f"cannot be read: {run.problem}"
        if run.live is not None:
            return f"live: {run.live}"
        if run.pinned:
            return f"pinned: step {', '.join(map(str, run.pinned))}"
        if best.get(run.group) is run:
            return f"best of {run.group}"
        return "not that old" if now - run.last < older_than_s else None

    found = []
    for run in runs:
        kept = reason(run)
        do: Literal["keep", "keep final", "remove"] = "keep" if kept else "keep final" if keep_final else "remove"
        found.append(Decision(run.name, run.status, now - run.last, do, kept or "old"))
    return found


def look_at_runs(url: str) -> tuple[Storage, list[RunFacts]]:
    """Find the runs in a folder.

    Raises:
        ConfigError: the folder cannot be listed, or is a run itself.
    """
    storage = Storage(url, option="URL")
    names = list_names(storage)
    if _RUN & set(names):
        raise ConfigError(f"URL is {url!r}, which is a run; give the folder of runs, or use elastic checkpoints prune")
    children = [(name, RunFolder(storage.child(name))) for name in names]
    return storage, [look_at(name, folder) for name, folder in children if _may_be_run(folder)]


def _may_be_run(folder: RunFolder) -> bool:
    try:
        return bool(_RUN & set(folder.storage.names()))
    except Exception:  # storage may raise anything; `look_at` reports the problem
        return True


def look_at(name: str, folder: RunFolder) -> RunFacts:
    """Read the facts that decide on one run."""
    try:
        status, config, result = folder.status() or {}, folder.config() or {}, folder.result() or {}
        last = float(status.get("heartbeat", 0.0))
        epoch = folder.newest_epoch()
        if epoch:
            last = max(last, float(json.loads(folder.storage.read(f"{CLAIMS}/{epoch:06d}.json"))["time"]))
        if not last:
            last = folder.storage.modified(CONFIG)
        keep = config.get("config", {}).get("checkpoint", {})
        metric, mode = keep.get("best_metric", "eval/loss"), keep.get("best_mode", "min")
        value = result.get("metrics", {}).get(metric)
        score = None if value is None else float(value) if mode == "min" else -float(value)
        job = config.get("job", {}).get("name", "")
        group = f"{job} by {metric} ({mode})"
        pinned = tuple(sorted(pins(folder.storage)))
        return RunFacts(name, status.get("status", "?"), last, folder.live_driver(), pinned, group, score)
    except Exception as error:  # a damaged file or storage may raise anything; the other runs must be looked at
        return RunFacts(name, "?", time.time(), problem=f"{type(error).__name__}: {error}")


def prune_runs(storage: Storage, decisions: Sequence[Decision], on_total: Total = silent) -> list[tuple[str, str]]:
    """Carry out decisions; returns the names of the runs for which this failed, with the reasons.

    It may be interrupted anywhere: the files by which a folder is a run are removed last, so that the next call removes
    the rest.
    """
    chosen = [d for d in decisions if d.do != "keep"]
    on_run = on_total(len(chosen))
    problems = []
    for decision in chosen:
        folder = RunFolder(storage.child(decision.name))
        try:
            again = look_at(decision.name, folder)
            if again.live or again.pinned:
                raise ConfigError(f"it is {'live' if again.live else 'pinned'} now")
            if decision.do == "keep final":
                prune_checkpoints(folder, Policy(last=1), yes=True)
            else:
                with hold(folder, "prune") as held:
                    _remove_run(folder, held)
        except ElasticError as error:
            problems.append((decision.name, str(error)))
        except Exception as error:  # storage may raise anything; the other runs must be pruned
            problems.append((decision.name, f"{type(error).__name__}: {error}"))
        on_run(1)
    return problems


def _remove_run(folder: RunFolder, held: Hold) -> None:
    storage = folder.storage
    for checkpoint in with_manifest(storage):
        held.check()
        storage.remove(f"{checkpoint.folder}/{MANIFEST}")
        fault.point("prune.run", -1, checkpoint.step)
    storage.remove(FOLDER)
    sweep_uploads(storage, FOLDER, keep=lambda name: False)
    held.check()
    for name in storage.names():
        if name not in (STATUS, CLAIMS):
            storage.remove(name)
    fault.point("prune.run", -1, -1)
    storage.remove(STATUS)
    storage.remove("")
