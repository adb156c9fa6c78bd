"""Many random jobs without pytest: `python -m tests.random_jobs.campaign 0:300 --log FILE [--smaller]`.

A line of JSON a seed goes to the log. With `--smaller` what a faulty job is made of is taken away as long as it stays
faulty. `--job RECIPE` and `--course COURSE` try one that was found.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests import forked
from tests.random_jobs.job import Recipe
from tests.random_jobs.recipes import Course, World, draw
from tests.random_jobs.verdict import Verdict, judge


def course_of(text: str) -> Course:
    values = json.loads(text)
    values["worlds"] = tuple(World(**world) for world in values["worlds"])
    if values.get("kill"):
        values["kill"] = tuple(values["kill"])
    return Course(**values)


def short(course: Course) -> dict[str, Any]:
    """The fields that are not the defaults."""
    standard = {f.name: f.default for f in dataclasses.fields(Course)}
    return {k: v for k, v in asdict(course).items() if v != standard[k]}


def attempt(recipe: Recipe, course: Course) -> Verdict:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return judge(recipe, course, Path(folder))
        except Exception as error:  # of what is tried or of the harness: a finding either way
            text = "".join(traceback.format_exception(error)[-3:])
            return Verdict(recipe, course, faults=[f"{type(error).__name__}: {text}"])


def smaller(recipe: Recipe, course: Course) -> Iterator[tuple[Recipe, Course]]:
    for i in range(len(recipe.parts)):
        yield replace(recipe, parts=recipe.parts[:i] + recipe.parts[i + 1 :]), course
    for i in range(len(recipe.habits)):
        yield replace(recipe, habits=recipe.habits[:i] + recipe.habits[i + 1 :]), course
    for f in dataclasses.fields(Recipe):
        if f.name not in ("parts", "habits") and getattr(recipe, f.name) != f.default:
            yield replace(recipe, **{f.name: f.default}), course
    if len(course.worlds) > 1:
        yield recipe, replace(course, worlds=(replace(course.worlds[0], steps=0),))
        yield recipe, replace(course, worlds=course.worlds[:1] + (World("ddp", 1),))
    for f in dataclasses.fields(Course):
        kept = f.name in ("exactness", "worlds", "most", "global_size", "microbatches")
        if not kept and getattr(course, f.name) != f.default:
            yield recipe, replace(course, **{f.name: f.default})
    for i, world in enumerate(course.worlds):
        for simpler in (replace(world, workers=1), replace(world, workers=2), replace(world, strategy="ddp")):
            if simpler != world and not (simpler.strategy == "hsdp" and simpler.workers < 2):
                yield recipe, replace(course, worlds=course.worlds[:i] + (simpler,) + course.worlds[i + 1 :])


def shrink(found: Verdict) -> Verdict:
    """The same fault (by its first words) with less."""
    going = True
    while going:
        going = False
        for recipe, course in smaller(found.recipe, found.course):
            tried = attempt(recipe, course)
            if tried.faults and tried.faults[0][:12] == found.faults[0][:12]:
                found, going = tried, True
                break
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seeds", nargs="?", default="")
    parser.add_argument("--log")
    parser.add_argument("--smaller", action="store_true")
    parser.add_argument("--job")
    parser.add_argument("--course")
    given = parser.parse_args()
    if given.seeds:
        start, end = map(int, given.seeds.split(":"))
        tried = [(seed, *draw(seed)) for seed in range(start, end)]
    else:
        tried = [(-1, Recipe.of(given.job), course_of(given.course))]
    counts: collections.Counter[str] = collections.Counter()
    forked.start_fork_server()
    try:
        for seed, recipe, course in tried:
            began = time.monotonic()
            verdict = attempt(recipe, course)
            took = time.monotonic() - began
            kind = "faulty" if verdict.faults else f"refused: {verdict.refused}" if verdict.refused else "right"
            if verdict.faults and given.smaller:
                verdict = shrink(verdict)
            counts[kind] += 1
            line = {
                "seed": seed,
                "seconds": round(took, 2),
                "kind": kind,
                "job": verdict.recipe.text(),
                "course": json.dumps(short(verdict.course)),
                "faults": verdict.faults,
            }
            if given.log:
                with open(given.log, "a") as log:
                    log.write(json.dumps(line) + "\n")
            print(f"{seed} {took:.1f} s {kind}", flush=True)
            if verdict.faults:
                print(f"  --job '{line['job']}' --course '{line['course']}'")
                for words in verdict.faults[:4]:
                    print("  " + words[-1500:].replace("\n", "\n    "), flush=True)
    finally:
        forked.stop_fork_server()
    print(dict(counts))


if __name__ == "__main__":
    main()
