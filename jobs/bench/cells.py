"""What cells of two workers cost, and what a kill costs with them: samples/s against torch's own FSDP2 with tensor
parallelism, and the stall after a kill against torchrun's. All in plain processes on this machine; CPU figures say
little of GPUs.

python -m jobs.bench.cells --json cells.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jobs.bench.peers import torchrun
from jobs.bench.report import median, table, write_json
from jobs.bench.sharding import KILL_AT, KILL_WORKERS, SAVE_EVERY, one_kill
from jobs.bench.steps import BLOCK, bare, here

LOOP, TENSOR = "jobs.bench.bare_fsdp", 2


def steps_part(pairs: int, steps: int, size: str, tokens: int, global_size: int, worlds: list[int]) -> Any:
    """Interleaved runs, by the number of workers: bare, fast; bare with the passes of bitwise, bitwise."""
    rows, v = [], global_size * BLOCK // tokens
    for workers in worlds:
        cells = workers // TENSOR
        common: dict[str, Any] = {"steps": steps, "size": size, "global_size": global_size, "tensor": TENSOR}
        run = {**common, "strategy": "fsdp" if cells > 1 else "ddp", "microbatches": v}
        with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
            folder = Path(name)
            kinds: dict[str, Callable[[], dict[str, float]]] = {
                "bare": partial(bare, folder, LOOP, workers, passes=1, **common),
                "fast": partial(here, folder, workers, exactness="fast", **run),
                "bare, same passes": partial(bare, folder, LOOP, workers, passes=v // cells, **common),
                "bitwise": partial(here, folder, workers, exactness="bitwise", **run),
            }
            found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
            for pair in range(pairs):
                for kind, measure in kinds.items():
                    found[kind].append(measure())
                    rate = found[kind][-1]["rate"]
                    print(f"pair {pair + 1}/{pairs}  {workers} workers, {kind}: {rate:.1f} samples/s", file=sys.stderr)
        for kind, runs in found.items():
            base = found["bare, same passes" if kind == "bitwise" else "bare"]
            shares = [r["rate"] / b["rate"] for r, b in zip(runs, base, strict=True)]
            peak = median(r["peak_mib"] for r in runs)
            label = f"{cells} x {TENSOR}, {kind}"
            rows.append([label, median(r["rate"] for r in runs), median(shares), min(shares), max(shares), peak])
    head = ["cells x tensor", "samples/s", "of bare with the same passes", "least", "most", "peak MiB"]
    print(
        f"\n{size}, global batch {global_size} x {BLOCK} tokens, {tokens} a microbatch, {pairs} pairs of {steps} steps"
    )
    print(table(head, rows))
    return {"head": head, "rows": rows, "pairs": pairs, "steps": steps, "size": size, "tokens": tokens}


def kills_part(kills: int) -> Any:
    """Kills of one worker of two cells, and of one of torchrun's three."""
    kinds = [("ddp", False, "off", "two copies"), ("fsdp", False, "1st", "one copy, a snapshot after every step")]
    kinds += [("fsdp", False, "5st", "one copy, a snapshot every 5")]
    kinds += [("fsdp", True, "off", f"one copy, a checkpoint every {SAVE_EVERY} steps")]
    rows: list[list[Any]] = []
    for strategy, saves, snapshots, label in kinds:
        with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
            found = [one_kill(Path(name), strategy, saves, snapshots, False, TENSOR) for _ in range(kills)]
        rows.append(_row(label, found))
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        rows.append(_row("torchrun, from its checkpoint", torchrun.measure(Path(name) / "notes", kills, nodes=False)))
    head = ["state", "kills", "stall p50 s", "most", "steps redone p50", "most"]
    print(f"\none of {KILL_WORKERS} workers in cells of {TENSOR} killed after step {KILL_AT}, steps of 30 ms")
    print(table(head, rows))
    return {"head": head, "rows": rows}


def _row(label: str, found: list[dict[str, float]]) -> list[Any]:
    stalls, redone = [f["stall_s"] for f in found], [f["redone"] if "redone" in f else f["lost"] for f in found]
    print(f"{label}: stall {median(stalls):.2f} s, {median(redone):.0f} steps redone", file=sys.stderr)
    return [label, len(found), median(stalls), max(stalls), median(redone), max(redone)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--size", default="5M")
    parser.add_argument("--global-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a microbatch")
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 4], help="workers, in cells of two")
    parser.add_argument("--part", choices=("steps", "kills", "all"), default="all")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    if arguments.part in ("steps", "all"):
        figures["steps"] = steps_part(
            arguments.pairs,
            arguments.steps,
            arguments.size,
            arguments.tokens,
            arguments.global_size,
            arguments.worlds,
        )
    if arguments.part in ("kills", "all"):
        figures["kills"] = kills_part(arguments.kills)
    write_json(arguments.json, figures)


if __name__ == "__main__":
    main()
