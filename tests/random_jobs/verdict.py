"""Whether a run of a random job was right: trained as plain PyTorch does, or refused in the words that it was to be."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from elastic.errors import ConfigError
from tests.random_jobs.job import Recipe
from tests.random_jobs.recipes import Course, refusals
from tests.random_jobs.running import Refused, differences, foretell, other_bits, quiet, run

TRIALS = 8  # of other last digits, where one shows a difference


@dataclass
class Verdict:
    """`refused` says by what, where it was to be; `faults` is empty where all is right."""

    recipe: Recipe
    course: Course
    refused: str = ""
    faults: list[str] = field(default_factory=list)

    def text(self) -> str:
        return f"{self.recipe.text()}\n{self.course}\n" + "\n".join(self.faults)


def judge(recipe: Recipe, course: Course, folder: Path) -> Verdict:
    """Run the job through its course and compare."""
    verdict = Verdict(recipe, course)
    known = refusals(recipe, course)
    try:
        ran = run(recipe, course, folder)
    except (Refused, ConfigError) as error:
        by = [name for name, words in known.items() if re.search(words, str(error))]
        if by:
            verdict.refused = by[0]
        else:
            verdict.faults.append(f"ended, which it was not to: {error}")
        return verdict
    if differences(ran, *foretell(recipe, course, ran)):  # how far last digits may go is not seen in every trial
        verdict.faults += differences(ran, *foretell(recipe, course, ran, TRIALS))
    if course.exactness == "bitwise" and course != quiet(course):
        alone = run(recipe, quiet(course), folder, "alone")
        verdict.faults += other_bits(ran, alone)
    shutil.rmtree(folder / "run", ignore_errors=True)
    return verdict
