"""Checkpoints on storage: what is written is read back bit for bit, and nothing damaged or hostile is believed."""

from __future__ import annotations

import copy
import itertools
import json
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoint import format as fmt
from elastic.checkpoint import parsing, reader, retention, writer
from elastic.checkpoint.chunks import all_chunks
from elastic.checkpoint.fields import ITEM_BYTES
from elastic.checkpoint.format import Manifest, seal
from elastic.checkpoint.loader import load_all
from elastic.checkpoint.parsing import parse_manifest
from elastic.checkpoint.reader import Committed, newest_first, read_manifest
from elastic.checkpoint.retention import Policy, Retention
from elastic.checkpoint.saver import Saver
from elastic.checkpoint.tensors import DTYPES, Shard, tensor_bytes
from elastic.errors import CheckpointError
from elastic.storage import Storage
from tests.fresh import examples


@pytest.fixture
def storage(tmp_path):
    found = Storage(str(tmp_path / "run"))
    found.in_process = True  # an uploader process for each of these would only take time
    return found


def _pack(storage, step, attempt, rank, tensors):
    saver = Saver(storage)
    try:
        saver.start(step, attempt, [Shard.whole(n, t) for n, t in tensors.items()], rank=rank)
        save = saver.wait(60)
    finally:
        saver.close()
    assert save.error is None
    return save.index


def _write(storage, step, attempt, *packs, values=None, metrics=None):
    indexes = [_pack(storage, step, attempt, rank, tensors) for rank, tensors in enumerate(packs)]
    manifest = Manifest(step, 7, "digest", {"size": len(packs)}, values or {}, metrics=metrics or {})
    return writer.commit(storage, attempt, manifest, indexes)


def _chunks(storage, manifest, attempt="1-1-a"):
    """All tensors with their chunks."""
    return all_chunks(storage, fmt.attempt_folder(manifest.step, attempt), manifest)


def _bits(tensor):
    return bytes(tensor_bytes(tensor))


