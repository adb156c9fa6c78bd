"""What the machinery costs in steps without a fault: the same processes run steps with it and without, in turns.

    python -m jobs.bench.overhead [--width 0.5] [--limit 600] [--json FILE]

Blocks of steps alternate within one run of plain processes, so that both kinds meet the same processes, memory and
neighbours; a pair is a block and the one after it. The run ends when it is known well enough where the median of the
pairs lies, or says that it was not in the given time. A bare step fetches, runs forward and backward passes under DDP,
clips and updates. A whole step has besides: the record of the step and its small collective, the fence, progress for
the watcher, guards around the job's code, and the row and its way into the ledger. Heartbeats (one a second) go on in
both.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from elastic.config import BatchOptions, ObserveOptions, OptimOptions, RunOptions, ScalingOptions, TrainConfig
from elastic.run.prepare import prepare
from elastic.worker.local import LocalRun
from jobs.bench.report import interval_of_median, median, table, write_json
from jobs.bench.steady import CONFIG, Steady
from jobs.codegpt import CodeGPT

BLOCK_STEPS = 10
CLIP_NORM = 1.0
MOST_STEPS = 1_000_000
START_S = 120.0
LOOK_S = 1.0


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

    steps, state, step = world.steps, world.state, world.step
    spans = steps.share.spans
    with steps._turns.of(step) as replica:
        replica.model.zero_grad(set_to_none=True)
        for i, (first, count) in enumerate(spans):
            batch = steps._loader.next(step, first, count).batch
            if replica._ddp is not None:
                replica._ddp.require_backward_grad_sync = i == len(spans) - 1
            loss, weight, _ = replica._forward(batch, last=i == len(spans) - 1)
            (loss / (weight * len(spans))).backward()
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


@dataclass(frozen=True)
class Enough:
    """When to stop: `most` pairs of blocks, or as many as give the median of what whole steps take more an interval
    that is narrower than `width_percent`, or `limit_s` after the first step."""

    width_percent: float = 0.5
    limit_s: float = 600.0
    most: int | None = None

    def reached(self, share: list[float], since_s: float) -> bool:
        """Whether pairs with these shares, in percent, will do."""
        low, high = interval_of_median(share)
        return len(share) >= (self.most or 10**9) or high - low <= self.width_percent or since_s > self.limit_s


def measure(
    job: Any, config: TrainConfig, workers: int, enough: Enough, *, accelerator: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds, and processor seconds of rank 0, of a bare and of a whole step in each pair of blocks."""
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        times = Path(name) / "times"
        times.touch()
        job = replace(job, times=str(times))
        config = replace(
            config,
            run=RunOptions(storage=name, duration=f"{MOST_STEPS}st"),
            optim=OptimOptions(clip_norm=CLIP_NORM),
            scaling=ScalingOptions(max_workers=workers),
            observe=ObserveOptions(tensorboard=False),
        )
        environment, over = {"OMP_NUM_THREADS": "1"}, threading.Event()
        with LocalRun(prepare(job, config), workers, environment=environment, accelerator=accelerator) as local:
            looking = threading.Thread(target=_stop_when, args=(local, times, enough, over), daemon=True)
            looking.start()
            try:
                local.wait(enough.limit_s + START_S)
            finally:
                over.set()
                looking.join()
        found = _read(times)
    return {name: seconds[: enough.most] for name, seconds in found.items()}


def _stop_when(local: LocalRun, times: Path, enough: Enough, over: threading.Event) -> None:
    """Stop the run when there are enough pairs."""
    first: float | None = None
    while not over.wait(LOOK_S):
        if first is None and times.stat().st_size:
            first = time.monotonic()
        if first is not None and enough.reached(shares(_read(times)), time.monotonic() - first):
            return local.stop()


def _read(times: Path) -> dict[str, list[float]]:
    """What `measure` returns, of the pairs that are whole so far."""
    text = times.read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    wall, cpu = (_typical([float(line.split()[column]) for line in lines]) for column in (0, 1))
    pairs = len(wall) // 2
    return {
        "whole_s": wall[: 2 * pairs : 2],
        "bare_s": wall[1 : 2 * pairs : 2],
        "whole_cpu_s": cpu[: 2 * pairs : 2],
        "bare_cpu_s": cpu[1 : 2 * pairs : 2],
    }


def shares(found: dict[str, list[float]]) -> list[float]:
    """What a whole step takes more than a bare one, of each pair, in percent of the latter."""
    return [100 * (whole / bare - 1) for whole, bare in zip(found["whole_s"], found["bare_s"], strict=True)]


def _typical(at: list[float]) -> list[float]:
    """Median step of each block after the first two, which warm up; a block's first step follows one of the others."""
    ends = range(3 * BLOCK_STEPS, len(at) + 1, BLOCK_STEPS)
    return [median(at[i] - at[i - 1] for i in range(end - BLOCK_STEPS + 1, end)) for end in ends]


def _row(name: str, found: dict[str, list[float]], enough: Enough) -> list[Any]:
    def more(whole: str, bare: str) -> float:
        return median(w - b for w, b in zip(found[whole], found[bare], strict=True))

    share = shares(found)
    low, high = interval_of_median(share)
    return [
        name,
        len(share),
        1e3 * median(found["bare_s"]),
        1e3 * median(found["whole_s"]),
        1e3 * more("whole_s", "bare_s"),
        median(share),
        low,
        high,
        1e3 * more("whole_cpu_s", "bare_cpu_s"),
        "" if high - low <= enough.width_percent else f"wider than {enough.width_percent:g} %",
    ]


HEAD = ["steps that", "pairs", "bare ms", "whole ms", "more ms", "more %", "from", "to", "more CPU ms", ""]


def run(enough: Enough) -> dict[str, Any]:
    """Print the table; returns its figures."""
    kinds = {
        "compute, 2 workers": (
            Computing(),
            TrainConfig(batch=BatchOptions(global_size=32, microbatches=8)),
            2,
        ),
        "wait 0.1 s, 3 workers": (Waiting(pause=0.1), CONFIG, 3),
    }
    found = {name: measure(*parts, enough) for name, parts in kinds.items()}
    rows = [_row(name, figures, enough) for name, figures in found.items()]
    print(
        f"\nsteps without a fault, fast, in turns of {BLOCK_STEPS}: medians of pairs of blocks; that of `more %` lies "
        "between `from` and `to` with 95 % certainty"
    )
    print(table(HEAD, rows))
    return {"head": HEAD, "rows": rows, "seconds": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=float, default=0.5, help="of the interval, in percent of a step")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for each of the two kinds of steps")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    write_json(arguments.json, run(Enough(arguments.width, arguments.limit)))


if __name__ == "__main__":
    main()
