"""Recoveries and joins with larger states, in plain processes, beside what a simple model says.

    python -m jobs.bench.sizes [--megabytes 50 200 1000] [--kills 3] [--json FILE]

Every worker holds the whole state (parameters and AdamW's two moments), so a kill moves none of it: survivors need
what noticing and forming take with a small state, and do the unfinished step again. A join broadcasts the state from
one member to all others, at the bandwidth that gloo has on this machine.

    kill: grace + rest of a step           join: grace + bytes / bandwidth

`grace` is what the smallest state needs for everything else; `rest` is what had gone by of the unfinished step.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jobs.bench import here
from jobs.bench.report import median, table, write_json
from jobs.bench.steps import torchrun

SMALLEST_MB = 1
STEPS = 5  # of each world
ROUNDS = 5


def width_of(megabytes: float) -> int:
    """Width of the model whose state has this many bytes: w*w + 74 w + 8 parameters, three float32 numbers each."""
    return int(math.sqrt(37**2 + megabytes * 1e6 / 12 - 8) - 37)


def bandwidth(folder: Path, megabytes: int = 200) -> float:
    """Bytes a second at which gloo broadcasts one tensor from rank 0 to two others, median of some rounds."""
    out = folder / "bandwidth.json"
    arguments = ["--broadcast", str(megabytes), "--json", str(out)]
    torchrun("jobs.bench.sizes", here.WORKERS, *arguments, timeout_s=120)
    return megabytes * 1e6 / median(json.loads(out.read_text())["seconds"])


def _broadcast(megabytes: int, out: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    tensor, seconds = torch.zeros(megabytes * 1_000_000, dtype=torch.uint8), []
    for _ in range(ROUNDS + 1):  # the first touches the memory
        dist.barrier()
        began = time.perf_counter()
        dist.broadcast(tensor, 0)
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    if dist.get_rank() == 0:
        write_json(out, {"seconds": seconds[1:]})
    dist.destroy_process_group()


def run(sizes: list[int], kills: int) -> dict[str, Any]:
    """Print the table; returns its figures."""
    measured: dict[int, here.Found] = {}
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as name:
        speed = bandwidth(Path(name))
        for megabytes in [SMALLEST_MB, *sizes]:
            measured[megabytes] = here.in_processes(
                Path(name), kills, width=width_of(megabytes), exactness="fast", steps=STEPS
            )
            print(f"sizes: {megabytes} MB, a step takes {measured[megabytes].normal_s:.2f} s", file=sys.stderr)
    small = measured[SMALLEST_MB]
    grace = median(k["stall_s"] - k["rest"] for k in small.process)
    join_grace = median(j["stall_s"] for j in small.join)
    rows = []
    for megabytes, found in measured.items():
        rest = median(k["rest"] for k in found.process)
        moved = megabytes * 1e6 / speed
        rows.append(
            [
                megabytes,
                found.normal_s,
                rest,
                median(k["stall_s"] for k in found.process),
                grace + rest,
                median(k["restore"] for k in found.process),
                median(j["stall_s"] for j in found.join),
                join_grace + moved,
                median(j["restore"] for j in found.join),
            ]
        )
    head = [
        "state MB",
        "step s",
        "rest s",
        "kill: stall s",
        "model",
        "of it restore",
        "join: stall s",
        "model",
        "of it restore",
    ]
    print(f"\nlarger states, plain processes, fast, {kills} kills and joins each, medians")
    print(f"grace {grace:.3f} s after a kill, {join_grace:.3f} s for a join; gloo broadcasts {speed / 1e9:.2f} GB/s")
    print(table(head, rows))
    return {"head": head, "rows": rows, "bytes_per_s": speed, "grace_s": grace, "join_grace_s": join_grace}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--broadcast", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if arguments.broadcast:
        _broadcast(arguments.broadcast, arguments.json)
    else:
        write_json(arguments.json, run(arguments.megabytes, arguments.kills))


if __name__ == "__main__":
    main()
