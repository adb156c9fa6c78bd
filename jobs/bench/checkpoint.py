"""Stall, throughput and read amplification of checkpoints: this engine beside torch's own ways, in one run.

    python -m jobs.bench.checkpoint [--quick] [--store simulated seaweed] [--shape 160MB 400MB 1GB] [--world 1 2]
                                    [--engine here dcp.save dcp.async_save torch.save] [--json FILE]

Everything runs on this machine, the store too: the simulated one (objects in a proxy's memory, 30 ms to the first byte,
90 MB/s a connection) and a SeaweedFS behind the same proxy without limits. Tensors are float32, cut along their first
dimension over the ranks. What is measured, for each engine after one save to warm up:

save     bytes over the time until the checkpoint is durable, with nothing else going on
stall    time blocked in save, plus what the next update waited, with steps going on that outlast a copy of the state
steps    how much longer the ten steps from the save on take, without the stall; helpers: cores that the engine's own
         processes use meanwhile. The store takes its share of the same cores
load     bytes over the time until all ranks have all tensors, after one of them to warm up; every value is checked
read     bytes that the store sent for bytes of tensors, at the same and at the other world size; manifests apart
flying   most requests that were under way at one moment, in the save and in the load
memory   most that ranks and their helpers held in the first save above what they held before, in MiB (shared: once)
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jobs.bench.checkpoint_ranks import STEPS, Ranks, Shape, proportional_mib
from jobs.bench.report import table, write_json
from jobs.bench.s3front import SIMULATED, S3Front, data_bytes, most_in_flight
from jobs.bench.s3relay import Record
from jobs.bench.seaweed import LOOPBACK, SeaweedFS, credentials

SHAPES = {
    s.name: s
    for s in (
        Shape("160MB", 160_000_000, 20),
        Shape("400MB", 400_000_000, 400),
        Shape("1GB", 1_000_000_000, 16),
        Shape("4MB", 4_000_000, 4),
    )
}
STORES = ("simulated", "seaweed")
ENGINES = ("dcp.save", "dcp.async_save", "torch.save", "here")  # as in `jobs.bench.checkpoint_engines`
SAVES_ONLY, ONE_WORLD = "dcp.async_save", "torch.save"  # what dcp.load loads; what no other world size can load
_METADATA = ("manifest.json", ".index", ".metadata")


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", nargs="+", choices=STORES, default=STORES)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=("160MB", "400MB", "1GB"))
    parser.add_argument("--world", nargs="+", type=int, choices=(1, 2), default=(1, 2))
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--quick", action="store_true", help="4 MB on the simulated store, dcp.save and here")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.quick:
        options.store, options.shape, options.world = ("simulated",), ("4MB",), (2,)
        options.engine = ("dcp.save", "here")
    signal.signal(signal.SIGTERM, _end)
    rows = []
    for store in options.store:
        with opened(store) as front:
            for shape in options.shape:
                for world in options.world:
                    for engine in options.engine:
                        rows.append(measure(front, store, SHAPES[shape], world, engine))
                        print(_line(rows[-1]), flush=True)
                        compare(rows)
                        write_json(options.json, {"cores": os.cpu_count(), "rows": rows})  # what there is so far
    print("\n" + render(rows))


def _end(*_: object) -> None:
    """End through every `finally`, which end what was started; undisturbed by a second signal."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


@contextmanager
def opened(store: str) -> Iterator[S3Front]:
    """The proxy, with the simulated store or a SeaweedFS behind it."""
    with ExitStack() as stack:
        if store == "simulated":
            yield stack.enter_context(S3Front(link=SIMULATED))
        else:
            yield stack.enter_context(S3Front(upstream=stack.enter_context(SeaweedFS()).port))


def measure(front: S3Front, store: str, shape: Shape, world: int, engine: str) -> dict[str, Any]:
    """All figures of one engine in one case."""
    environment = {
        **credentials(),
        "AWS_ENDPOINT_URL": front.url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "OMP_NUM_THREADS": "1",
    }
    bucket = f"{engine.replace('.', '-').replace('_', '-')}-{world}-{shape.name.lower()}"
    mb = shape.nbytes / 1e6
    row: dict[str, Any] = {"store": store, "shape": shape.name, "world": world, "engine": engine}
    row.update(dict.fromkeys(("load_mb_s_same", "load_mb_s_other", "read_same", "read_other", "load_flying")))
    with _bucket(front, bucket) as empty:
        url = f"s3://{bucket}/run"
        with Ranks(world, _free_port(), environment) as ranks:
            ranks.ask("state", shape=shape)
            memory = _Memory(ranks.pids)
            ranks.ask("engine", name=engine, url=url)
            memory.watch()
            ranks.ask("save", step=1)
            row["extra_mib"] = memory.extra_mib()
            empty()
            alone = _seconds(ranks.ask("steps"))
            empty()
            saved = ranks.ask("save_and_train", step=2)
            row["stall_s"] = max(a["stall_s"] for a in saved)
            row["steps_slower"] = max(a["steps_s"] for a in saved) / alone - 1
            row["helper_cores"] = sum(a["helper_cores"] for a in saved)
            row["durable_s"] = max(a["durable_s"] for a in saved)
            empty()
            front.records()
            cpu = front.cpu_s()
            seconds = _seconds(ranks.ask("save", step=3))
            row["save_mb_s"], row["proxy_cores"] = mb / seconds, (front.cpu_s() - cpu) / seconds
            records = front.records()
            row["save_flying"], row["write_amplification"] = most_in_flight(records), _moved(records, "PUT") / mb
            if engine != SAVES_ONLY:
                row.update(_load(front, ranks, mb, "same"))
            ranks.ask("close")
        if engine not in (SAVES_ONLY, ONE_WORLD):
            with Ranks(3 - world, _free_port(), environment) as ranks:
                ranks.ask("state", shape=shape)
                ranks.ask("engine", name=engine, url=url)
                row.update(_load(front, ranks, mb, "other"))
                ranks.ask("close")
    return row


