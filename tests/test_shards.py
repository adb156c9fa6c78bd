"""Data in shards: all samples once an epoch, in the same order for every world, each byte read once."""

from __future__ import annotations

import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import elastic
from elastic.data import shard_formats
from elastic.data.deal import deal
from elastic.data.fetching import Fetcher, Order
from elastic.data.loader import Loader
from elastic.data.windows import Windows
from elastic.errors import ConfigError
from elastic.job import Plan
from elastic.observe.ledger import gaps_and_doubles
from tests.forked import B, configure, fault, train
from tests.shard_jobs import COUNTS, OfShards, number_of, write

KINDS = ("jsonl", "tar", "parquet", "arrow")
TOTAL = sum(COUNTS)


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 30),
    st.integers(0, 2**63 - 1),
    st.data(),
)
def test_windows_take_every_sample_once_an_epoch_and_a_position_alone_has_the_same(
    counts, size, parts, window, seed, data
):
    samples = sum(counts)
    if samples < size * parts:
        return
    starts, plan = np.cumsum([0, *counts]), Plan(20, size * parts, samples, size, seed)
    order = Windows(starts, window)

    ids = order(np.arange(3 * samples), plan)

    for epoch in range(3):
        assert sorted(ids[epoch * samples : (epoch + 1) * samples].tolist()) == list(range(samples))
    for position in data.draw(st.lists(st.integers(0, 3 * samples - 1), min_size=1, max_size=5)):
        assert Windows(starts, window)(np.array([position]), plan).tolist() == [ids[position]]


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 30), st.integers(0, 3))
def test_the_following_window_is_the_one_that_a_microbatch_needs_next(parts, window, slot):
    plan = Plan(20, 3 * parts, 100, 3, 5)
    order, slot = Windows(np.array([0, 40, 70, 100]), window), slot % parts

    keys = [order.split(np.array([p]), plan)[0][0] for p in range(500) if p // 3 % parts == slot]

    changes = [(a, b) for a, b in itertools.pairwise(keys) if a != b]
    assert changes
    assert all(order.following(a, plan) == b for a, b in changes)


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_of_each_format_is_found_alone(tmp_path, kind):
    write(tmp_path, kind)

    data = elastic.Shards(str(tmp_path / f"*.{kind}"))

    assert len(data) == TOTAL
    assert [number_of(data[i]) for i in (0, 30, 31, 37, 38, 61, 62, 63, TOTAL - 1)] == [
        0, 30, 31, 37, 38, 61, 62, 63, TOTAL - 1
    ]  # fmt: skip
    assert number_of(pickle.loads(pickle.dumps(data))[44]) == 44
    with pytest.raises(IndexError):
        data[TOTAL]
    if kind == "tar":
        sample = data[5]
        assert sample["__key__"] == "some/00005"
        assert sample["seg.txt"] == b"xxxxx"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [1, 3])
def test_an_epoch_reads_each_byte_once_however_many_workers_there_are(tmp_path, monkeypatch, kind, workers):
    paths, read = write(tmp_path, kind), []
    steps, plan = TOTAL // 20, Plan(TOTAL // 20, 20, TOTAL, 2, 3)
    real = shard_formats.FORMATS[kind].read

    def noted(fs, path, offsets, begin, end):
        read.append((path, begin, end))
        return real(fs, path, offsets, begin, end)

    made = elastic.Shards(paths, window=6)
    order = Order(seed=3, dataset_size=TOTAL, global_size=20, microbatches=10, ids=lambda p: made.order(p, plan))
    monkeypatch.setattr(shard_formats.FORMATS[kind], "read", noted)
    found = []
    for run in deal(10, workers):
        data = pickle.loads(pickle.dumps(made))
        data.bind(plan)
        fetcher = Fetcher(data, lambda samples: [number_of(s) for s in samples], 3, TOTAL, by_position=True)
        loader = Loader(fetcher, order, workers=0, prefetch=1, total_steps=steps)
        spans = [(i, 1) for i in run]
        loader.start(0, spans)
        for step in range(steps):
            for first, count in spans:
                found += loader.next(step, first, count).batch
        loader.close()

    assert sorted(found) == list(range(TOTAL))
    of_path = {path: sorted((b, e) for p, b, e in read if p == path) for path in paths}
    for path, count in zip(paths, COUNTS):
        assert of_path[path][0][0] == 0
        assert of_path[path][-1][1] == count
        assert all(a[1] == b[0] for a, b in itertools.pairwise(of_path[path])), "rows are read once, and all"


