"""Samples out of shards in object storage: here, beside a plain DataLoader, from a simulated S3.

    python -m jobs.bench.data [--shards 24] [--each 80] [--epochs 2] [--quick] [--json FILE]

The store is in the memory of a proxy: 30 ms to the first byte, 90 MB/s a connection. Shards are tars of
files of 100 kB. Each way has two loader processes, reads one epoch to warm up, and then some more: the median is shown.

one by one   torch's DataLoader over a map-style dataset that gets each sample by a range of its shard
streamed     torch's DataLoader over an IterableDataset that streams whole shards, which its processes share out
here         `elastic.Shards`: random over all shards, windows of 64 samples, 16 microbatches a step
read         bytes that the store sent for bytes of samples; here for worlds of 1, 2 and 4 workers, one after another
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from jobs.bench.data_streaming import Streaming
from jobs.bench.report import median, table, write_json
from jobs.bench.s3front import SIMULATED, S3Front, data_bytes
from jobs.bench.seaweed import credentials

SAMPLE = 100_000
PROCESSES = 2
MICROBATCHES, SIZE = 16, 4
GLOBAL = MICROBATCHES * SIZE
WORLDS = (1, 2, 4)
WINDOW = 64


def together(samples: list[Any]) -> list[Any]:
    """Collate nothing: what is measured is the reading."""
    return samples


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--each", type=int, default=80, help="samples of a shard")
    parser.add_argument("--epochs", type=int, default=2, help="that are measured")
    parser.add_argument("--quick", action="store_true", help="8 shards of 16 samples, one epoch")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.quick:
        options.shards, options.each, options.epochs = 8, 16, 1
    if options.shards * options.each % GLOBAL:
        parser.error(f"--shards times --each is {options.shards * options.each}; give a multiple of {GLOBAL}")
    with S3Front(link=SIMULATED) as front:
        os.environ |= {**credentials(), "AWS_ENDPOINT_URL": front.url, "AWS_EC2_METADATA_DISABLED": "true"}
        found = measure(front, fill(options.shards, options.each), options.epochs)
    print(render(found))
    write_json(options.json, {"cores": os.cpu_count(), **found})


def fill(shards: int, each: int) -> str:
    """Write the shards; returns their URL."""
    import fsspec

    fs = fsspec.filesystem("s3")
    fs.mkdir("data")
    for shard in range(shards):
        data = io.BytesIO()
        with tarfile.open(fileobj=data, mode="w") as tar:
            for i in range(each):
                member = tarfile.TarInfo(f"{shard * each + i:06d}.bin")
                member.size = SAMPLE
                tar.addfile(member, io.BytesIO(os.urandom(SAMPLE)))
        fs.pipe_file(f"data/{shard:04d}.tar", data.getvalue())
    return "s3://data/*.tar"


def measure(front: S3Front, url: str, epochs: int) -> dict[str, Any]:
    """The figures of every way, by name."""
    from elastic.data.shards import Shards

    data = Shards(url, window=WINDOW)  # makes the index
    loops: dict[str, Iterator[int]] = {
        "one by one": plain(data, epochs, shuffle=True),
        "streamed": plain(Streaming(data.paths), epochs),
        "here": here(url, 1, epochs),
    }
    bytes_of_one = SAMPLE + 512 + -SAMPLE % 512  # with the header and the padding of its file
    speeds, read = {}, {}
    for name, loop in loops.items():
        front.records()
        taken, seconds = next(loop), []
        for _ in range(epochs):
            began = time.perf_counter()
            taken += next(loop)
            seconds.append(time.perf_counter() - began)
        speeds[name] = len(data) * SAMPLE / 1e6 / median(seconds)
        loop.close()  # type: ignore[attr-defined]
        read[name] = _sent(front) / (taken * bytes_of_one)
    for world in WORLDS:
        front.records()
        taken = sum(here(url, world, 0))
        read[f"here, {world}"] = _sent(front) / (taken * bytes_of_one)
    return {"samples": len(data), "mb": len(data) * SAMPLE / 1e6, "mb_s": speeds, "read": read}


def _sent(front: S3Front) -> int:
    return data_bytes(r for r in front.records() if r.key.endswith(".tar"))


def plain(data: Any, epochs: int, **more: Any) -> Iterator[int]:
    """Epochs of a plain DataLoader, one to warm up and `epochs` more; gives how many samples each had."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        data,
        batch_size=SIZE,
        num_workers=PROCESSES,
        collate_fn=together,
        multiprocessing_context="spawn",
        persistent_workers=True,
        **more,
    )
    for _ in range(epochs + 1):
        yield sum(len(batch) for batch in loader)


def here(url: str, world: int, epochs: int) -> Iterator[int]:
    """The same of a world: one worker with loader processes, or the workers of a larger one in turn, without."""
    from elastic.data.deal import deal
    from elastic.data.fetching import Fetcher, Order
    from elastic.data.loader import Loader
    from elastic.data.shards import Shards
    from elastic.job import Plan

    for run in deal(MICROBATCHES, world):
        data = Shards(url, window=WINDOW)
        each = len(data) // GLOBAL
        steps = each * (epochs + 1)
        plan = Plan(steps, GLOBAL, len(data), SIZE, 0)
        data.bind(plan)
        order = Order(
            seed=0,
            dataset_size=len(data),
            global_size=GLOBAL,
            microbatches=MICROBATCHES,
            ids=partial(data.order, plan=plan),
        )
        fetcher = Fetcher(data, together, 0, len(data), by_position=True)
        loader = Loader(fetcher, order, workers=PROCESSES if world == 1 else 0, prefetch=4, total_steps=steps)
        try:
            loader.start(0, [(i, 1) for i in run])
            for epoch in range(epochs + 1):
                yield sum(
                    len(loader.next(step, i, 1).batch) for step in range(epoch * each, (epoch + 1) * each) for i in run
                )
        finally:
            loader.close()


def render(found: dict[str, Any]) -> str:
    """The tables."""
    rows = [(name, f"{speed:.0f}", f"{found['read'][name]:.2f}") for name, speed in found["mb_s"].items()]
    worlds = [(str(world), f"{found['read'][f'here, {world}']:.3f}") for world in WORLDS]
    return "\n\n".join(
        [
            f"{found['samples']} samples, {found['mb']:.0f} MB",
            table(("", "MB/s", "read"), rows),
            table(("workers here", "read"), worlds),
        ]
    )


if __name__ == "__main__":
    main()