def _load(front: S3Front, ranks: Ranks, mb: float, where: str) -> dict[str, Any]:
    ranks.ask("load_one", step=3)
    front.records()
    seconds = _seconds(ranks.ask("load", step=3))
    records = front.records()
    found = {f"load_mb_s_{where}": mb / seconds, f"read_{where}": _moved(records, "GET") / mb}
    return {**found, "load_flying": most_in_flight(records)} if where == "same" else found


def _moved(records: list[Record], method: str) -> float:
    """MB of objects' bodies; what says where tensors lie does not count."""
    return data_bytes((r for r in records if not r.key.endswith(_METADATA)), method) / 1e6


def _seconds(answers: list[dict[str, Any]]) -> float:
    return max(float(a["seconds"]) for a in answers)


class _Memory:
    """Watches what processes hold above what they hold now."""

    def __init__(self, pids: list[int]):
        self._pids, self._before = pids, proportional_mib(pids)
        self._most, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def watch(self) -> None:
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self._most = max(self._most, proportional_mib(self._pids))

    def extra_mib(self) -> float:
        """The most there was, less what there was before."""
        self._stop.set()
        self._thread.join()
        return max(self._most, proportional_mib(self._pids)) - self._before


@contextmanager
def _bucket(front: S3Front, name: str) -> Iterator[Any]:
    """A bucket, gone afterwards; gives what empties it."""
    from s3fs import S3FileSystem

    user = credentials()
    fs = S3FileSystem(
        key=user["AWS_ACCESS_KEY_ID"],
        secret=user["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=front.url,
        use_listings_cache=False,
    )

    def empty() -> None:
        if fs.ls(name):
            fs.rm(f"{name}/run", recursive=True)

    fs.mkdir(name)
    try:
        yield empty
    finally:
        fs.rm(name, recursive=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row its ratios to `dcp.save` in the same case."""
    peers = {(r["store"], r["shape"], r["world"]): r for r in rows if r["engine"] == "dcp.save"}
    for row in rows:
        peer = peers.get((row["store"], row["shape"], row["world"]))
        for name in ("save_mb_s", "load_mb_s_same", "stall_s"):
            row[f"{name}_of_dcp"] = row[name] / peer[name] if peer and row[name] else None


def _line(row: dict[str, Any]) -> str:
    loads = f", loads {row['load_mb_s_same']:.0f} MB/s" if row["load_mb_s_same"] else ""
    return (
        f"{row['store']} {row['shape']} on {row['world']}: {row['engine']} stalls {row['stall_s']:.3f} s, saves "
        f"{row['save_mb_s']:.0f} MB/s{loads}"
    )


def render(rows: list[dict[str, Any]]) -> str:
    """The table."""
    head = [
        "store, shape, ranks, engine",
        "stall s",
        "of dcp",
        "save MB/s",
        "x dcp",
        "load MB/s",
        "x dcp",
        "other world",
        "read",
        "other",
        "flying",
        f"{STEPS} steps",
        "helpers",
        "memory",
    ]
    return table(head, map(_cells, rows))


def _cells(row: dict[str, Any]) -> list[Any]:
    return [
        f"{row['store']} {row['shape']} {row['world']} {row['engine']}",
        row["stall_s"],
        _share(row["stall_s_of_dcp"]),
        row["save_mb_s"],
        _times(row["save_mb_s_of_dcp"]),
        row["load_mb_s_same"] or "-",
        _times(row["load_mb_s_same_of_dcp"]),
        row["load_mb_s_other"] or "-",
        _exact(row["read_same"]),
        _exact(row["read_other"]),
        f"{row['save_flying']}, {row['load_flying'] or '-'}",
        f"{row['steps_slower']:+.1%}",
        f"{row['helper_cores']:.2f}",
        f"{row['extra_mib']:.0f}",
    ]


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1f}"


def _exact(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _share(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1%}"


if __name__ == "__main__":
    main()
