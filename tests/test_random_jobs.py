"""Jobs drawn at random, as strangers write them: a run computes what plain PyTorch does, or is refused by name.

Losses, norms, rates, metrics, evaluations and weights are those of `tests.oracle`, to the last digits but some; in
bitwise all bits are those of one worker with a whole model, to which nothing happened.

`RANDOM_JOBS=0:300 python -m pytest tests/test_random_jobs.py` tries more seeds; `python -m tests.random_jobs.campaign`
tries many without pytest, and makes the jobs it finds smaller.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests import oracle
from tests.fresh import seeds
from tests.random_jobs.data import BATCHES, DATA
from tests.random_jobs.job import HABITS, LOSSES, PARTS, Recipe, job_of
from tests.random_jobs.optimizers import GROUPS, OPTIMIZERS
from tests.random_jobs.recipes import STEPS, Course, World, draw, names_of, refusals
from tests.random_jobs.running import differences, foretell, passes_of, run
from tests.random_jobs.verdict import judge

# ---- what is drawn ---------------------------------------------------------------------------------------------


def test_a_thousand_draws_have_everything_and_few_that_may_be_refused():
    drawn = [draw(seed) for seed in range(1000)]

    names = Counter(name for recipe, _ in drawn for name in names_of(recipe))
    assert names.keys() >= {*PARTS, *OPTIMIZERS, *LOSSES, *HABITS, *DATA, *BATCHES, *GROUPS}
    assert sum(bool(refusals(recipe, course)) for recipe, course in drawn) < 150
    strategies = Counter((course.exactness, world.strategy) for _, course in drawn for world in course.worlds)
    assert len(strategies) == 6
    assert min(strategies.values()) > 50
    assert {world.workers for _, course in drawn for world in course.worlds} == {1, 2, 3, 4}
    assert min(sum(bool(c.joins) for _, c in drawn), sum(bool(c.kill) for _, c in drawn)) > 100


def test_a_seed_draws_the_same_job_each_time_and_a_recipe_is_a_text():
    recipe, course = draw(3)

    assert draw(3) == (recipe, course)
    assert Recipe.of(recipe.text()) == recipe
    assert Recipe.of("{}") == Recipe()


def test_passes_of_a_step_are_all_its_microbatches_once():
    course = Course("fast", (World("ddp", 3),), 4, 14, 7)

    for size in (1, 2, 3, 4):
        found = sorted(passes_of(Recipe(), course, [size])(0))
        assert [first + i for first, count in found for i in range(count)] == list(range(7))
        assert max(count for _, count in found) <= 2


# ---- runs ------------------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_the_oracle_sees_what_is_wrong_by_little(tmp_path: Path) -> None:
    """A part in a thousand of the learning rate, the weights of the batch, and what of BatchNorm is averaged."""
    recipe = Recipe(parts=("batchnorm", "dropout"), loss="weighted", optimizer="adamw")
    course = Course("fast", (World("ddp", 2),), 2, 14, 7, schedule="cosine")
    ran = run(recipe, course, tmp_path)

    assert differences(ran, *foretell(recipe, course, ran)) == []

    def wrong(recipe: Recipe, most: int = 2, **optim: float) -> list[str]:
        of = passes_of(recipe, replace(course, most=most), [2] * STEPS)
        config = replace(ran.run.config, optim=replace(ran.run.config.optim, **optim))
        both = [oracle.train(lambda: job_of(recipe), config, ran.run.plan, of, nudge=n) for n in (0.0, oracle.NUDGE)]
        return differences(ran, *both)

    assert wrong(recipe) == []
    assert any("lr of step" in words for words in wrong(recipe, final_lr=0.1001))
    assert any("loss of step 2" in words for words in wrong(replace(recipe, loss="classes")))
    assert any("running_var" in words for words in wrong(recipe, most=3))


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_what_is_computed_again_in_backward_passes_sees_the_buffers_that_it_saw_before(tmp_path: Path) -> None:
    recipe = Recipe(parts=("running_mean", "counter", "replaced_mean", "unsaved_mean"))
    verdict = judge(recipe, Course("fast", (World("ddp", 2),), 2, recompute=True), tmp_path)
    assert verdict.faults == []


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_the_loss_of_mixed_samples_is_not_taken_for_a_mean(tmp_path: Path) -> None:
    """Of one microbatch it lies between those of its halves, in which other samples are mixed."""
    recipe = Recipe(parts=("double_backward",), width=12, loss="distilled", data="dicts", batch="mixed", samples=200)
    assert judge(recipe, Course("fast", (World("ddp", 1),), 2, 12, 4), tmp_path).faults == []


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_a_count_of_a_branch_that_some_microbatches_take_is_that_of_those_that_took_it(tmp_path: Path) -> None:
    recipe = Recipe(parts=("sometimes_normed", "never_training"), batch="mixed", loss="distilled")
    course = Course("bitwise", (World("fsdp", 3, 2), World("ddp", 3)), 3, 12, 4)
    assert judge(recipe, course, tmp_path).faults == []


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
@pytest.mark.timeout(240)
@pytest.mark.parametrize("seed", seeds(range(8), slow=range(8, 20), fresh=40, variable="RANDOM_JOBS"))
def test_a_random_job_trains_right_or_is_refused_by_name(seed: int, tmp_path: Path) -> None:
    verdict = judge(*draw(seed), tmp_path)
    assert verdict.faults == [], verdict.text()
