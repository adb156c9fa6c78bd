"""Any way of saving to any way of loading: exact bytes, each read once, each block verified."""

from __future__ import annotations

import json
import math

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.checkpoint import blocks
from elastic.checkpoint import format as fmt
from elastic.checkpoint.blocks import Partial, combine_crcs, crc_blocks, hash_blocks, unproven
from elastic.checkpoint.families import index_name, merge
from elastic.checkpoint.fields import ITEM_BYTES
from elastic.checkpoint.format import Chunk, Manifest, TensorEntry, seal
from elastic.checkpoint.loader import load, load_together
from elastic.checkpoint.pack_index import PackIndex, Place
from elastic.checkpoint.parsing import parse_manifest
from elastic.checkpoint.plan import (
    Held,
    numbers_of,
    plan_lines,
    plan_load,
    plan_reads,
    plan_save,
    read_bytes,
    statement,
    wanted_bytes,
)
from elastic.checkpoint.tensors import DTYPES, Shard, tensor_bytes
from elastic.errors import CheckpointError, DamagedCheckpoint
from elastic.placement import Box, common, narrowed, runs, tiles
from elastic.storage import Storage
from jobs.bench import manifest as manifest_bench
from tests.fresh import examples

FOLDER = "checkpoints/step-00000001/1-1-a"


# ---- layouts, as a run could have them -----------------------------------------------------------------------------


def cut(shape, dim, ways):
    """Boxes of a tensor cut into `ways` along a dimension as torch.chunk does, some perhaps empty."""
    if not shape:
        return [Box((), ())] * ways
    n = shape[dim]
    step = -(-n // ways) if n else 0
    found = []
    for i in range(ways):
        begin, end = min(n, i * step), min(n, (i + 1) * step)
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[dim], sizes[dim] = begin, end - begin
        found.append(Box(tuple(offsets), tuple(sizes)))
    return found


@st.composite
def layouts(draw, shapes):
    """(replicas, ranks by place): for each rank of a world, which box of each tensor it holds, and as which replica."""
    kind, size = draw(st.sampled_from(["ddp", "fsdp", "hsdp"])), draw(st.integers(1, 4))
    replicas, ways = {"ddp": (size, 1), "fsdp": (1, size), "hsdp": (draw(st.integers(1, 3)), size)}[kind]
    world = replicas * ways
    dims = {name: draw(st.integers(0, max(0, len(shape) - 1))) for name, (shape, _) in shapes.items()}
    everywhere = {name for name in shapes if draw(st.integers(0, 3)) == 0 or not shapes[name][0]}
    ranks = []
    for rank in range(world):
        replica, way = divmod(rank, ways)
        held = []
        for name, (shape, dtype) in shapes.items():
            if name in everywhere:
                held.append(Held(name, dtype, shape, Box.whole(shape), rank, world))
            else:
                box, pieces = cut(shape, dims[name], ways)[way], ((dims[name], way, ways),)
                held.append(Held(name, dtype, shape, box, replica, replicas, pieces))
        ranks.append(held)
    return ranks


tensor_shapes = st.dictionaries(
    st.sampled_from(["a", "b/c", "d.e", "f"]),
    st.tuples(
        st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from(["uint8", "float16", "float32", "int64"])
    ),
    min_size=1,
)
cases = tensor_shapes.flatmap(lambda shapes: st.tuples(st.just(shapes), layouts(shapes), layouts(shapes)))


def content(shapes):
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randint(0, 100, shape, generator=generator).to(DTYPES[dtype])
        for name, (shape, dtype) in shapes.items()
    }


