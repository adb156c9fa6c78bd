"""Checkpoints on storage: what is written is read back bit for bit, and nothing damaged or hostile is believed."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoint import format as fmt
from elastic.checkpoint import reader, retention, writer
from elastic.checkpoint.format import DTYPES, Manifest, parse_manifest
from elastic.checkpoint.reader import Committed, newest_first, read_manifest, read_tensor
from elastic.errors import CheckpointError
from elastic.storage import Storage


@pytest.fixture
def storage(tmp_path):
    return Storage(str(tmp_path / "run"))


def _write(storage, step, attempt, *packs, values=None):
    indexes = [writer.write_pack(storage, step, attempt, rank, tensors) for rank, tensors in enumerate(packs)]
    manifest = Manifest(step, 7, "digest", {"size": len(packs)}, values or {})
    return writer.commit(storage, attempt, manifest, indexes)


def _bits(tensor):
    return bytes(fmt.tensor_bytes(tensor))


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
    for name, tensor in tensors.items():
        found = read_tensor(storage, newest, name, manifest.tensors[name])
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        assert _bits(found) == _bits(tensor), name


def test_a_tensor_longer_than_a_block_has_a_hash_for_each_block(storage, monkeypatch):
    for module in (fmt, reader):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    tensor = torch.arange(100, dtype=torch.int64)

    manifest = _write(storage, 1, "1-1-a", {"t": tensor})

    assert len(manifest.tensors["t"].chunks[0].hashes) == -(-800 // 64)
    _flip(storage, "checkpoints/step-00000001/1-1-a/rank-0000.pack", 799)
    with pytest.raises(CheckpointError, match=r"rank-0000\.pack has other bytes .*in the block at 768 \(tensor 't'\)"):
        read_tensor(storage, Committed(1, "1-1-a"), "t", manifest.tensors["t"])


def test_tensors_lie_at_multiples_of_the_alignment(storage):
    manifest = _write(storage, 1, "1-1-a", {f"{n:02}": torch.ones(n, dtype=torch.uint8) for n in range(70)})

    starts = [entry.chunks[0].start for entry in manifest.tensors.values()]
    assert all(start % 64 == 0 for start in starts)
    assert starts == sorted(starts)


# ---- the commit ------------------------------------------------------------------------------------------------


def test_what_has_no_manifest_is_no_checkpoint(storage):
    writer.write_pack(storage, 5, "1-1-a", 0, {"t": torch.ones(3)})

    assert reader.steps_with_attempts(storage) == [5]
    assert list(newest_first(storage)) == []


def test_a_second_commit_of_an_attempt_is_refused_and_changes_nothing(storage):
    _write(storage, 5, "1-1-a", {"t": torch.ones(3)})
    before = storage.read("checkpoints/step-00000005/1-1-a/manifest.json")

    with pytest.raises(FileExistsError):
        writer.commit(storage, "1-1-a", Manifest(5, 8, "other", {}, {}), [])

    assert storage.read("checkpoints/step-00000005/1-1-a/manifest.json") == before


def test_two_ranks_that_claim_one_tensor_are_refused_by_its_name(storage):
    index = writer.write_pack(storage, 5, "1-1-a", 0, {"layer.weight": torch.ones(3)})

    with pytest.raises(CheckpointError, match=r"two ranks wrote the tensor 'layer\.weight'"):
        writer.commit(storage, "1-1-a", Manifest(5, 0, "", {}, {}), [index, index])

    assert list(newest_first(storage)) == []


def test_an_index_that_could_not_be_read_again_is_not_committed(storage):
    index = writer.write_pack(storage, 5, "1-1-a", 0, {"t": torch.ones(3)})
    index["t"]["shape"] = [4]

    with pytest.raises(CheckpointError, match="'t'"):
        writer.commit(storage, "1-1-a", Manifest(5, 0, "", {}, {}), [index])

    assert list(newest_first(storage)) == []


@given(st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(0, 500), max_size=20), st.integers(1, 6))
def test_every_tensor_is_some_rank_s_share_and_no_rank_has_needlessly_much(sizes, world_size):
    tensors = {name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()}

    shares = writer.share(tensors, world_size)

    assert sorted(n for names in shares for n in names) == sorted(tensors)
    load = [sum(sizes[n] for n in names) for names in shares]
    assert max(load) - min(load) <= max(sizes.values(), default=0)
    assert writer.share(dict(reversed(tensors.items())), world_size) == shares, "every rank must find the same shares"


@pytest.mark.parametrize("name", ["", "../x", "a/../b", "/etc/x", "a//b", "a/", "./a", "s3://b/x", "a\nb", "a\0b"])
def test_a_tensor_name_that_means_more_than_a_name_is_refused(storage, name):
    with pytest.raises(CheckpointError, match="is not a plain relative name"):
        writer.write_pack(storage, 1, "1-1-a", 0, {name: torch.ones(1)})


# ---- order and retention ---------------------------------------------------------------------------------------


def test_the_newest_is_the_highest_step_and_then_the_highest_generation_by_number(storage):
    for step, attempt in ((9, "1-1-a"), (100, "2-9-a"), (100, "2-10-a"), (100, "10-1-a"), (20, "3-3-a")):
        _write(storage, step, attempt, {"t": torch.ones(1)})
    writer.write_pack(storage, 100, "11-1-a", 0, {"t": torch.ones(1)})  # not committed
    storage.create("checkpoints/step-00000100/notes.txt", b"not an attempt")
    storage.create("checkpoints/README", b"not a step")

    found = [(c.step, c.attempt) for c in newest_first(storage)]

    assert found == [(100, "10-1-a"), (100, "2-10-a"), (100, "2-9-a"), (20, "3-3-a"), (9, "1-1-a")]


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)), st.integers(1, 6))
def test_retention_keeps_the_newest_committed_and_what_is_still_being_written(committed, only_tried, keep_last):
    attempted = sorted(committed | only_tried)

    gone = set(retention.to_remove(sorted(committed), attempted, keep_last))

    kept = sorted(committed - gone, reverse=True)
    assert kept == sorted(committed, reverse=True)[:keep_last]
    assert gone <= set(attempted)
    newest = max(committed, default=-1)
    assert {s for s in only_tried if s > newest} & gone == set()
    if committed:
        assert {s for s in only_tried - committed if s < newest} <= gone


def test_pruning_removes_old_steps_and_leaves_what_can_be_loaded(storage):
    for step in (10, 20, 30, 40):
        _write(storage, step, "1-1-a", {"t": torch.full((2,), float(step))})
    writer.write_pack(storage, 25, "1-1-a", 0, {"t": torch.ones(1)})
    writer.write_pack(storage, 50, "1-1-a", 0, {"t": torch.ones(1)})

    gone = retention.prune(storage, reader.steps_with_attempts(storage), keep_last=2)

    assert sorted(gone) == [10, 20, 25]
    assert [c.step for c in newest_first(storage)] == [40, 30]
    assert reader.steps_with_attempts(storage) == [30, 40, 50]


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
    manifest = read_manifest(storage, checkpoint)
    return {name: read_tensor(storage, checkpoint, name, entry) for name, entry in manifest.tensors.items()}


def test_any_flipped_bit_of_a_tensor_is_found_and_the_object_and_tensor_are_named(storage, checkpoint):
    for at, name in ((0, "a"), (39, "a"), (64, "b"), (119, "b")):
        _flip(storage, PACK, at)
        with pytest.raises(CheckpointError, match=rf"{PACK} has other bytes .*\(tensor '{name}'\)"):
            _load(storage, checkpoint)
        _flip(storage, PACK, at)

    assert _load(storage, checkpoint)["b"].tolist() == list(range(7))


def test_a_truncated_pack_is_found_and_named(storage, checkpoint):
    storage.replace(PACK, storage.read(PACK)[:-1])

    with pytest.raises(CheckpointError, match=f"{PACK} is too short for the tensor 'b'"):
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
    with pytest.raises(CheckpointError, match="here has format 2, this version reads 1; install a newer"):
        parse_manifest(json.dumps({**_valid(), "format": 2}).encode(), "here")


# ---- hostile manifests -----------------------------------------------------------------------------------------


def _valid():
    index = {
        "layer.weight": {
            "dtype": "float32", "shape": [4, 3],
            "chunks": [
                {"offsets": [0, 0], "sizes": [2, 3], "pack": "rank-0000.pack", "start": 0, "end": 24, "hashes": ["0"]},
                {"offsets": [2, 0], "sizes": [2, 3], "pack": "rank-0001.pack", "start": 64, "end": 88, "hashes": ["1"]},
            ],
        },
        "step": {
            "dtype": "int64", "shape": [],
            "chunks": [
                {"offsets": [], "sizes": [], "pack": "rank-0000.pack", "start": 64, "end": 72, "hashes": ["2"]}
            ],
        },
    }  # fmt: skip
    return {
        "format": 1, "step": 3, "seed": 0, "config_digest": "d", "world": {"size": 2}, "values": {"x": 1},
        "tensors": index,
    }  # fmt: skip


def test_the_manifest_that_is_mutated_below_is_valid():
    manifest = parse_manifest(json.dumps(_valid()).encode(), "here")

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
)  # fmt: skip
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


@settings(max_examples=800)
@given(mutations())
def test_a_mutated_manifest_is_refused_or_stays_inside_its_tensors(raw):
    manifest, refusal = None, ""
    try:
        manifest = parse_manifest(json.dumps(raw).encode(), "here")
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
    data = json.dumps(_put(_valid(), path, value)).encode()

    with pytest.raises(CheckpointError, match=r"^here") as caught:
        parse_manifest(data, "here")

    assert said in str(caught.value)


@pytest.mark.parametrize("shape", [[0, 2**70], [0, 2**62, 2**62], [0, 2**63]])
def test_an_empty_tensor_of_impossible_shape_is_refused_when_it_is_read(shape):
    where = {"offsets": [0] * len(shape), "sizes": shape, "pack": "rank-0000.pack", "start": 0, "end": 0}
    chunk = {**where, "hashes": ["0"]}
    raw = {**_valid(), "tensors": {"t": {"dtype": "uint8", "shape": shape, "chunks": [chunk]}}}

    with pytest.raises(CheckpointError, match="here: tensor 't' has the shape"):
        parse_manifest(json.dumps(raw).encode(), "here")
