"""Whether fsdp's fence would better go under the next forward pass, with a shadow of what the update overwrites.

    python -m jobs.bench.fence [--workers 2] [--json FILE]

With fsdp no worker has the whole state, so a step waits at a fence until all hold its update. If the fence ended during
the next forward pass, an update that another worker may lack would have to be taken back: before each update its
parameters and the optimizer's two moments would be copied. So this compares a fence with such a copy: both in each of
some processes at once, in turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from jobs.bench.report import median, table, write_json

MEGABYTES = (1, 10, 100)  # of a worker's shard of the state
ROUNDS = 60
FLAGS = 8
BACKEND = "elastic_gloo"


def _worker(rank: int, workers: int, store: str, results: Any) -> None:
    import elastic.parallel.gloo  # noqa: F401 - registers the backend

    torch.set_num_threads(1)
    dist.init_process_group(BACKEND, store=dist.FileStore(store, workers), rank=rank, world_size=workers)
    shards = [torch.ones(size * (1 << 20) // 4) for size in MEGABYTES]
    shadows = [torch.zeros_like(shard) for shard in shards]
    found: list[list[float]] = [[] for _ in range(1 + len(shards))]
    for _ in range(ROUNDS):
        flags = torch.zeros(FLAGS, dtype=torch.int64)
        began = time.perf_counter()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        flags.tolist()
        found[0].append(time.perf_counter() - began)
        for seconds, shard, shadow in zip(found[1:], shards, shadows, strict=True):
            began = time.perf_counter()
            shadow.copy_(shard)
            seconds.append(time.perf_counter() - began)
        dist.barrier()
    if rank == 0:
        results.put([median(seconds) for seconds in found])
    dist.barrier()
    dist.destroy_process_group()


def measure(workers: int) -> list[float]:
    """Seconds of a fence, and of a copy of each size."""
    with tempfile.TemporaryDirectory(prefix="elastic-bench-") as folder:
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_worker, (workers, f"{folder}/store", results), nprocs=workers)
        return list(results.get())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    fence, *copies = measure(arguments.workers)
    head = ["", "ms"]
    rows: list[list[Any]] = [["fence", 1e3 * fence]]
    rows += [[f"shadow of {size} MB", 1e3 * seconds] for size, seconds in zip(MEGABYTES, copies, strict=True)]
    print(table(head, rows))
    write_json(arguments.json, {"head": head, "rows": rows})


if __name__ == "__main__":
    main()
