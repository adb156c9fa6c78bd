"""What `--parallel.pipeline auto` thinks that each stage needs, beside what the workers of a run take.

Taken is the peak of a process over that of the same run with a model of 0.5 M parameters, whose estimate is taken off
too: so Python, torch and what the first step imports are not in it. malloc gives large blocks back at once.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from elastic.config import (
    BatchOptions,
    ObserveOptions,
    OptimOptions,
    ParallelOptions,
    RunOptions,
    ScalingOptions,
    TrainConfig,
)
from elastic.observe.ledger import EVENTS, read_records
from elastic.parallel.stage_memory import needs
from elastic.run.auto_stages import size_of
from elastic.run.prepare import prepare
from elastic.worker.local import LocalRun
from jobs.bench.report import PeakMemory, table
from jobs.bench.steps import StepsAlone

SMALL = "0.5M"
STEPS = 3
BLOCK = 128
MIB = 2**20
#: (workers, stages, strategy): two stages, and two pipelines of them whose state is cut over all.
LAYOUTS = ((2, 2, "ddp"), (4, 2, "fsdp"))


def one_run(
    folder: Path, size: str, workers: int, stages: int, strategy: str, samples: int, microbatches: int
) -> tuple[list[float], list[float]]:
    """The estimate for each stage and the most that a worker of it took, MiB."""
    config = TrainConfig(
        run=RunOptions(storage=str(folder), duration=f"{STEPS}st"),
        batch=BatchOptions(global_size=samples * microbatches, microbatches=microbatches),
        optim=OptimOptions(clip_norm=1.0),
        parallel=ParallelOptions(strategy=strategy, pipeline=stages),  # type: ignore[arg-type]
        scaling=ScalingOptions(max_workers=workers),
        observe=ObserveOptions(tensorboard=False),
    )
    job = StepsAlone(size=size, block=BLOCK, tied=False)
    run = prepare(job, config)
    layers = size_of(job, config, run.plan, job.train_data())
    wanted = needs(layers, workers, stages, strategy, microbatches)
    limits = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with LocalRun(run, workers, environment=limits) as local:
        memory = PeakMemory(lambda: [p.pid for p in local.processes])
        local.wait(600)
        memory.close()
    events = read_records(run.folder.storage, EVENTS)
    pids = [e["detail"]["pids"] for e in events if e.get("kind") == "world_formed"][-1]
    taken = [max(memory.peak[pid] for pid in pids[stage::stages]) for stage in range(stages)]
    return [n / MIB for n in wanted], taken


def memory_part(size: str, samples: int, microbatches: int) -> Any:
    rows: list[list[Any]] = []
    for workers, stages, strategy in LAYOUTS:
        with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
            common = (workers, stages, strategy, samples, microbatches)
            base_wanted, base = one_run(Path(name) / "small", SMALL, *common)
            wanted, taken = one_run(Path(name) / "large", size, *common)
        for stage in range(stages):
            estimate, found = wanted[stage] - base_wanted[stage], taken[stage] - base[stage]
            label = f"{workers // stages} x {stages}, {strategy}, stage {stage}"
            rows.append([label, estimate, found, estimate / found, taken[stage]])
    head = ["pipelines x stages", "estimated MiB", "taken MiB", "estimated / taken", "whole process MiB"]
    print(f"\n{size} over {SMALL}, {microbatches} microbatches of {samples} x {BLOCK} tokens, {STEPS} steps")
    print(table(head, rows))
    return {"head": head, "rows": rows, "size": size, "samples": samples, "microbatches": microbatches}