def _tensors():
    """One tensor of every dtype in every shape that is easily forgotten."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, dtype in DTYPES.items():
        for shape in ((), (0,), (1,), (3, 5), (2, 0, 4), (2, 3, 4)):
            raw = torch.randn(shape, generator=generator, dtype=torch.float64) * 100
            value = raw > 0 if dtype == torch.bool else raw.to(dtype)
            found[f"model/{name}/{'x'.join(map(str, shape)) or 'scalar'}"] = value
    found["special"] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 5e-324], dtype=torch.float64)
    found["not contiguous"] = torch.arange(12.0).reshape(3, 4).T
    found["optimizer/layer.weight/exp_avg"] = torch.ones(1000)
    return found


def test_every_dtype_and_shape_comes_back_bit_for_bit(storage):
    tensors = _tensors()
    names = list(tensors)
    halves = [{n: tensors[n] for n in names[i::2]} for i in range(2)]

    committed = _write(storage, 120, "1-2-a", *halves, values={"groups": [1, None, "x"]})

    newest = next(newest_first(storage))
    assert newest == Committed(120, "1-2-a")
    manifest = read_manifest(storage, newest)
    assert manifest == committed
    assert (manifest.step, manifest.seed, manifest.config_digest) == (120, 7, "digest")
    assert manifest.values == {"groups": [1, None, "x"]}
    assert manifest.tensors.keys() == tensors.keys()
    loaded = load_all(storage, newest.folder, manifest)
    for name, tensor in tensors.items():
        found = loaded[name]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert _bits(found) == _bits(tensor), name


def test_a_tensor_longer_than_a_block_has_checksums_for_each_block(storage, monkeypatch):
    monkeypatch.setattr(fmt, "BLOCK_BYTES", 64)
    tensor = torch.arange(100, dtype=torch.int64)

    manifest = _write(storage, 1, "1-1-a", {"t": tensor})

    (chunk,) = _chunks(storage, manifest)["t"].chunks
    assert len(chunk.hashes) == len(chunk.crcs) == -(-800 // 64)
    _flip(storage, "checkpoints/step-00000001/1-1-a/rank-0000.pack", 799)
    with pytest.raises(CheckpointError, match=r"rank-0000\.pack has other bytes .*in the block at 768 \(tensor 't'\)"):
        load_all(storage, "checkpoints/step-00000001/1-1-a", manifest)


def test_a_pack_has_no_gaps_and_tensors_lie_where_their_elements_can(storage):
    tensors = {f"{n:02}": torch.ones(n, dtype=list(DTYPES.values())[n % 12]) for n in range(1, 70)}

    manifest = _write(storage, 1, "1-1-a", tensors)

    places = sorted((e.chunks[0].start, e.chunks[0].end, e.dtype) for e in _chunks(storage, manifest).values())
    assert [start for start, _, _ in places] == [0] + [end for _, end, _ in places[:-1]]
    assert storage.size("checkpoints/step-00000001/1-1-a/rank-0000.pack") == places[-1][1]
    for start, end, dtype in places:
        assert start % (64 if (end - start) % 64 == 0 else ITEM_BYTES[dtype]) == 0


# ---- the commit ------------------------------------------------------------------------------------------------


def test_what_has_no_manifest_is_no_checkpoint(storage):
    _pack(storage, 5, "1-1-a", 0, {"t": torch.ones(3)})

    assert reader.steps_with_attempts(storage) == [5]
    assert list(newest_first(storage)) == []


def test_a_second_commit_of_an_attempt_is_refused_and_changes_nothing(storage):
    _write(storage, 5, "1-1-a", {"t": torch.ones(3)})
    before = storage.read("checkpoints/step-00000005/1-1-a/manifest.json")

    with pytest.raises(FileExistsError):
        writer.commit(storage, "1-1-a", Manifest(5, 8, "other", {}, {}), [])

    assert storage.read("checkpoints/step-00000005/1-1-a/manifest.json") == before


def test_two_ranks_that_wrote_the_same_box_are_refused_by_its_name(storage):
    index = _pack(storage, 5, "1-1-a", 0, {"layer.weight": torch.ones(3)})

    with pytest.raises(CheckpointError, match=r"'layer\.weight' is not tiled by its chunks"):
        writer.commit(storage, "1-1-a", Manifest(5, 0, "", {}, {}), [index, index])

    assert list(newest_first(storage)) == []


def test_an_index_that_could_not_be_read_again_is_not_committed(storage):
    index = _pack(storage, 5, "1-1-a", 0, {"t": torch.ones(3)})
    index["bytes"] += 1

    with pytest.raises(CheckpointError, match="its tensors have 12 bytes, its packs 13"):
        writer.commit(storage, "1-1-a", Manifest(5, 0, "", {}, {}), [index])

    assert list(newest_first(storage)) == []


def test_ranks_that_differ_in_a_tensor_are_refused_by_its_name(storage):
    index = _pack(storage, 5, "1-1-a", 0, {"w": torch.ones(3)})
    other = _pack(storage, 5, "1-1-a", 1, {"w": torch.ones(4)})

    with pytest.raises(CheckpointError, match=r"ranks differ in the tensor 'w': float32 \[3\] and float32 \[4\]"):
        writer.commit(storage, "1-1-a", Manifest(5, 0, "", {}, {}), [index, other])


@pytest.mark.parametrize("name", ["", "../x", "a/../b", "/etc/x", "a//b", "a/", "./a", "s3://b/x", "a\nb", "a\0b"])
def test_a_tensor_name_that_means_more_than_a_name_is_refused(storage, name):
    with pytest.raises(CheckpointError, match="is not a plain relative name"):
        _pack(storage, 1, "1-1-a", 0, {name: torch.ones(1)})


# ---- order and retention ---------------------------------------------------------------------------------------


def test_the_newest_is_the_highest_step_and_then_the_highest_generation_by_number(storage):
    for step, attempt in ((9, "1-1-a"), (100, "2-9-a"), (100, "2-10-a"), (100, "10-1-a"), (20, "3-3-a")):
        _write(storage, step, attempt, {"t": torch.ones(1)})
    _pack(storage, 100, "11-1-a", 0, {"t": torch.ones(1)})  # not committed
    storage.create("checkpoints/step-00000100/notes.txt", b"not an attempt")
    storage.create("checkpoints/README", b"not a step")

    found = [(c.step, c.attempt) for c in newest_first(storage)]

    assert found == [(100, "10-1-a"), (100, "2-10-a"), (100, "2-9-a"), (20, "3-3-a"), (9, "1-1-a")]


committed_steps = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3)), unique=True, max_size=20).map(
    lambda found: [Committed(s, f"1-{n}-a") for s, n in sorted(found, reverse=True)]
)


@given(
    committed_steps,
    st.sets(st.integers(0, 40)),
    st.integers(1, 4),
    st.sampled_from([None, 5]),
    st.integers(0, 3),
    st.sampled_from(["min", "max"]),
    st.data(),
)
def test_retention_keeps_what_it_says_and_never_less_than_the_newest(committed, pins, last, every, best, mode, data):
    scores = st.sampled_from([0.0, 1.0, 2.0, math.nan])
    metrics = {c: {"eval/loss": data.draw(scores)} for c in committed if data.draw(st.booleans())}

    kept = retention.to_keep(committed, metrics, pins, Policy(last, every, best, "eval/loss", mode))

    newest = {c.step: c for c in reversed(committed)}
    steps = sorted(newest, reverse=True)
    assert kept <= set(newest.values()), "of a step only the newest attempt"
    assert {c.step for c in kept} >= set(steps[:last]) | (pins & set(steps))
    if every:
        assert {c.step for c in kept} >= {s for s in steps if s % 5 == 0}
    scored = [c for c in newest.values() if metrics.get(c, {}).get("eval/loss", math.nan) >= 0]
    sign = 1 if mode == "min" else -1
    losers = [c for c in scored if c not in kept]
    winners = [c for c in scored if c in kept]
    assert len(winners) >= min(best, len(scored))
    better = sorted(sign * metrics[c]["eval/loss"] for c in winners)[:best]
    assert all(sign * metrics[c]["eval/loss"] >= max(better) for c in losers if better)


@given(committed_steps, committed_steps, st.data())
def test_only_what_is_older_than_the_newest_committed_and_not_kept_is_removed(committed, only_tried, data):
    kept = {c for c in committed if data.draw(st.booleans())} | set(committed[:1])
    found = set(committed) | set(only_tried)

    gone = set(retention.to_remove(committed[0] if committed else None, kept, found))

    assert gone & kept == set()
    order = {c: (c.step, c.attempt) for c in found}
    if not committed:
        assert gone == set()
    else:
        assert gone == {c for c in found - kept if order[c] < order[committed[0]]}


def _steps(storage):
    return [c.step for c in newest_first(storage)]


def test_pruning_removes_old_steps_and_leaves_what_can_be_loaded(storage):
    for step in (10, 20, 30, 40):
        _write(storage, step, "1-1-a", {"t": torch.full((2,), float(step))})
    _pack(storage, 25, "1-1-a", 0, {"t": torch.ones(1)})
    _pack(storage, 40, "1-0-a", 0, {"t": torch.ones(1)})
    _pack(storage, 50, "1-1-a", 0, {"t": torch.ones(1)})

    gone = Retention(storage, Policy(last=2)).prune()

    assert [(c.step, c.attempt) for c in gone] == [(10, "1-1-a"), (20, "1-1-a"), (25, "1-1-a"), (40, "1-0-a")]
    assert _steps(storage) == [40, 30]
    assert reader.steps_with_attempts(storage) == [30, 40, 50]
    assert reader.attempts(storage, 40) == ["1-1-a"]
    assert Retention(storage, Policy(last=2)).prune() == []


def test_the_best_by_a_metric_and_pinned_ones_are_kept(storage):
    for step, loss in ((10, 0.5), (20, 0.1), (30, 0.9), (40, 0.7), (50, None)):
        _write(storage, step, "1-1-a", {"t": torch.ones(1)}, metrics={} if loss is None else {"eval/loss": loss})
    retention.pin(storage, 30)
    retention.pin(storage, 30)

    Retention(storage, Policy(last=1, best=2)).prune()
    assert _steps(storage) == [50, 30, 20, 10]

    retention.unpin(storage, 30)
    Retention(storage, Policy(last=1, best=1, mode="max")).prune()
    assert _steps(storage) == [50, 30]


def test_what_has_no_checkpoint_cannot_be_pinned(storage):
    _pack(storage, 5, "1-1-a", 0, {"t": torch.ones(1)})

    with pytest.raises(CheckpointError, match="step 5 has no committed checkpoint"):
        retention.pin(storage, 5)


# ---- what does not change --------------------------------------------------------------------------------------


def _save(saver, storage, step, shards):
    saver.start(step, f"1-{step}-a", shards)
    save = saver.wait(60)
    manifest = writer.commit(storage, f"1-{step}-a", Manifest(step, 0, "", {}, {}), [save.index])
    saver.committed(step, f"1-{step}-a")
    return manifest, save.facts["bytes"]


def test_frozen_tensors_are_written_once_and_outlive_the_checkpoint_that_wrote_them(storage):
    frozen, odd, moving = torch.randn(1000), torch.ones(3, dtype=torch.uint8), torch.zeros(10)
    shards = [
        Shard.whole("frozen", frozen, frozen=True, stable=True),
        Shard.whole("odd", odd, frozen=True),
        Shard.whole("moving", moving),
    ]
    saver = Saver(storage)
    try:
        _, written = _save(saver, storage, 1, shards)
        assert written == 4043
        moving += 1
        _, written = _save(saver, storage, 2, shards)
        assert written == 40, "only what moved"
        _save(saver, storage, 3, shards)
        Retention(storage, Policy(last=1)).prune()

        assert _steps(storage) == [3]
        assert storage.names("checkpoints/step-00000001/1-1-a") == ["rank-0000.pack"], (
            "its manifest and no more is gone"
        )
        assert storage.names("checkpoints") == ["step-00000001", "step-00000003"]
        _assert_newest(storage, frozen=frozen, odd=odd, moving=moving)

        odd += 1  # whatever it is called, what changed is written
        _, written = _save(saver, storage, 4, shards)
        assert written == 4043
        Retention(storage, Policy(last=1)).prune()
        assert storage.names("checkpoints") == ["step-00000004"]
        _assert_newest(storage, frozen=frozen, odd=odd, moving=moving)
    finally:
        saver.close()


def _assert_newest(storage, **tensors):
    newest = next(newest_first(storage))
    loaded = load_all(storage, newest.folder, read_manifest(storage, newest))
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_commit_that_refers_to_an_object_that_is_gone_is_refused(storage):
    frozen = [Shard.whole("frozen", torch.ones(4), frozen=True)]
    saver = Saver(storage)
    try:
        _save(saver, storage, 1, frozen)
        storage.remove("checkpoints/step-00000001")
        with pytest.raises(CheckpointError, match=r"rank-0000\.pack, which this checkpoint refers to, is not there"):
            _save(saver, storage, 2, frozen)
    finally:
        saver.close()
    assert _steps(storage) == []


def test_what_is_written_to_while_it_is_copied_is_not_saved_and_copied_at_once_from_then_on(storage, monkeypatch):
    tensor = torch.zeros(4)
    shards = [Shard.whole("buffer", tensor, stable=True)]
    monkeypatch.setattr("elastic.checkpoint.saver.fault.point", lambda *_: tensor.add_(1) if len(_) else None)
    saver = Saver(storage)
    try:
        saver.start(1, "1-1-a", shards)
        assert "buffer was written to while it was copied" in (saver.wait(60).error or "")
        monkeypatch.undo()
        _save(saver, storage, 2, shards)
        _assert_newest(storage, buffer=tensor)
    finally:
        saver.close()


# ---- damage ----------------------------------------------------------------------------------------------------


def _flip(storage, name, at):
    data = bytearray(storage.read(name))
    data[at] ^= 0x10
    storage.replace(name, bytes(data))


@pytest.fixture
def checkpoint(storage):
    _write(storage, 3, "1-1-a", {"a": torch.arange(10.0), "b": torch.arange(7)})
    return Committed(3, "1-1-a")


PACK = "checkpoints/step-00000003/1-1-a/rank-0000.pack"


def _load(storage, checkpoint):
    return load_all(storage, checkpoint.folder, read_manifest(storage, checkpoint))


def test_any_flipped_bit_of_a_tensor_is_found_and_the_object_and_tensor_are_named(storage, checkpoint):
    for at, name in ((0, "b"), (55, "b"), (56, "a"), (95, "a")):
        _flip(storage, PACK, at)
        with pytest.raises(CheckpointError, match=rf"{PACK} has other bytes .*\(tensor '{name}'\)"):
            _load(storage, checkpoint)
        _flip(storage, PACK, at)

    assert _load(storage, checkpoint)["b"].tolist() == list(range(7))


def test_a_truncated_pack_is_found_and_named(storage, checkpoint):
    storage.replace(PACK, storage.read(PACK)[:-1])

    with pytest.raises(CheckpointError, match=f"{PACK} is too short for the tensor '.': it has 95 of 96 bytes"):
        _load(storage, checkpoint)


def test_a_missing_pack_is_found_and_named(storage, checkpoint):
    storage.remove(PACK)

    with pytest.raises(CheckpointError, match=f"{PACK} is missing, which holds the tensor 'a'"):
        _load(storage, checkpoint)


def test_a_manifest_of_another_step_is_not_believed(storage, checkpoint):
    data = storage.read("checkpoints/step-00000003/1-1-a/manifest.json")
    storage.create("checkpoints/step-00000004/1-1-a/manifest.json", data)

    with pytest.raises(CheckpointError, match=r"step-00000004/1-1-a/manifest\.json is of step 3"):
        read_manifest(storage, Committed(4, "1-1-a"))


def test_a_newer_format_is_refused_naming_both():
    with pytest.raises(CheckpointError, match="here has format 5, this version reads 1, 2, 3 and 4; install a newer"):
        parse_manifest(json.dumps({**_valid(), "format": 5}).encode(), "here")


# ---- hostile manifests -----------------------------------------------------------------------------------------


def _sealed(raw):
    return seal(json.dumps(raw).encode())


def test_any_changed_byte_of_a_manifest_is_noticed():
    data = _sealed(_valid())

    for at in range(len(data)):
        with pytest.raises(CheckpointError, match="here"):
            parse_manifest(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "here")


def _proof(n):
    return {"hashes": [str(n) * 32], "crcs": [n]}


def _valid():
    index = {
        "layer.weight": {
            "dtype": "float32",
            "shape": [4, 3],
            "chunks": [
                {"offsets": [0, 0], "sizes": [2, 3], "pack": "rank-0000.pack", "start": 0, "end": 24, **_proof(1)},
                {"offsets": [2, 0], "sizes": [2, 3], "pack": "rank-0001.pack", "start": 64, "end": 88, **_proof(2)},
            ],
        },
        "step": {
            "dtype": "int64",
            "shape": [],
            "chunks": [{"offsets": [], "sizes": [], "pack": "rank-0000.pack", "start": 64, "end": 72, **_proof(3)}],
        },
    }
    return {
        "format": 2,
        "step": 3,
        "seed": 0,
        "config_digest": "d",
        "world": {"size": 2},
        "values": {"x": 1},
        "tensors": index,
        "metrics": {"eval/loss": 0.5},
        "nonce": "n",
    }


def test_the_manifest_that_is_mutated_below_is_valid():
    manifest = parse_manifest(_sealed(_valid()), "here")

    assert manifest.tensors["layer.weight"].shape == (4, 3)
    assert manifest.tensors["layer.weight"].chunks[1].offsets == (2, 0)


def _places(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


PLACES = list(_places(_valid()))
hostile = st.sampled_from(
    [None, True, -1, 0, 1, 2, 10**30, 1.5, math.inf, math.nan, "", "1", "../x", "rank-0000.pack\n", "float64", [], {}]
)
anything = st.recursive(
    hostile | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutations(draw):
    """A valid manifest with a few values replaced, removed or added anywhere."""
    raw = _valid()
    for _ in range(draw(st.integers(1, 3))):
        *path, key = draw(st.sampled_from(PLACES[1:]))
        target = raw
        try:
            for k in path:
                target = target[k]
            action = draw(st.sampled_from(["replace", "replace", "remove", "double", "add"]))
            if action == "replace":
                target[key] = draw(hostile | anything)
            elif action == "remove":
                del target[key]
            elif action == "double" and isinstance(target, list):
                target.append(copy.deepcopy(target[key]))
            elif isinstance(target, dict):
                target[draw(st.text(max_size=4) | st.just("../../etc"))] = draw(anything)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier mutation took the place away
    return raw


def _check_believed(manifest):
    assert manifest.step >= 0
    for name, entry in manifest.tensors.items():
        assert name
        assert ".." not in name.split("/")
        assert entry.dtype in DTYPES
        assert all(n >= 0 for n in entry.shape)
        for chunk in entry.chunks:
            assert len(chunk.offsets) == len(chunk.sizes) == len(entry.shape)
            assert all(0 <= o <= o + s <= n for o, s, n in zip(chunk.offsets, chunk.sizes, entry.shape, strict=True))
            assert 0 <= chunk.start <= chunk.end
            assert chunk.end - chunk.start == math.prod(chunk.sizes) * DTYPES[entry.dtype].itemsize
            assert chunk.pack.startswith("rank-")
            assert chunk.pack.endswith(".pack")
            assert "/" not in chunk.pack
        if math.prod(max(n, 1) for n in entry.shape) > 10_000:
            continue  # an empty tensor with long sides has no elements to look at
        cells = [
            cell
            for c in entry.chunks
            for cell in itertools.product(*(range(o, o + s) for o, s in zip(c.offsets, c.sizes, strict=True)))
        ]
        assert sorted(cells) == sorted(itertools.product(*map(range, entry.shape))), "every element exactly once"


@settings(max_examples=examples(200, fresh=800))
@given(mutations())
def test_a_mutated_manifest_is_refused_or_stays_inside_its_tensors(raw):
    manifest, refusal = None, ""
    try:
        manifest = parse_manifest(_sealed(raw), "here")
    except CheckpointError as error:
        refusal = str(error)

    if manifest is None:
        assert refusal.startswith("here")
    else:
        _check_believed(manifest)


@given(st.binary(max_size=200) | anything.map(lambda v: json.dumps(v).encode()))
def test_what_is_no_manifest_at_all_is_refused(data):
    with pytest.raises(CheckpointError, match="here"):
        parse_manifest(data, "here")


@pytest.mark.parametrize("depth", [1_000, 100_000])
def test_deep_nesting_is_refused(depth):
    with pytest.raises(CheckpointError, match="here"):
        parse_manifest(b'{"tensors":' + b"[" * depth + b"]" * depth + b"}", "here")


def _timed(raw, said):
    data = raw if isinstance(raw, bytes) else _sealed(raw)
    began = time.process_time()
    with pytest.raises(CheckpointError, match=r"^here") as caught:
        parse_manifest(data, "here")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert time.process_time() - began < 1 + 2e-6 * len(data), "bounded by its size"


def test_many_chunks_that_overlap_cost_no_more_than_their_number(monkeypatch):
    count = 20_000
    chunk = {"offsets": [0], "sizes": [1], "pack": "rank-0000.pack", "start": 0, "end": 1, **_proof(0)}
    raw = {**_valid(), "tensors": {"t": {"dtype": "uint8", "shape": [count], "chunks": [chunk] * count}}}
    _timed(raw, "'t' is not tiled by its chunks")


def test_chunks_that_can_only_be_told_apart_one_by_one_are_refused_in_time():
    # Each cut frees one box: a spiral. Nobody writes such a thing, and looking at all of it would take n * n steps.
    side = 2000
    chunks, box = [], [0, 0, side, side]
    for turn in range(side):
        x, y, w, h = box
        if turn % 2:
            piece, box = (x, y, 1, h), [x + 1, y, w - 1, h]
        else:
            piece, box = (x, y, w, 1), [x, y + 1, w, h - 1]
        chunks.append(piece)
    chunks.append(tuple(box))
    packed = [
        {"offsets": [x, y], "sizes": [w, h], "pack": "rank-0000.pack", "start": 0, "end": w * h, **_proof(0)}
        for x, y, w, h in chunks
    ]
    _timed({**_valid(), "tensors": {"t": {"dtype": "uint8", "shape": [side, side], "chunks": packed}}}, "is not tiled")


@pytest.mark.parametrize("nested", [b"[" * 5_000_000 + b"]" * 5_000_000, b'{"a":' * 2_000_000, b"[[]," * 2_500_000])
def test_ten_megabytes_of_nested_json_are_refused_in_time(nested):
    _timed(nested, "is not JSON")


def test_a_number_of_ten_million_digits_is_refused_in_time():
    _timed(b'{"format": 2, "step": ' + b"9" * 10_000_000 + b"}", "is not JSON")


def test_an_object_much_larger_than_a_manifest_is_not_read_whole(storage, monkeypatch):
    monkeypatch.setattr(reader, "MAX_MANIFEST_BYTES", 1000)
    monkeypatch.setattr(parsing, "MAX_MANIFEST_BYTES", 1000)
    storage.create("checkpoints/step-00000003/1-1-a/manifest.json", b" " * 1_000_000)

    with pytest.raises(CheckpointError, match="has more than 1000 bytes"):
        read_manifest(storage, Committed(3, "1-1-a"))


def test_a_manifest_that_promises_more_than_its_objects_hold_takes_no_memory(storage):
    huge = 1 << 40
    proof = {"hashes": ["0" * 32] * (huge // fmt.BLOCK_BYTES), "crcs": [0] * (huge // fmt.BLOCK_BYTES)}
    chunk = {"offsets": [0], "sizes": [huge], "pack": "rank-0000.pack", "start": 0, "end": huge, **proof}
    raw = {**_valid(), "tensors": {"t": {"dtype": "uint8", "shape": [huge], "chunks": [chunk]}}}
    storage.create("checkpoints/step-00000003/1-1-a/rank-0000.pack", b"small")
    manifest = parse_manifest(_sealed(raw), "here")

    with pytest.raises(CheckpointError, match=r"rank-0000\.pack is too short for the tensor 't'"):
        load_all(storage, "checkpoints/step-00000003/1-1-a", manifest)


def _put(raw, path, value):
    raw = copy.deepcopy(raw)
    target = raw
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return raw


CHUNK = ("tensors", "layer.weight", "chunks", 0)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("step",), -1, "has step -1"),
        (("step",), math.inf, "here"),
        (("tensors", "layer.weight", "dtype"), "float8", "'layer.weight' has the unknown dtype 'float8'"),
        (("tensors", "layer.weight", "shape"), [4, -3], "'layer.weight' has the shape"),
        (("tensors", "layer.weight", "shape"), [5, 3], "'layer.weight' is not tiled by its chunks"),
        ((*CHUNK, "offsets"), [3, 0], "'layer.weight' has a chunk outside its shape"),
        ((*CHUNK, "offsets"), [-1, 0], "'layer.weight' has a chunk outside its shape"),
        ((*CHUNK, "offsets"), [0], "'layer.weight' has a chunk outside its shape"),
        ((*CHUNK, "offsets"), [2, 0], "'layer.weight' is not tiled by its chunks"),
        ((*CHUNK, "end"), 25, "'layer.weight' has a chunk of 25 bytes"),
        ((*CHUNK, "start"), -24, "'layer.weight'"),
        ((*CHUNK, "hashes"), [], "'layer.weight' has a chunk with 0 block hashes"),
        ((*CHUNK, "pack"), "../rank-0000.pack", "'layer.weight' names the pack '../rank-0000.pack'"),
        ((*CHUNK, "pack"), "rank-0000.pack\n", "'layer.weight' names the pack"),
        (("tensors", "../../x"), {"dtype": "int64", "shape": [0], "chunks": []}, "'../../x' is not a plain"),
    ],
)
def test_a_manifest_that_lies_is_refused_with_what_is_wrong(path, value, said):
    data = _sealed(_put(_valid(), path, value))

    with pytest.raises(CheckpointError, match=r"^here") as caught:
        parse_manifest(data, "here")

    assert said in str(caught.value)


@pytest.mark.parametrize("shape", [[0, 2**70], [0, 2**62, 2**62], [0, 2**63]])
def test_an_empty_tensor_of_impossible_shape_is_refused_when_it_is_read(shape):
    where = {"offsets": [0] * len(shape), "sizes": shape, "pack": "rank-0000.pack", "start": 0, "end": 0}
    chunk = {**where, **_proof(1)}
    raw = {**_valid(), "tensors": {"t": {"dtype": "uint8", "shape": shape, "chunks": [chunk]}}}

    with pytest.raises(CheckpointError, match="here: tensor 't' has the shape"):
        parse_manifest(_sealed(raw), "here")