def saved(tensors, ranks):
    """Packs and entries, as workers and keeper make them, without processes; and what all say of their packs."""
    packs: dict[str, bytes] = {}
    said = []
    entries: dict[str, TensorEntry] = {}
    for rank, held in enumerate(ranks):
        pack, lines, places = bytearray(), plan_lines(held), {}
        for h in held:
            entries.setdefault(h.name, TensorEntry(h.dtype, h.shape, ()))
        writes = plan_save(held)
        for write, number in zip(writes, numbers_of(lines, writes), strict=True):
            h = held[write.source]
            data = bytes(tensor_bytes(narrowed(tensors[h.name], write.box, Box.whole(h.shape))))
            assert (write.start, write.end) == (len(pack), len(pack) + len(data)), "no gaps"
            pack += data
            chunk = Chunk(
                write.box.offsets,
                write.box.sizes,
                f"rank-{rank:04d}.pack",
                write.start,
                write.end,
                hash_blocks(data),
                crc_blocks(data),
            )
            entries[h.name] = TensorEntry(h.dtype, h.shape, (*entries[h.name].chunks, chunk))
            places[number] = Place(chunk.pack, chunk.start, chunk.end, chunk.hashes, chunk.crcs)
        name = f"rank-{rank:04d}.pack"
        packs[name] = bytes(pack)
        index = PackIndex.of(name, places).to_json()
        proof = [len(index), xxhash.xxh3_128_hexdigest(index)] if places else [0, "0" * 32]
        packs[index_name(name)] = index
        said.append(statement(name, proof, PackIndex.of(name, places).ends_by_pack(), lines, held))
    return packs, entries, said


@pytest.fixture
def small_units(monkeypatch):
    """Blocks, requests and shares small enough for small tensors to have several."""
    monkeypatch.setattr(fmt, "BLOCK_BYTES", 48)
    monkeypatch.setattr("elastic.checkpoint.plan.SPLIT_BYTES", 32)


@pytest.mark.usefixtures("small_units")
@settings(max_examples=examples(100, fresh=250))
@given(cases, st.data())
def test_every_byte_is_saved_once_and_read_once_whatever_the_layouts(case, data):
    shapes, before, after = case
    tensors = content(shapes)
    packs, entries, said = saved(tensors, before)
    assert _found_again(packs, said, shapes) == {n: set(e.chunks) for n, e in entries.items()}

    for name, (shape, dtype) in shapes.items():
        assert tiles([c.box for c in entries[name].chunks], shape)
        assert sum(c.end - c.start for c in entries[name].chunks) == math.prod(shape) * ITEM_BYTES[dtype]
    stored = sum(len(data) for name, data in packs.items() if name.endswith(".pack"))
    assert stored == sum(t.nbytes for t in tensors.values())

    partials = []
    for held in after:
        wanted = [Shard(h.name, torch.empty(0), h.shape, h.box.offsets).wanted for h in held]
        wanted = [w.__class__(w.name, h.box) for w, h in zip(wanted, held, strict=True)]
        homes = [bytearray(h.nbytes) for h in held]
        parts = plan_load(entries, FOLDER, wanted)
        limit = data.draw(st.sampled_from([20, 48, 100]))
        reads = plan_reads(parts, limit)
        assert read_bytes(reads) == wanted_bytes(entries, wanted), "read amplification is exactly 1"
        for read in reads:
            assert read.end - read.start <= limit
            got = packs[read.object.rpartition("/")[2]][read.start : read.end]
            for _, s in read.segments:
                homes[s.wanted][s.at : s.at + s.length] = got[s.start - read.start :][: s.length]
        for h, home in zip(held, homes, strict=True):
            assert bytes(home) == bytes(tensor_bytes(narrowed(tensors[h.name], h.box, Box.whole(h.shape)))), h
        for part in parts:
            if not part.whole:
                pack = packs[part.object.rpartition("/")[2]]
                partials += [
                    Partial(
                        part.object,
                        (part.start, part.end),
                        part.crc,
                        s.start,
                        s.start + s.length,
                        blocks.crc_blocks(pack[s.start : s.start + s.length])[0],
                    )
                    for s in part.segments
                ]
    if all(h.replicas == len(after) for held in after for h in held) or not _irregular(partials):
        assert unproven(partials) == set(), "all readers together prove every block that they share"


def _found_again(packs, said, shapes):
    """The chunks of each tensor, as the manifest's formulas and the indexes of the packs give them."""
    placement = parse_manifest(manifest_of(said), "here").placement
    found = {name: set() for name in shapes}
    for name, (shape, dtype) in shapes.items():
        for pack, box in placement.pieces(name):
            index = PackIndex.parse(packs[pack.index_name], pack.name)
            found[name].add(index.chunk(placement.number_in(pack, name), box, box.volume * ITEM_BYTES[dtype]))
            for wanted in cut(shape, 0, 3):
                parts = [(p.name, b) for p, b in placement.pieces(name, wanted)]
                assert ((pack.name, box) in parts) == (common(box, wanted) is not None), "no index is read in vain"
    return found


def manifest_of(said):
    head = Manifest(1, 0, "", {}, {}).head
    return seal(json.dumps({**head, **merge(said)}).encode())


