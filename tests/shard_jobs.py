"""A job whose data lie in shards, and the files that it reads."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import elastic
from tests.tiny_jobs import Plain, Samples

COUNTS = (31, 7, 24, 1, 37)


def write(folder: Path, kind: str, counts: tuple[int, ...] = COUNTS) -> list[str]:
    """Shards with numbered samples; returns their paths."""
    paths, number = [], 0
    for shard, count in enumerate(counts):
        path = folder / f"part-{shard:03d}.{kind}"
        write_one(path, kind, range(number, number + count))
        paths.append(str(path))
        number += count
    return paths


def write_one(path: Path, kind: str, numbers: range) -> None:
    rows = [{"number": n, "text": "x" * (n % 13)} for n in numbers]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "tar":
        with tarfile.open(path, "w") as tar:
            for row in rows:
                for end, data in (("json", json.dumps(row).encode()), ("seg.txt", row["text"].encode())):
                    member = tarfile.TarInfo(f"some/{row['number']:05d}.{end}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.Table.from_pylist(rows)
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=5)
        else:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table, max_chunksize=5)


def number_of(sample: dict[str, Any]) -> int:
    return int(json.loads(sample["json"])["number"] if "json" in sample else sample["number"])


@dataclass
class OfShards(Plain):
    """The plain job, whose samples are numbered in shards and made when they are decoded."""

    urls: str = field(default="", metadata={"help": "the shards"})
    window: int = field(default=8, metadata={"help": "samples that are shuffled together"})

    def train_data(self):
        return elastic.Shards(self.urls, window=self.window, decode=_decoded)


def _decoded(sample: dict[str, Any]) -> Any:
    return Samples(1000)[number_of(sample)]


@dataclass
class Streamed(Plain):
    """The plain job, whose samples come out of a stream in lanes; each lane ends, and begins again."""

    def train_data(self):
        return elastic.Lanes(generated)


def generated(lane: int, lanes: int):
    """The samples of a lane, which draws: 9 and more, with noise."""
    samples = Samples(1000)
    for number in range(lane, 9 * lanes + lane % 3 * lanes, lanes):
        yield samples[number]


def streaming(shards: int, each: int):
    """A stream of datasets, of numbers."""
    from datasets import IterableDataset

    return IterableDataset.from_generator(_numbers, gen_kwargs={"shards": [[s, each] for s in range(shards)]}).map(
        _made
    )


def _numbers(shards):
    for shard, each in shards:
        for i in range(each):
            yield {"number": shard * each + i}


def _made(row):
    features, label, number = Samples(1000, noise=0.0)[row["number"]]
    return {"x": features, "y": label, "n": number}
