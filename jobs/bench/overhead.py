"""What the machinery costs in steps without a fault: the same processes run steps with it and without, in turns.

    python -m jobs.bench.overhead [--pairs 30] [--json FILE]

Blocks of steps alternate within one run of plain processes, so that both kinds meet the same processes, memory and
neighbours; a pair is a block and the one after it. A bare step fetches, runs forward and backward passes under DDP,
clips and updates. A whole step has besides: the record of the step and its small collective, the fence, progress for
the watcher, guards around the job's code, and the row and its way into the ledger. Heartbeats (one a second) go on in
both.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from elastic.config import BatchOptions, ObserveOptions, OptimOptions, RunOptions, ScalingOptions, TrainConfig
from elastic.run.prepare import prepare
from elastic.worker.local import LocalRun
from jobs.bench.report import median, table, write_json
from jobs.bench.steady import CONFIG, Steady
from jobs.codegpt import CodeGPT

BLOCK_STEPS = 10
CLIP_NORM = 1.0


def alternate(times: str) -> None:
    """Make this worker's session run every other block of steps bare.

    Rank 0 writes to a file, after each step, the time and the processor seconds that its process has used.
    """
    from elastic.worker.flags import Flags
    from elastic.worker.world import World

    whole = World.take_step
    file = open(times, "a", buffering=1)  # noqa: SIM115 - open as long as the process lives

    def step(world: World) -> Flags:
        if world.step // BLOCK_STEPS % 2 == 1:
            _bare_step(world)
            found = Flags()
        else:
            found = whole(world)
        if world.group.rank == 0:
            file.write(f"{time.perf_counter()} {time.process_time()}\n")
        return found

    World.take_step = step  # type: ignore[method-assign]


def _bare_step(world: Any) -> None:
    """A step of the same model on the same data, by what any DDP loop has."""
    import torch

    steps, state = world.steps, world.state
    step, replica = world.step, steps._replica
    replica.model.zero_grad(set_to_none=True)
    for i, (first, count) in enumerate(steps._spans):
        batch = steps._loader.next(step, first, count).batch
        if replica._ddp is not None:
            replica._ddp.require_backward_grad_sync = i == len(steps._spans) - 1
        loss, weight, _ = replica._forward(batch)
        (loss / (weight * len(steps._spans))).backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), CLIP_NORM)
    state.optimizer.step()
    loss.item()
    world.worker.holding.applied = step + 1


@dataclass
class Computing(CodeGPT):
    """The main job without evaluation: its steps keep every core busy."""

    times: str = field(default="", metadata={"help": "file for the time of each step"})

    def eval_data(self) -> None:
        return None

    def model(self) -> Any:
        alternate(self.times)
        return super().model()


@dataclass
class Waiting(Steady):
    """Steps that mostly wait, as steps on an accelerator do: what is added to them is time, not work."""

    times: str = field(default="", metadata={"help": "file for the time of each step"})

    def model(self) -> Any:
        alternate(self.times)
        return super().model()


def measure(
    job: Any, config: TrainConfig, workers: int, pairs: int, *, accelerator: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds, and processor seconds of rank 0, of a bare and of a whole step in each pair of blocks."""
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        times = Path(name) / "times"
        job = replace(job, times=str(times))
        steps = BLOCK_STEPS * 2 * (pairs + 1)
        config = replace(
            config,
            run=RunOptions(storage=name, duration=f"{steps}st"),
            optim=OptimOptions(clip_norm=CLIP_NORM),
            scaling=ScalingOptions(max_workers=workers),
            observe=ObserveOptions(tensorboard=False),
        )
        environment = {"OMP_NUM_THREADS": "1"}
        with LocalRun(prepare(job, config), workers, environment=environment, accelerator=accelerator) as local:
            local.wait(1800)
        wall, cpu = zip(*(map(float, line.split()) for line in times.read_text().splitlines()), strict=True)
    return {
        "whole_s": _typical(wall)[::2],
        "bare_s": _typical(wall)[1::2],
        "whole_cpu_s": _typical(cpu)[::2],
        "bare_cpu_s": _typical(cpu)[1::2],
    }


def _typical(at: tuple[float, ...]) -> list[float]:
    """Median step of each block after the first two, which warm up; a block's first step follows one of the others."""
    ends = range(3 * BLOCK_STEPS, len(at) + 1, BLOCK_STEPS)
    return [median(at[i] - at[i - 1] for i in range(end - BLOCK_STEPS + 1, end)) for end in ends]


def _row(name: str, found: dict[str, list[float]]) -> list[Any]:
    def more(whole: str, bare: str) -> list[float]:
        return [w - b for w, b in zip(found[whole], found[bare], strict=True)]

    extra = more("whole_s", "bare_s")
    share = [100 * e / b for e, b in zip(extra, found["bare_s"], strict=True)]
    quarters = statistics.quantiles(share, n=4)
    return [
        name,
        len(share),
        1e3 * median(found["bare_s"]),
        1e3 * median(found["whole_s"]),
        1e3 * median(extra),
        median(share),
        quarters[0],
        quarters[2],
        1e3 * median(more("whole_cpu_s", "bare_cpu_s")),
    ]


HEAD = ["steps that", "pairs", "bare ms", "whole ms", "more ms", "more %", "quartile", "quartile", "more CPU ms"]


def run(pairs: int) -> dict[str, Any]:
    """Print the table; returns its figures."""
    kinds = {
        "compute, 2 workers": (
            Computing(),
            TrainConfig(batch=BatchOptions(global_size=32, microbatches=8)),
            2,
        ),
        "wait 0.1 s, 3 workers": (Waiting(pause=0.1), CONFIG, 3),
    }
    found = {name: measure(*parts, pairs) for name, parts in kinds.items()}
    rows = [_row(name, figures) for name, figures in found.items()]
    print(f"\nsteps without a fault, fast, in turns of {BLOCK_STEPS}: medians of pairs of blocks")
    print(table(HEAD, rows))
    return {"head": HEAD, "rows": rows, "seconds": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if arguments.pairs < 2:
        parser.error(f"--pairs is {arguments.pairs}; give at least 2, since one pair has no spread")
    write_json(arguments.json, run(arguments.pairs))


if __name__ == "__main__":
    main()