def _irregular(partials):
    """Whether some block is not wanted whole, or in pieces that overlap: it is then read again, whole."""
    by_block: dict[tuple[str, int], set[tuple[int, int]]] = {}
    ends = {}
    for p in partials:
        by_block.setdefault((p.object, p.block[0]), set()).add((p.start, p.end))
        ends[p.object, p.block[0]] = p.block
    for key, pieces in by_block.items():
        at = ends[key][0]
        for start, end in sorted(pieces):
            if start != at:
                return True
            at = end
        if at != ends[key][1]:
            return True
    return False


def test_a_manifest_hardly_grows_with_the_number_of_shards():
    few, many = manifest_bench.measure(16), manifest_bench.measure(512)

    assert many["manifest_mb"] - few["manifest_mb"] < 496 * 150e-6, "bytes a shard"
    assert many["said_mb"] - few["said_mb"] < 496 * 300e-6
    assert many["index_mb"] < few["index_mb"]


@pytest.mark.usefixtures("small_units")
@given(tensor_shapes, st.integers(2, 5))
def test_replicas_share_the_writing_evenly(shapes, replicas):
    loads = []
    for replica in range(replicas):
        held = [Held(n, d, s, Box.whole(s), replica, replicas) for n, (s, d) in shapes.items()]
        loads.append(sum(w.end - w.start for w in plan_save(held)))

    rows = [
        math.prod(s) * ITEM_BYTES[d] // next((n for n in s if n > 1), 1) for s, d in shapes.values() if math.prod(s)
    ]
    assert max(loads) - min(loads) <= 2 * max([*rows, 32])


# ---- pieces --------------------------------------------------------------------------------------------------------

boxes_3d = st.lists(st.integers(1, 5), min_size=0, max_size=3).flatmap(
    lambda shape: st.tuples(
        st.just(tuple(shape)),
        st.tuples(
            *[st.integers(0, n - 1).flatmap(lambda o, n=n: st.tuples(st.just(o), st.integers(1, n - o))) for n in shape]
        ),
    )
)


@given(boxes_3d)
def test_runs_are_the_elements_of_a_box_in_order(case):
    shape, ranges = case
    box = Box(tuple(o for o, _ in ranges), tuple(s for _, s in ranges))
    whole = torch.arange(math.prod(shape)).reshape(shape)

    found = [i for first, count in runs(box, Box.whole(shape)) for i in range(first, first + count)]

    assert found == narrowed(whole, box, Box.whole(shape)).reshape(-1).tolist()


@given(st.binary(max_size=300), st.data())
def test_checksums_of_pieces_combine_to_that_of_the_whole(data, draw):
    at = draw.draw(st.integers(0, len(data)))
    first, second = crc_blocks(data[:at])[0], crc_blocks(data[at:])[0]

    assert combine_crcs(first, second, len(data) - at) == crc_blocks(data)[0]


def test_boxes_that_overlap_or_leave_a_hole_do_not_tile():
    left, right = Box((0, 0), (4, 2)), Box((0, 2), (4, 2))
    assert tiles([left, right], (4, 4))
    assert not tiles([left, left], (4, 4))
    assert not tiles([left], (4, 4))
    assert tiles([], (0, 4))
    assert tiles([Box((), ())], ())
    columns_cut_at_different_rows = [Box((0, 0), (3, 2)), Box((3, 0), (1, 2)), Box((0, 2), (1, 2)), Box((1, 2), (3, 2))]
    assert tiles(columns_cut_at_different_rows, (4, 4))
    assert common(left, Box((1, 1), (9, 9))) == Box((1, 1), (3, 1))


# ---- on files ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path, small_units):
    shapes = {"w": ((12, 8), "float32"), "b": ((7,), "float16"), "n": ((), "int64")}
    tensors = content(shapes)
    ranks = [
        [
            Held(n, d, s, cut(s, 0, 3)[r], 0 if s else r, 1 if s else 3, ((0, r, 3),) if s else ())
            for n, (s, d) in shapes.items()
        ]
        for r in range(3)
    ]
    packs, _, said = saved(tensors, ranks)
    storage = Storage(str(tmp_path))
    for name, data in packs.items():
        storage.create(f"{FOLDER}/{name}", data)
    return storage, parse_manifest(manifest_of(said), "here"), tensors


