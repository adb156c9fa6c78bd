"""Jobs of strangers at every exactness, strategy and world size: `python -m tests.field_grid [NAME ...] --log F`.

A run in plain processes is held against plain PyTorch in one process (tests/oracle.py): losses, norms, rates, metrics,
evaluations, weights; in bitwise all bits against one worker besides. A job that is refused must be so in the words that
its case has. `tests/test_field_grid.py` runs a part of it.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from elastic.errors import ConfigError, RunFailed
from elastic.job import Job
from elastic.run.prepare import prepare
from tests import building_jobs, field_customs, field_habits, field_jobs, forked, oracle, test_cases_training, tiny_jobs
from tests.forked import Ran
from tests.random_jobs import running
from tests.random_jobs.recipes import STEPS, Course, World

JOINED_KILLED = "2 joined and killed"
#: Workers of one part of a run after another. In the last, a third one joins in step 2, and one is killed in step 4.
WORLDS = {"1": (1,), "2": (2,), "3": (3,), "2 then 3 then 1": (2, 3, 1), JOINED_KILLED: (2,)}
TRIALS = 8  # of other last digits, where one shows a difference


@dataclass(frozen=True)
class Case:
    """A job.

    Args:
        refused: the words of a refusal, by where that is: "all", an exactness, a strategy, or both ("fast ddp"); or a
            strategy and the worlds ("fsdp 1"). Empty: it trains there.
        told: words of an event of a run in bitwise whose figures go by the worker.
    """

    make: Callable[[], Job]
    refused: dict[str, str] = field(default_factory=dict)
    told: str = ""

    def words(self, exactness: str, strategy: str, worlds: str) -> str:
        """Those of the refusal here; empty where it trains."""
        places = (f"{strategy} {worlds}", f"{exactness} {strategy}", strategy, exactness, "all")
        return next((self.refused[place] for place in places if place in self.refused), "")


CUT = "whole tensors are mixed with parameters of the model|copied with deepcopy|deepcopy"
SUMS = "by a sum over its samples, but a step has several passes"
OTHERS = "holds a parameter of shape .* that is not one of the model's"
BACKWARD = "the job runs a backward pass of its own"
SUMMED = "sums over the rows of sharded parameters"
CLOSURE = "returned .*, whose step.* computes the loss again"
WRITTEN = "is written to in forward or backward passes"
PASSED_ON = "depends on what the pass before left in job"
BACKWARDS = "is written to in backward passes"
F, H, C = field_jobs, field_habits, field_customs
CASES: dict[str, Case] = {
    "averaged": Case(F.Averaged, {"fsdp": CUT}),
    "target": Case(F.Target),
    "scaled": Case(F.Scaled, {"all": "No inf checks were recorded"}),
    "unscaled": Case(F.Unscaled),
    "straight": Case(F.Straight),
    "annealed": Case(F.Annealed),
    "queue": Case(F.Queue, {"all": "by how many samples it has|shape"}),
    "listed": Case(F.Listed, {"all": "depends on what the pass before left in job.queue"}),
    "bank": Case(F.Bank, {"all": SUMS}),
    "normaliser": Case(F.Normaliser, {"all": SUMS}),
    "codebook": Case(F.Codebook),
    "mined": Case(F.Mined),
    "contrastive": Case(F.Contrastive),
    "nested": Case(F.Nested),
    "packed": Case(F.Packed),
    "stream": Case(F.Stream, {"all": "IterableDataset|map-style"}),
    "cached": Case(F.Cached, told="keeps what it made|fetched"),
    "global": Case(F.Global, {"all": "depends on what the pass before left in tests.field_jobs._CALLS"}),
    "own_numbers": Case(F.OwnNumbers, told="another value each time"),
    "recomputed": Case(F.Recomputed),
    "compiled": Case(F.Compiled),
    "closure": Case(F.Closure, {"all": CLOSURE}),
    "sharp": Case(F.Sharp, {"bitwise fsdp": "cannot be tried out", "all": CLOSURE}),
    "complexes": Case(F.Complexes, {"fsdp": "dtype"}),
    "bfloat": Case(F.Bfloat, {"bitwise fsdp": "SGD gives other bits when a parameter in bfloat16 is cut"}),
    "channels": Case(F.Channels),
    "turned": Case(F.Turned, {"fsdp": "is not contiguous in memory"}),
    "tied": Case(F.Tied),
    "clipped": Case(F.Clipped),
    "backwards": Case(F.Backwards, {"ddp": WRITTEN, "fsdp": "has a hook on its gradient"}),
    "accumulating": Case(F.Accumulating, {"all": r"changes the gradient of parameter|backward\(\)"}),
    "uncertain": Case(F.Uncertain, {"fsdp": "has no dimensions"}),
    "warming": Case(F.Warming),
    "mutable": Case(F.Mutable, told="keeps what it made|fetched"),
    "chosen": Case(F.Chosen, {"fsdp 1": "", "fsdp": r"loss\(\) returned without a call of the model"}),
    "copied": Case(F.Copied, {"fsdp": CUT}),
    "uncertainty": Case(H.Uncertainty, {"all": OTHERS}),
    "centers": Case(H.Centers, {"all": "extra/centers differs"}),
    "signs_after": Case(H.SignsAfter),
    "pre_clipped": Case(H.PreClipped, {"bitwise fsdp": SUMMED}),
    "step_clipped": Case(H.StepClipped, {"bitwise fsdp": "gives other bits"}),
    "lars": Case(H.Lars, {"bitwise fsdp": "gives other bits"}),
    "penalised": Case(H.Penalised, {"fsdp": BACKWARD}),
    "inner": Case(H.Inner, {"fsdp": BACKWARD}),
    "in_parallel": Case(H.InParallel),
    "pseudo": Case(H.Pseudo),
    "renormed": Case(H.Renormed, {"all": "max_norm"}),
    "named": Case(H.Named),
    "schedule_free": Case(H.ScheduleFree, {"fsdp": r"evaluate\(\) changes parameters"}),
    "drifting": Case(H.Drifting, {"bitwise ddp": r"evaluate\(\) leaves parameters"}),
    "restarted": Case(H.Restarted),
    "pruned": Case(H.Pruned, {"fsdp": CUT}),
    "pruned_once": Case(H.PrunedOnce),
    "replaced": Case(H.Replaced, {"all": OTHERS}),
    "remembering": Case(H.Remembering),
    "doubles": Case(H.Doubles),
    "rolls_back": Case(H.RollsBack, {"bitwise fsdp": SUMMED, "fsdp": r"what is no tensor \(extra\) differs"}),
    "plain_list": Case(H.PlainList, {"all": OTHERS}),
    "cumulative": Case(H.Cumulative),
    "looks": Case(H.Looks),
    "late_average": Case(
        H.LateAverage, {"fsdp": "deepcopy", "all": r"job\.average.* changed in step 4 and is part of no saved state"}
    ),
    "swapped": Case(H.Swapped),
    "distributes": Case(H.Distributes, {"all": "needs a process group"}),
    "per_sample": Case(C.PerSample, {"fsdp": BACKWARD}),
    "momentum": Case(C.Momentum),
    "hand_scaled": Case(C.HandScaled),
    "crossed": Case(C.Crossed),
    "backward_statistics": Case(C.BackwardStatistics, {"all": BACKWARDS}),
    "hook_statistics": Case(C.HookStatistics, {"all": BACKWARDS}),
    "gradients_divided": Case(C.Normalised),
    "carried": Case(C.Carried, {"fsdp": "has no forward", "all": PASSED_ON}),
    "by_epoch": Case(C.ByEpoch),
    "smoothed": Case(C.Smoothed, {"all": PASSED_ON}),
    "weighed": Case(C.Weighed),
    "looks_ahead": Case(C.LooksAhead),
    "looks_further": Case(C.LooksFurther, {"all": r"job\.slow.* changed in step 2 and is part of no saved state"}),
    "gradient_noise": Case(
        C.GradientNoise, {"bitwise fsdp": "gives other bits", "fsdp": "draws random numbers for sharded"}
    ),
    "mixed": Case(C.Mixed),
    "collating": Case(C.Collating),
    "decayed": Case(C.Decayed),
    "quantised": Case(C.Quantised),
    "activated": Case(C.Activated, {"all": "changes parameters of the model"}),
    "clamped_in_hook": Case(C.Frozen, {"all": "changes parameters of the model"}),
    "hooked_blocks": Case(C.HookedBlocks, {"all": "changes parameters of the model"}),
    "late_writes": Case(C.LateWrites, {"all": WRITTEN}),
    "counted": Case(C.Counted, {"all": SUMS}),
    "spare_head": Case(test_cases_training.SpareHead),
    "branches": Case(test_cases_training.Branches),
    "unfreezes": Case(test_cases_training.Unfreezes),
    "past_forward": Case(test_cases_training.PastForward, {"fsdp": "AssertionError"}),  # FSDP2 names it FSDPNetwork
    "guarded": Case(test_cases_training.Guarded, {"fsdp 1": "", "fsdp": "returned without a call of the model"}),
    "sparse": Case(test_cases_training.Sparse, {"bitwise": "sparse=True", "fsdp": "sparse=True"}),
    "normalised": Case(test_cases_training.Normalised),
    "building": Case(building_jobs.Building),
    "building_parts": Case(lambda: building_jobs.Building(parts=True)),
    "building_hook": Case(lambda: building_jobs.Building(hook=True), {"fsdp": "has a hook on its gradient"}),
    "plain": Case(tiny_jobs.Plain),
    "everything": Case(tiny_jobs.Everything),
    "deep": Case(tiny_jobs.Deep),
    "odd": Case(tiny_jobs.Odd),
}
CELLS = [(e, s, w) for e in ("fast", "bitwise") for s in ("ddp", "fsdp") for w in WORLDS]


@dataclass
class Found:
    """What came of one cell of a job."""

    name: str
    cell: tuple[str, str, str]
    kind: str  # right, refused, told
    faults: list[str]
    sha: str = ""


def course_of(exactness: str, strategy: str, worlds: str) -> Course:
    sizes = WORLDS[worlds]
    parts = tuple(World(strategy, n, 0 if i == len(sizes) - 1 else 2) for i, n in enumerate(sizes))
    course = Course(exactness, parts, most=3, global_size=14, microbatches=7)
    return replace(course, joins=2, kill=("step.reduce", 4, 1)) if worlds == JOINED_KILLED else course


def run(case: Case, course: Course, folder: Path) -> Ran:
    """Train the job through its course.

    Raises:
        RunFailed, ConfigError: it is refused.
    """
    for world in course.worlds:
        prepared = prepare(case.make(), running.configuration(course, world, folder, "run"))
        running.run_world(prepared, world.workers, course, folder)
    return Ran(prepared, None)


def judge(name: str, cell: tuple[str, str, str], folder: Path) -> Found:
    """Run one cell and compare."""
    case, course = CASES[name], course_of(*cell)
    words = case.words(*cell)
    try:
        ran = run(case, course, folder)
    except (RunFailed, ConfigError) as error:
        right = words and re.search(words, str(error))
        return Found(name, cell, "refused", [] if right else [f"ended, which it was not to: {error}"])
    if words:
        return Found(name, cell, "right", [f"finished, but was to be refused: {words}"])
    if case.told and cell[0] == "fast":
        return Found(name, cell, "told", [])
    if case.told:
        kinds = ("notice", "exactness_lost", "unsaved_numbers", "worker_warm")
        said = json.dumps([e for kind in kinds for e in ran.events(kind)])
        return Found(name, cell, "told", [] if re.search(case.told, said) else [f"not told: {said[-600:]}"])
    faults = _differences(case, course, ran)
    return Found(name, cell, "right", faults, ran.sha if cell[0] == "bitwise" else "")


def _differences(case: Case, course: Course, ran: Ran) -> list[str]:
    sizes = ran.column("world_size")
    if len(sizes) != STEPS:
        return [f"{len(sizes)} steps"]
    separate = "of one microbatch each" in str(ran.events("worker_warm") + ran.events("notice"))
    of = running.passes_of(SimpleNamespace(batch=""), course, sizes, separate=separate)  # type: ignore[arg-type]

    def foretell(trials: int) -> list[oracle.Trained]:
        nudges = [(0.0, 0), *((oracle.NUDGE, noise) for noise in range(1, trials + 1))]
        return [oracle.train(case.make, ran.run.config, ran.run.plan, of, nudge=n, noise=k) for n, k in nudges]

    found = running.differences(ran, *foretell(1))
    return running.differences(ran, *foretell(TRIALS)) if found else []


def grid(names: list[str], cells: list[tuple[str, str, str]]) -> Iterator[Found]:
    """All cells of these jobs; of a job in bitwise, all that finish must have the same weights."""
    for name in names:
        shas: dict[str, tuple[str, str, str]] = {}
        for cell in cells:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found = judge(name, cell, Path(folder))
                except Exception as error:  # of what is tried or of the harness: a finding either way
                    text = "".join(traceback.format_exception(error)[-4:])
                    found = Found(name, cell, "error", [f"{type(error).__name__}: {text}"])
            if found.sha and not CASES[name].told:
                shas.setdefault(found.sha, cell)
                if len(shas) > 1:
                    found.faults.append(f"other weights than in {next(iter(shas.values()))}")
            yield found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--log")
    parser.add_argument("--worlds", nargs="*", choices=list(WORLDS), default=list(WORLDS))
    given = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    forked.start_fork_server()
    try:
        last = time.monotonic()
        for found in grid(given.names or list(CASES), [cell for cell in CELLS if cell[2] in given.worlds]):
            kind = "faulty" if found.faults else found.kind
            counts[kind] += 1
            line: dict[str, Any] = {"job": found.name, "cell": found.cell, "kind": kind, "faults": found.faults}
            if given.log:
                with open(given.log, "a") as log:
                    log.write(json.dumps(line) + "\n")
            now = time.monotonic()
            print(f"{found.name} {' '.join(found.cell)}: {kind} {now - last:.1f} s", flush=True)
            for words in found.faults[:4]:
                print("  " + words[-700:].replace("\n", "\n    "), flush=True)
            last = now
    finally:
        forked.stop_fork_server()
    print(dict(counts))


if __name__ == "__main__":
    main()
