"""What tensor parallelism and pipelines cost, and what a kill costs with them: samples/s against torch's own loops
(FSDP2 with tensor parallelism; pipelining, with gradients summed over pipelines), and the stall after a kill against
torchrun's; and, by itself, the memory of stages beside its estimate. All in plain processes on this machine; CPU
figures say little of GPUs. Takes about five minutes on two cores that do nothing else.

python -m jobs.bench.cells --json cells.json
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jobs.bench.peers import torchrun
from jobs.bench.report import median, table, write_json
from jobs.bench.sharding import KILL_AT, KILL_WORKERS, SAVE_EVERY, one_kill
from jobs.bench.stage_memory import memory_part
from jobs.bench.steps import BLOCK, bare, here

TENSOR_LOOP, PIPELINE_LOOP = "jobs.bench.bare_fsdp", "jobs.bench.bare_pipeline"
WORKERS = 4  # two cells of two, or two pipelines of two stages
CELLS = 2
Measure = Callable[[], dict[str, float]]


def kinds(folder: Path, steps: int, size: str, global_size: int, microbatches: int) -> dict[str, tuple[Measure, str]]:
    """What is measured, by name, and the name of the loop that it is compared with."""
    common: dict[str, Any] = {"steps": steps, "size": size, "global_size": global_size}
    mine = {**common, "microbatches": microbatches}
    cells, pipes = {"strategy": "fsdp", "tensor": CELLS}, {"pipeline": CELLS}
    passes = microbatches // CELLS
    return {
        "tensor, torch": (partial(bare, folder, TENSOR_LOOP, WORKERS, passes=1, tensor=CELLS, **common), ""),
        "tensor, fast": (partial(here, folder, WORKERS, exactness="fast", **mine, **cells), "tensor, torch"),
        "tensor, torch, same passes": (
            partial(bare, folder, TENSOR_LOOP, WORKERS, passes=passes, tensor=CELLS, **common),
            "",
        ),
        "tensor, bitwise": (
            partial(here, folder, WORKERS, exactness="bitwise", **mine, **cells),
            "tensor, torch, same passes",
        ),
        "pipelines, torch": (partial(bare, folder, PIPELINE_LOOP, WORKERS, passes=passes, **pipes, **common), ""),
        "pipelines, fast": (
            partial(here, folder, WORKERS, exactness="fast", **mine, **pipes),
            "pipelines, torch",
        ),
        "pipelines, bitwise": (
            partial(here, folder, WORKERS, exactness="bitwise", **mine, **pipes),
            "pipelines, torch",
        ),
    }


def steps_part(pairs: int, steps: int, size: str, tokens: int, global_size: int, only: str) -> Any:
    """Interleaved runs of all kinds whose names begin with `only`, and a table of them."""
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        measures = kinds(Path(name), steps, size, global_size, global_size * BLOCK // tokens)
        measures = {kind: one for kind, one in measures.items() if kind.startswith(only)}
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in measures}
        for pair in range(pairs):
            for kind, (measure, _) in measures.items():
                found[kind].append(measure())
                print(f"pair {pair + 1}/{pairs}  {kind}: {found[kind][-1]['rate']:.1f} samples/s", file=sys.stderr)
    rows: list[list[Any]] = []
    for kind, (_, base) in measures.items():
        runs = found[kind]
        shares = [r["rate"] / b["rate"] for r, b in zip(runs, found[base], strict=True)] if base else [1.0] * pairs
        peak = median(r["peak_mib"] for r in runs)
        cpu_ms = 1000 * median(r["cpu_s"] for r in runs)
        rows.append([kind, median(r["rate"] for r in runs), median(shares), min(shares), max(shares), cpu_ms, peak])
    head = ["2 x 2", "samples/s", "of torch's loop", "least", "most", "CPU ms/step of a worker", "peak MiB"]
    print(
        f"\n{size}, global batch {global_size} x {BLOCK} tokens, {tokens} a microbatch, {pairs} pairs of {steps} steps"
    )
    print(table(head, rows))
    return {"head": head, "rows": rows, "pairs": pairs, "steps": steps, "size": size, "tokens": tokens}


def kills_part(kills: int) -> Any:
    """Kills of one of four workers, and of one of torchrun's three."""
    one: list[tuple[str, tuple[Any, ...]]] = [
        ("tensor, two copies", ("ddp", False, "off", False, CELLS)),
        ("tensor, one copy, a snapshot every 5 steps", ("fsdp", False, "5st", False, CELLS)),
        (f"tensor, one copy, a checkpoint every {SAVE_EVERY}", ("fsdp", True, "off", False, CELLS)),
        ("2 pipelines x 2 stages, then 1 x 3", ("ddp", False, "off", False, 1, CELLS)),
        (f"1 pipeline x 4 stages, a checkpoint every {SAVE_EVERY}", ("ddp", True, "off", False, 1, KILL_WORKERS)),
    ]
    rows: list[list[Any]] = []
    for label, arguments in one:
        with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
            rows.append(_row(label, [one_kill(Path(name), *arguments) for _ in range(kills)]))
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        found = torchrun.measure(Path(name) / "notes", kills, nodes=False)
        rows.append(_row(f"torchrun, a checkpoint every {torchrun.SAVE_EVERY}", found))
    head = ["state", "kills", "stall p50 s", "most", "steps redone p50", "most"]
    print(f"\none of {KILL_WORKERS} workers killed after step {KILL_AT}")
    print(table(head, rows))
    return {"head": head, "rows": rows}


def _row(label: str, found: list[dict[str, float]]) -> list[Any]:
    stalls, redone = [f["stall_s"] for f in found], [f["redone"] if "redone" in f else f["lost"] for f in found]
    print(f"{label}: stall {median(stalls):.2f} s, {median(redone):.0f} steps redone", file=sys.stderr)
    return [label, len(found), median(stalls), max(stalls), median(redone), max(redone)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--size", default="5M", help="with an even number of heads")
    parser.add_argument("--global-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a microbatch")
    parser.add_argument("--part", choices=("steps", "kills", "memory", "all"), default="all")
    parser.add_argument("--only", choices=("tensor", "pipelines"), default="", help="kinds of steps")
    parser.add_argument("--memory-size", default="10M", help="of the model for --part memory")
    parser.add_argument("--memory-samples", type=int, default=2, help="of a microbatch for --part memory")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    began, load = time.monotonic(), os.getloadavg()[0]
    print(f"load average at the start: {load:.2f} on {os.cpu_count()} processors")
    figures: dict[str, Any] = {"load_average": load}
    if arguments.part in ("steps", "all"):
        figures["steps"] = steps_part(
            arguments.pairs, arguments.steps, arguments.size, arguments.tokens, arguments.global_size, arguments.only
        )
    if arguments.part in ("kills", "all"):
        figures["kills"] = kills_part(arguments.kills)
    if arguments.part == "memory":
        figures["memory"] = memory_part(arguments.memory_size, arguments.memory_samples, 4)
    figures["seconds"] = time.monotonic() - began
    print(f"\nall of it took {figures['seconds']:.0f} s; load average at the end: {os.getloadavg()[0]:.2f}")
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
