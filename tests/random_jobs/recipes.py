"""Drawing jobs, and what happens to their runs, from a seed. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from tests.random_jobs.data import BATCHES, DATA
from tests.random_jobs.job import HABITS, LOSSES, PARTS, Recipe
from tests.random_jobs.optimizers import GROUPS, OPTIMIZERS

STEPS = 6
#: (global batch, microbatches): each has two samples or more, which BatchNorm needs.
BATCH_SIZES = ((12, 4), (12, 6), (14, 7), (10, 5), (16, 8))
POINTS = ("step.forward", "step.reduce", "step.before_fence", "step.after_fence", "world.connected", "eval.begin")


@dataclass(frozen=True)
class World:
    """Workers that train with a strategy, for so many steps or (0) to the end."""

    strategy: str
    workers: int
    steps: int = 0


@dataclass(frozen=True)
class Course:
    """What happens to a run.

    Args:
        worlds: one after another, with a pause in between.
        joins: one more worker comes in this step of the first world; 0: none does.
        kill: (fault point, step, rank) in the first world, or nothing.
    """

    exactness: str
    worlds: tuple[World, ...]
    most: int
    global_size: int = 12
    microbatches: int = 6
    joins: int = 0
    kill: tuple[str, int, int] | None = None
    snapshots: bool = False
    pass_size: int | None = None
    schedule: str = "constant"
    warmup: int = 0
    clip: float | None = None
    autocast: str = "off"
    recompute: bool = False


CUT, CUT_OR_EXACT, SCHEDULED, ALWAYS = "cut", "cut or bitwise", "scheduled", "always"
_NO_UPDATE = "cannot update parameters that are cut over the workers"
#: Parts, optimizers, losses and habits that may be refused: where, and a pattern of the words.
REFUSED: dict[str, tuple[str, str]] = {
    "sparse_embedding": (CUT_OR_EXACT, "sparse gradients are only summed with"),
    "scalar": (CUT, "has no dimensions, so it cannot be sharded"),
    "transposed": (CUT, "is not contiguous in memory"),
    "channels_last": (CUT, "is not contiguous in memory"),
    "complex": (CUT, "need one dtype"),
    "double": (CUT, "need one dtype"),
    "left_out_block": (CUT, "run for some microbatches and not for others|a block of the model ran in"),
    "adafactor": (CUT, f"gives other bits when a parameter is cut|{_NO_UPDATE}"),
    "own_parameter_class": (CUT, "is a Special, a class that it loses where it is cut"),
    "lazy": (ALWAYS, "takes its size from the first batch"),
    "gradient_hook": (CUT, "has a hook on its gradient"),
    "clipping_hook": (CUT, "has a hook on its gradient"),
    "listed_parameters": (CUT, "keeps the parameter .* of the model, which is cut over the workers"),
    "closure": (CUT, "keeps the parameter .* of the model, which is cut over the workers"),
    "rprop": (CUT, _NO_UPDATE),
    "sgd_fused": (CUT, _NO_UPDATE),
    "adamw_fused": (CUT, _NO_UPDATE),
    "keeps_model": (CUT, "keeps the parameter .* of the model, which is cut over the workers"),
    "wrapping": (ALWAYS, "is part of no saved state"),
    "scheduler": (SCHEDULED, "the learning rate is set twice"),
    "rate_changes": (SCHEDULED, "the job set the learning rate of parameter group"),
}


def refusals(recipe: Recipe, course: Course) -> dict[str, str]:
    """What of a job may be refused in such a run: patterns of the words, by name."""
    cut = any(world.strategy != "ddp" for world in course.worlds)
    exact = course.exactness == "bitwise"
    scheduled = course.schedule != "constant" or course.warmup > 0 or "own_schedule" in recipe.habits
    there = {CUT: cut, CUT_OR_EXACT: exact or cut, SCHEDULED: scheduled, ALWAYS: True}
    found = {name: REFUSED[name] for name in names_of(recipe) if name in REFUSED}
    return {name: words for name, (where, words) in found.items() if there[where]}


def names_of(recipe: Recipe) -> list[str]:
    return [*recipe.parts, recipe.optimizer, recipe.loss, *recipe.habits, recipe.data, recipe.batch, recipe.groups]


def draw(seed: int) -> tuple[Recipe, Course]:
    """A job and its course. Of those that may be refused one in ten stays."""
    r = random.Random(seed)
    course = _course(r)
    while True:
        recipe = _recipe(r)
        if course.recompute and "rrelu" in recipe.parts:
            continue  # torch computes it again with memory that nobody wrote to
        if "sparse_embedding" in recipe.parts and recipe.optimizer not in ("sgd", "adagrad"):
            recipe = replace(recipe, optimizer="sgd")  # most cannot do anything with sparse gradients
        if course.recompute and not recipe.blocks and len(recipe.parts) < 2:
            continue  # no blocks to compute again, which is refused
        if not refusals(recipe, course) or r.random() < 0.1:
            return recipe, course


def _recipe(r: random.Random) -> Recipe:
    return Recipe(
        parts=tuple(r.choice(list(PARTS)) for _ in range(r.choice([1, 2, 2, 3, 3, 4]))),
        width=r.choice([8, 12]),
        optimizer=r.choice(list(OPTIMIZERS)),
        groups=r.choice(list(GROUPS)),
        loss=r.choice(list(LOSSES)),
        data=r.choice(list(DATA)),
        batch=r.choice(list(BATCHES)),
        samples=r.choice([31, 60, 60, 200]),
        habits=tuple(sorted({r.choice(list(HABITS)) for _ in range(r.choice([0, 1, 1, 2]))})),
        blocks=r.random() < 0.5,
    )


def _course(r: random.Random) -> Course:
    exactness = r.choice(["fast", "bitwise"])
    most = r.choice([2, 3, 4])
    worlds, left = [], STEPS
    for _ in range(r.choice([1, 1, 2, 2, 3])):
        strategy = r.choice(["ddp", "ddp", "fsdp", "fsdp", "hsdp"]) if most == 4 else r.choice(["ddp", "fsdp"])
        worlds.append(World(strategy, r.randint(1, most), r.randint(1, 3) if left > 3 else 0))
        left -= worlds[-1].steps
        if not worlds[-1].steps:
            break
    worlds[-1] = World(worlds[-1].strategy, worlds[-1].workers)
    first = worlds[0]
    steps, happens = first.steps or STEPS, r.choice(["nothing", "join", "kill", "kill"])
    size, microbatches = r.choice([b for b in BATCH_SIZES if b[1] >= most])
    return Course(
        exactness,
        tuple(worlds),
        most,
        size,
        microbatches,
        joins=r.randint(2, steps) if happens == "join" and first.workers < most and steps > 1 else 0,
        kill=(
            (r.choice(POINTS), r.randint(1, steps), r.randrange(first.workers))
            if happens == "kill" and first.workers > 1
            else None
        ),
        snapshots=first.strategy != "ddp" and r.random() < 0.5,
        pass_size=r.choice([None, None, 2, 5]) if exactness == "fast" else None,
        schedule=r.choice(["constant", "cosine"]),
        warmup=r.choice([0, 0, 2]),
        clip=r.choice([None, 0.3, 5.0]),
        autocast=r.choice(["off"] * 7 + ["bf16"]),
        recompute=r.random() < 0.1,
    )
