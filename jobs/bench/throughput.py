"""Samples/s of a fault-free run here and in a bare torchrun DDP loop.

    python -m jobs.bench.throughput [--pairs 5] [--json FILE]

Runs of the variants alternate, so that a machine whose speed drifts slows all alike; ratios are of medians.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jobs.bench.report import median, table, write_json
from jobs.bench.steps import BLOCK, bare, here

WORKERS = 2
LOOP = "jobs.bench.bare_loop"


def steps_part(pairs: int, steps: int, size: str, tokens: list[int], global_size: int) -> dict[str, Any]:
    """Interleaved runs of: bare, bare with the same microbatches, fast, and bitwise at each microbatch size."""
    found: dict[str, list[dict[str, float]]] = {}
    common: dict[str, Any] = {"steps": steps, "size": size, "global_size": global_size}
    batch_tokens = global_size * BLOCK
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        folder = Path(name)
        kinds: dict[str, Callable[[], dict[str, float]]] = {
            "bare": partial(bare, folder, LOOP, WORKERS, passes=1, **common),
            "fast": partial(here, folder, WORKERS, microbatches=batch_tokens // 512, exactness="fast", **common),
        }
        for t in tokens:
            v = batch_tokens // t
            kinds[f"bare, {t} tokens a pass"] = partial(bare, folder, LOOP, WORKERS, passes=v // WORKERS, **common)
            kinds[f"bitwise, {t} tokens a pass"] = partial(
                here, folder, WORKERS, microbatches=v, exactness="bitwise", **common
            )
        for pair in range(pairs):
            for kind, measure in kinds.items():
                found.setdefault(kind, []).append(measure())
                print(f"pair {pair + 1}/{pairs}  {kind}: {found[kind][-1]['rate']:.1f} samples/s", file=sys.stderr)
    base = {key: median(r[key] for r in found["bare"]) for key in ("rate", "peak_mib")}
    rows = []
    for kind, runs in found.items():
        rate, peak = median(r["rate"] for r in runs), median(r["peak_mib"] for r in runs)
        ratios = [r["rate"] / b["rate"] for r, b in zip(runs, found["bare"], strict=True)]
        same = found.get(kind.replace("bitwise", "bare")) if kind.startswith("bitwise") else None
        against = median(r["rate"] / b["rate"] for r, b in zip(runs, same, strict=True)) if same else ""
        rows.append([kind, rate, median(ratios), min(ratios), max(ratios), against, peak, peak / base["peak_mib"]])
    head = ["variant", "samples/s", "of bare", "min", "max", "of bare, same passes", "peak MiB", "of bare"]
    print(f"\n{size}, global batch {global_size} x {BLOCK} tokens, {WORKERS} workers, {pairs} pairs of {steps} steps")
    print(table(head, rows))
    return {"head": head, "rows": rows, "pairs": pairs, "steps": steps, "size": size, "global_size": global_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--size", default="0.5M")
    parser.add_argument("--global-size", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 1024], help="tokens of a microbatch")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    figures = steps_part(arguments.pairs, arguments.steps, arguments.size, arguments.tokens, arguments.global_size)
    write_json(arguments.json, {"steps": figures})


if __name__ == "__main__":
    main()