def _halves(tensors, rank):
    """Shards of one of two ranks: rows cut in two, which cuts blocks too."""
    found = []
    for name, tensor in tensors.items():
        box = cut(tuple(tensor.shape), 0, 2)[rank] if tensor.dim() else Box((), ())
        found.append(Shard(name, torch.zeros(box.sizes, dtype=tensor.dtype), tuple(tensor.shape), box.offsets))
    return found


def _right(shards, tensors):
    return all(torch.equal(s.tensor, narrowed(tensors[s.name], s.box, Box.whole(s.shape))) for s in shards)


def _in_lockstep(storage, manifest, ranks):
    """load_together of all ranks, each in a thread."""
    import threading

    barrier, said, outcomes = threading.Barrier(len(ranks)), [None] * len(ranks), [None] * len(ranks)

    def work(rank, shards):
        def gather(value):
            said[rank] = value
            barrier.wait(20)
            everyone = list(said)
            barrier.wait(20)
            return everyone

        try:
            outcomes[rank] = load_together(storage, FOLDER, manifest, shards, gather)
        except CheckpointError as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=work, args=(r, s)) for r, s in enumerate(ranks)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    return outcomes


def test_two_ranks_read_what_three_saved_and_no_byte_twice(stored):
    storage, manifest, tensors = stored
    ranks = [_halves(tensors, r) for r in range(2)]

    reports = _in_lockstep(storage, manifest, ranks)

    assert all(_right(shards, tensors) for shards in ranks)
    assert sum(r.read_bytes for r in reports) == sum(r.wanted_bytes for r in reports)
    assert sum(r.read_bytes for r in reports) == sum(t.nbytes for t in tensors.values()) + tensors["n"].nbytes
    assert any(r.partials for r in reports), "blocks were shared"
    assert [r.refetched for r in reports] == [[], []]


def test_damage_in_a_block_that_two_ranks_share_is_found_by_both(stored):
    storage, manifest, tensors = stored
    name = f"{FOLDER}/rank-0001.pack"
    data = bytearray(storage.read(name))
    data[70] ^= 1
    storage.replace(name, bytes(data))

    outcomes = _in_lockstep(storage, manifest, [_halves(tensors, r) for r in range(2)])

    assert [type(o) for o in outcomes] == [DamagedCheckpoint] * 2
    assert str(outcomes[0]) == str(outcomes[1])
    assert f"{name} has other bytes than were written, in the block at 48 (tensor 'w')" in str(outcomes[0])


def test_alone_a_reader_of_a_part_reads_the_whole_block_to_verify_it(stored):
    storage, manifest, tensors = stored
    shards = _halves(tensors, 0)

    report = load(storage, FOLDER, manifest, shards)

    assert _right(shards, tensors)
    assert report.read_bytes > report.wanted_bytes
    assert report.partials == []


def test_a_block_that_was_damaged_on_the_way_is_asked_for_once_more(stored, monkeypatch):
    storage, manifest, tensors = stored
    from elastic.checkpoint.downloads import RangeReader

    read, hit = RangeReader.read, []

    def flip_once(self, name, start, views):
        read(self, name, start, views)
        if not hit and name.endswith("rank-0001.pack"):
            hit.append(name)
            views[0][0] ^= 1

    monkeypatch.setattr(RangeReader, "read", flip_once)
    shards = [Shard.whole(n, torch.zeros_like(t)) for n, t in tensors.items()]

    report = load(storage, FOLDER, manifest, shards)

    assert _right(shards, tensors)
    assert len(report.refetched) == 1


def test_destinations_may_be_strided_and_of_another_dtype_if_that_is_asked_for(stored):
    storage, manifest, tensors = stored
    strided = torch.zeros(8, 12).T
    double = torch.zeros(12, 8, dtype=torch.float64)

    load(storage, FOLDER, manifest, [Shard.whole("w", strided)])
    load(storage, FOLDER, manifest, [Shard.whole("w", double)], convert=True)

    assert torch.equal(strided, tensors["w"])
    assert torch.equal(double, tensors["w"].double())
    with pytest.raises(CheckpointError, match=r"the saved w is float32 \(12, 8\), this one is float64"):
        load(storage, FOLDER, manifest, [Shard.whole("w", double)])
    with pytest.raises(CheckpointError, match="has no tensor 'x'"):
        load(storage, FOLDER, manifest, [Shard.whole("x", double)])
