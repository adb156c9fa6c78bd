"""What sharding costs and saves: samples/s and peak memory of fsdp and hsdp against a bare FSDP2 loop, what snapshots
cost, and what a kill costs with each strategy. All in plain processes on this machine; CPU figures say little of GPUs.

python -m jobs.bench.sharding --json sharding.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from elastic import (
    CheckpointOptions,
    ParallelOptions,
    RecoveryOptions,
    RunOptions,
    ScalingOptions,
)
from elastic.observe.ledger import METRICS, kept_history, read_records
from elastic.run.prepare import prepare
from elastic.worker.local import LocalRun
from jobs.bench.report import median, table, write_json
from jobs.bench.snapshot_cost import measure as snapshot_cost
from jobs.bench.steady import CONFIG as STEADY
from jobs.bench.steady import Steady
from jobs.bench.steps import BLOCK, bare, here

LOOP = "jobs.bench.bare_fsdp"
WORKERS = {"fsdp": 2, "hsdp": 4}  # hsdp as 2 nodes of 2
KILL_WORKERS, KILL_AT, KILL_STEPS, SAVE_EVERY = 4, 25, 60, 10


def steps_part(strategies: list[str], pairs: int, steps: int, size: str, tokens: int, global_size: int) -> Any:
    """Interleaved runs, strategy by strategy: bare, fast; bare with the passes of bitwise, bitwise."""
    rows, v = [], global_size * BLOCK // tokens
    for strategy in strategies:
        workers = WORKERS[strategy]
        common: dict[str, Any] = {"steps": steps, "size": size, "global_size": global_size}
        loop = {**common, "replicas": 2 if strategy == "hsdp" else 1}
        run = {**common, "strategy": strategy, "workers_per_node": 2}
        with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
            folder = Path(name)
            kinds: dict[str, Callable[[], dict[str, float]]] = {
                "bare": partial(bare, folder, LOOP, workers, passes=1, **loop),
                "fast": partial(here, folder, workers, microbatches=v, exactness="fast", **run),
                "bare, same passes": partial(bare, folder, LOOP, workers, passes=v // workers, **loop),
                "bitwise": partial(here, folder, workers, microbatches=v, exactness="bitwise", **run),
            }
            found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
            for pair in range(pairs):
                for kind, measure in kinds.items():
                    found[kind].append(measure())
                    rate = found[kind][-1]["rate"]
                    print(f"pair {pair + 1}/{pairs}  {strategy} {kind}: {rate:.1f} samples/s", file=sys.stderr)
        for kind, runs in found.items():
            base = found["bare, same passes" if kind == "bitwise" else "bare"]
            ratios = [r["rate"] / b["rate"] for r, b in zip(found[kind], found["bare"], strict=True)]
            same = median(r["rate"] / b["rate"] for r, b in zip(runs, base, strict=True))
            peak = median(r["peak_mib"] for r in runs)
            share = peak / median(b["peak_mib"] for b in base)
            rate = median(r["rate"] for r in runs)
            rows.append([f"{strategy} {kind}", rate, median(ratios), min(ratios), max(ratios), same, peak, share])
    head = ["variant", "samples/s", "of bare", "min", "max", "of bare, same passes", "peak MiB", "of bare"]
    print(
        f"\n{size}, global batch {global_size} x {BLOCK} tokens, {tokens} tokens a microbatch, {pairs} pairs of {steps}"
    )
    print(table(head, rows))
    return {"head": head, "rows": rows, "pairs": pairs, "steps": steps, "size": size, "tokens": tokens}


def snapshots_part(pairs: int) -> Any:
    """What snapshots add to the time of fault-free steps."""
    rows = []
    for kind in ("waiting", "computing"):
        for every in ("1st", "5st", "20st", "auto"):
            found = snapshot_cost(kind, every, pairs)
            shares = [100 * s for s in found["shares"]]
            rows.append(
                [
                    kind,
                    every,
                    found["every"],
                    1000 * found["step_s"],
                    median(shares),
                    min(shares),
                    max(shares),
                    found["node_mib"],
                    found["skipped"],
                ]
            )
            print(f"snapshots of {kind} steps, {every}: {median(shares):+.1f} %", file=sys.stderr)
    head = ["steps", "every", "at last", "step ms", "cost %", "least", "most", "MiB of a node", "skipped"]
    print(f"\nfsdp, 2 workers on nodes of their own, {pairs} pairs of blocks of steps with snapshots and without")
    print(table(head, rows))
    return {"head": head, "rows": rows, "pairs": pairs}


def one_kill(
    folder: Path, strategy: str, saves: bool, snapshots: str, node: bool, tensor: int = 1, pipeline: int = 1
) -> dict[str, float]:
    """The stall after one worker, or its node, was killed, and the steps that had to be done again."""
    config = replace(
        STEADY,
        run=RunOptions(storage=str(folder), duration=f"{KILL_STEPS}st"),
        parallel=ParallelOptions(strategy=strategy, tensor=tensor, pipeline=pipeline),  # type: ignore[arg-type]
        scaling=ScalingOptions(max_workers=KILL_WORKERS, workers_per_node=2),
        checkpoint=CheckpointOptions(every=f"{SAVE_EVERY}st" if saves else None),
        recovery=RecoveryOptions(snapshot_every=snapshots),
    )
    run, reached = prepare(Steady(pause=0.01), config), Event()

    def on_record(record: dict[str, Any]) -> None:
        if "sample_hash" in record and record["step"] >= KILL_AT:
            reached.set()

    with LocalRun(run, KILL_WORKERS, on_record=on_record, environment={"OMP_NUM_THREADS": "1"}) as local:
        if not reached.wait(120):
            raise RuntimeError(f"step {KILL_AT} did not come within 120 s")
        if node:
            local.vaults[local.node_of(KILL_WORKERS - 1)].kill()
            local.processes[-2].kill()
        local.processes[-1].kill()
        result = local.wait(300)
    rows = [r for r in read_records(run.folder.storage, METRICS) if "sample_hash" in r]
    return {"stall_s": result["stalls"][0]["seconds"], "redone": len(rows) - len(kept_history(rows))}


def kills_part(kills: int) -> Any:
    """Kills of one worker of four, or of a node of two, strategy by strategy."""
    rows = []
    kinds = [("ddp", False, "off", False), ("hsdp", False, "off", False), ("fsdp", False, "1st", False)]
    kinds += [("fsdp", False, "5st", False), ("fsdp", False, "5st", True)]
    kinds += [("fsdp", True, "off", False), ("fsdp", False, "off", False)]
    for strategy, saves, snapshots, node in kinds:
        with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
            found = [one_kill(Path(name), strategy, saves, snapshots, node) for _ in range(kills)]
        stalls = [f["stall_s"] for f in found]
        redone = [f["redone"] for f in found]
        label = f"{strategy}, a checkpoint every {SAVE_EVERY} steps" if saves else strategy
        label += "" if snapshots == "off" else f", a snapshot every {snapshots}"
        label += ", its node" if node else ""
        rows.append([label, kills, median(stalls), max(stalls), median(redone), max(redone)])
        print(f"{label}: stall {median(stalls):.2f} s, {median(redone):.0f} steps redone", file=sys.stderr)
    head = ["strategy", "kills", "stall p50 s", "most", "steps redone p50", "most"]
    print(f"\none of 4 workers killed after step {KILL_AT}, steps of 30 ms")
    print(table(head, rows))
    return {"head": head, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--size", default="0.5M")
    parser.add_argument("--global-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a microbatch")
    parser.add_argument("--strategies", nargs="+", choices=sorted(WORKERS), default=["fsdp", "hsdp"])
    parser.add_argument("--part", choices=("steps", "snapshots", "kills", "all"), default="all")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    if arguments.part in ("steps", "all"):
        figures["steps"] = steps_part(
            arguments.strategies,
            arguments.pairs,
            arguments.steps,
            arguments.size,
            arguments.tokens,
            arguments.global_size,
        )
    if arguments.part in ("snapshots", "all"):
        figures["snapshots"] = snapshots_part(arguments.pairs)
    if arguments.part in ("kills", "all"):
        figures["kills"] = kills_part(arguments.kills)
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
