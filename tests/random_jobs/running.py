"""Runs of random jobs in plain processes, and what they are held against."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elastic import (
    BatchOptions,
    CheckpointOptions,
    EvalOptions,
    ObserveOptions,
    OptimOptions,
    ParallelOptions,
    PrecisionOptions,
    RecoveryOptions,
    RunOptions,
    ScalingOptions,
    TrainConfig,
)
from elastic.errors import RunFailed
from elastic.run.prepare import PreparedRun, prepare
from tests import oracle
from tests.forked import WAIT_S, Ran, Watch, fault, local_run, plan
from tests.random_jobs.job import RandomJob, Recipe, job_of
from tests.random_jobs.recipes import STEPS, Course, World

#: How much further than the oracle's own last digits a figure may be, since those are found by few trials; and how far
#: in any case, by the number format of compute: in bfloat16 one number that is rounded to the other side is so much.
MARGIN, LEAST = 20.0, {"off": 2e-5, "bf16": 2e-3}


def configuration(course: Course, world: World, storage: Path, name: str) -> TrainConfig:
    cut = world.strategy != "ddp"
    return TrainConfig(
        run=RunOptions(
            name=name,
            storage=str(storage),
            duration=f"{STEPS}st",
            exactness=course.exactness,  # type: ignore[arg-type]
            stop_after=f"{world.steps}st" if world.steps else None,
        ),
        batch=BatchOptions(
            global_size=course.global_size, microbatches=course.microbatches, pass_size=course.pass_size
        ),
        optim=OptimOptions(
            schedule=course.schedule,  # type: ignore[arg-type]
            warmup=f"{course.warmup}st" if course.warmup else None,
            clip_norm=course.clip,
        ),
        precision=PrecisionOptions(autocast=course.autocast),  # type: ignore[arg-type]
        scaling=ScalingOptions(
            max_workers=course.most, accelerator="cpu", workers_per_node=2 if world.strategy == "hsdp" else 1
        ),
        parallel=ParallelOptions(strategy=world.strategy, activation_checkpointing=course.recompute),  # type: ignore[arg-type]
        eval=EvalOptions(every="3st"),
        checkpoint=CheckpointOptions(when_busy="wait"),
        recovery=RecoveryOptions(snapshot_every="2st" if course.snapshots and cut else "off"),
        observe=ObserveOptions(tensorboard=False),
    )


class Refused(Exception):
    """The run was refused, or ended, in these words."""


def run(recipe: Recipe, course: Course, folder: Path, name: str = "run") -> Ran:
    """Train the job through its course.

    Raises:
        Refused: it did not finish.
    """
    for number, world in enumerate(course.worlds):
        prepared = prepare(job_of(recipe), configuration(course, world, folder, name))
        first = number == 0
        try:
            run_world(prepared, world.workers, course if first else replace(course, joins=0, kill=None), folder)
        except RunFailed as error:
            raise Refused(str(error)) from error
    return Ran(prepared, None)


def run_world(prepared: PreparedRun, workers: int, course: Course, folder: Path) -> None:
    """One part of a run: what its course has for the first world happens in it.

    Raises:
        RunFailed: it did not finish.
    """
    faults, held = [], folder / "held"
    if course.kill is not None:
        point, step, rank = course.kill
        here = step if point.startswith("step") else None
        faults.append(fault(point, here, rank, only=folder / "killed"))
    if course.joins:
        held.touch()
        faults.append(fault("step.forward", course.joins, 0, "hold", file=held))
    watch = Watch()
    with local_run(prepared, workers, on_record=watch, environment=plan(*faults)) as local:
        if course.joins:
            with _let_go(held):
                came = watch.wait_for(lambda r: _is_over(r) or (r.get("step", 0) >= course.joins - 1 and "loss" in r))
                if not _is_over(came):
                    local.add_worker(environment={})
                    watch.wait_for(
                        lambda r: _is_over(r) or (r.get("kind"), r.get("member")) == ("worker_warm", f"w1-{workers}")
                    )
        local.wait(WAIT_S)


def _is_over(record: dict[str, Any]) -> bool:
    return record.get("kind") in ("run_failed", "run_finished", "end")


def _is_warm(record: dict[str, Any], worker: str) -> bool:
    return (record.get("kind"), record.get("member")) == ("worker_warm", worker)


@contextlib.contextmanager
def _let_go(held: Path) -> Iterator[None]:
    try:
        yield
    finally:
        held.unlink()


def quiet(course: Course) -> Course:
    """The run that others are held against in bitwise: one worker with a whole model, to which nothing happens."""
    return replace(course, worlds=(World("ddp", 1),), joins=0, kill=None, snapshots=False)


def passes_of(
    recipe: Recipe, course: Course, sizes: list[int], *, separate: bool = False
) -> Callable[[int], list[oracle.Pass]]:
    """The passes of each step of a run that had worlds of these sizes, step by step.

    Args:
        separate: the run found that each has one microbatch.
    """
    count, each = course.microbatches, course.global_size // course.microbatches
    most = -(-count // course.most)
    if course.pass_size is not None:
        most = max(1, course.pass_size // each)
    if separate or course.exactness == "bitwise" or recipe.batch == "mixed":  # which draws for several samples at once
        most = 1

    def of(step: int) -> list[oracle.Pass]:
        size, found = sizes[step], []
        for rank in range(size):
            first, end = count * rank // size, count * (rank + 1) // size
            found += [(at, min(most, end - at)) for at in range(first, end, most)]
        return found

    return of


def foretell(recipe: Recipe, course: Course, ran: Ran, trials: int = 1) -> list[oracle.Trained]:
    """What the run was to compute, and the same with other last digits, so many times."""
    sizes = ran.column("world_size")
    assert len(sizes) == STEPS

    def make() -> RandomJob:
        return job_of(recipe)

    said = str(ran.events("worker_warm") + ran.events("notice"))
    separate = "of one microbatch each" in said
    of = passes_of(recipe, course, sizes, separate=separate)
    config, the_plan = ran.run.config, ran.run.plan
    nudges = [(0.0, 0), *((oracle.NUDGE, noise) for noise in range(1, trials + 1))]
    return [oracle.train(make, config, the_plan, of, nudge=nudge, noise=noise) for nudge, noise in nudges]


def differences(ran: Ran, wanted: oracle.Trained, *nudged: oracle.Trained) -> list[str]:
    """Where a run differs from the oracle by more than last digits, in words."""
    found: list[str] = []
    least = LEAST[ran.run.config.precision.autocast]

    def compare(what: str, here: float, of: Callable[[oracle.Trained], float], scale: float = 1.0) -> None:
        right = of(wanted)
        spread = max(abs(of(other) - right) for other in nudged)
        allowed = least * max(abs(right), scale) + MARGIN * spread
        if not abs(here - right) <= allowed:
            found.append(f"{what}: {here!r} instead of {right!r} (allowed {allowed:.1e})")

    for step in range(STEPS):
        for name, column, scale in (("loss", "losses", 0.1), ("grad_norm", "norms", 0.1), ("lr", "rates", 0.0)):
            here = ran.column(name)[step]
            compare(f"{name} of step {step + 1}", here, lambda t, c=column, s=step: getattr(t, c)[s], scale)  # type: ignore[misc]
        for name in wanted.metrics[step]:
            here = ran.column(name)[step]
            compare(f"{name} of step {step + 1}", here, lambda t, n=name, s=step: t.metrics[s][n])  # type: ignore[misc]
    for step, values in wanted.evaluations.items():
        for name in values:
            here = ran.evaluations.get(step, {}).get(name, float("nan"))
            compare(f"{name} after step {step}", here, lambda t, n=name, s=step: t.evaluations[s][n])  # type: ignore[misc]
    found += _tensor_differences(ran, wanted.tensors, [t.tensors for t in nudged])
    return found


def _tensor_differences(
    ran: Ran, wanted: dict[str, torch.Tensor], nudged: Sequence[dict[str, torch.Tensor]]
) -> list[str]:
    found, least = [], LEAST[ran.run.config.precision.autocast]
    state = ran.state()
    for name, right in wanted.items():
        if name not in state:
            continue  # a tied one, which is saved once
        dtype, shape, data = state[name]
        here = torch.frombuffer(bytearray(data), dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)
        if (dtype, shape) != (right.dtype, tuple(right.shape)):
            found.append(f"{name} is {dtype} {shape} instead of {right.dtype} {tuple(right.shape)}")
        elif right.is_floating_point() or right.is_complex():
            spread = max(_largest(other[name] - right) for other in nudged)
            allowed = least * max(1.0, _largest(right)) + MARGIN * spread
            if not (off := _largest(here - right)) <= allowed:
                found.append(f"{name} is off by {off:.2e} (allowed {allowed:.1e})")
        elif not torch.equal(here, right):
            found.append(f"{name} is {here.tolist()} instead of {right.tolist()}")
    return found


def _largest(tensor: torch.Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def other_bits(ran: Ran, alone: Ran) -> list[str]:
    """In what a run differs from the one to which nothing happened, in words."""
    found = []
    for name in ("loss", "grad_norm", "lr", "sample_hash", "first_position", "count"):
        if ran.column(name) != alone.column(name):
            found.append(f"{name}: {ran.column(name)} instead of {alone.column(name)}")
    evaluated = {step: ran.evaluations.get(step) for step in alone.evaluations}  # and where it paused, besides
    if evaluated != alone.evaluations:
        found.append(f"evaluations: {evaluated} instead of {alone.evaluations}")
    here, right = ran.state(), alone.state()
    for name in sorted(here.keys() | right.keys()):
        if here.get(name) != right.get(name):
            values = f": {here.get(name)} instead of {right.get(name)}" if name == "values" else ""
            found.append(f"other bits in {name}{values}")
    for name in ("weights_sha256", "loss", "metrics", "sample"):
        if ran.result.get(name) != alone.result.get(name):
            found.append(f"result {name}: {ran.result.get(name)} instead of {alone.result.get(name)}")
    return found