def test_the_index_is_kept_and_made_anew_for_a_file_that_changed(tmp_path, monkeypatch):
    paths, made = write(tmp_path, "jsonl"), []
    real = shard_formats.FORMATS["jsonl"].index
    monkeypatch.setattr(
        shard_formats.FORMATS["jsonl"], "index", lambda fs, path, size: made.append(path) or real(fs, path, size)
    )
    elastic.Shards(paths)
    assert sorted(made) == paths
    elastic.Shards(paths)
    assert sorted(made) == paths

    with open(paths[1], "a") as file:
        file.write('{"number": 7}')  # without an end of line

    data = elastic.Shards(paths)
    assert len(made) == len(paths) + 1
    assert len(data) == TOTAL + 1
    assert data[38] == {"number": 7}
    [kept] = tmp_path.glob("elastic-index-*.npz")
    kept.write_bytes(b"no index")
    with pytest.raises(ConfigError, match="is no index that can be read"):
        elastic.Shards(paths)


def test_a_file_that_changed_since_is_an_error_of_its_sample(tmp_path):
    [path] = write(tmp_path, "jsonl", (20,))
    data = elastic.Shards(path)

    os.truncate(path, 100)

    with pytest.raises(OSError, match="has changed"):
        data[19]


@pytest.mark.parametrize(
    ("names", "more", "words"),
    [
        ((), {}, "there is no file"),
        (("a.tar.gz",), {}, "no sample inside can be read alone; unpack them"),
        (("a.bin",), {}, "names end with .bin; give format=, one of jsonl, tar, parquet, arrow"),
        (("a.jsonl", "b.tar"), {}, "names end with .jsonl, .tar"),
        (("a.jsonl",), {"format": "csv"}, "was given the format 'csv'"),
        (("a.jsonl",), {"window": 0}, "was given the window 0"),
        (("a.jsonl",), {}, "have no samples"),
        (("b.jsonl",), {"index": "/proc/nowhere/index.npz"}, "cannot keep its index at /proc/nowhere/index.npz"),
    ],
)
def test_what_are_no_shards_is_refused(tmp_path, names, more, words):
    for name in names:
        (tmp_path / name).write_text('{"a": 1}\n' if name.startswith("b.") else "")
    with pytest.raises(ConfigError) as raised:
        elastic.Shards([str(tmp_path / name) for name in names or ("none.jsonl",)], **more)
    assert words in str(raised.value)


def test_an_arrow_stream_is_told_from_a_file(tmp_path):
    import pyarrow as pa

    table = pa.table({"a": [1, 2]})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ConfigError, match=r"not in Arrow's file format .*datasets.load_from_disk"):
        elastic.Shards(str(tmp_path / "a.arrow"))


def test_any_file_system_of_fsspec_s(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in map(Path, write(tmp_path, "tar")):
        memory.pipe_file(f"/shards/{path.name}", path.read_bytes())

    data = elastic.Shards("memory://shards/*.tar", index=str(tmp_path / "index.npz"))

    assert [number_of(data[i]) for i in range(TOTAL)] == list(range(TOTAL))
    assert (tmp_path / "index.npz").exists()


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_a_run_over_shards_has_the_same_bits_for_every_world_through_a_death(tmp_path):
    write(tmp_path, "tar")
    job = OfShards(urls=str(tmp_path / "*.tar"))

    alone = train(job, configure(tmp_path, "alone"), 1)
    moved = train(job, configure(tmp_path, "moved", data__workers=2), 3, faults=[fault("step.reduce", step=5, rank=1)])
    cut = train(job, configure(tmp_path, "cut", parallel__strategy="fsdp"), 2)

    assert (alone.failure, moved.failure, cut.failure) == (None, None, None)
    assert moved.events("member_lost")
    assert moved.sha == alone.sha == cut.sha
    assert moved.column("sample_hash") == alone.column("sample_hash")
    assert gaps_and_doubles(moved.rows, B) == []
    assert moved.result["exactness_held"] is True
