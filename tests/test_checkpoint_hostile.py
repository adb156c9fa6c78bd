"""Checkpoints whose every checksum is right and that lie all the same about a training state: each is refused by name,
in bounded memory, and the one before is used."""

from __future__ import annotations

import ast
import copy
import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import elastic
from elastic.checkpoint.chunks import all_chunks
from elastic.checkpoint.format import BLOCK_BYTES, Manifest, attempt_folder, seal
from elastic.checkpoint.parsing import parse_manifest
from elastic.checkpoint.reader import Committed
from elastic.checkpoint.saver import Saver
from elastic.checkpoint.writer import commit
from elastic.errors import CheckpointError
from elastic.membership.protocol import Unloadable
from elastic.storage import Storage
from elastic.worker.state import TrainState
from elastic.worker.weights import weights_sha256
from tests.alone import restore_newest
from tests.fresh import examples
from tests.tiny_jobs import Everything

MIB = 1 << 20
ATTEMPT = "1-1-1"
NEWEST = f"{attempt_folder(2, ATTEMPT)}/manifest.json"


class Ledger:
    """What a restore tells."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    def post(self, message: Unloadable) -> None:
        self.said.append({"kind": message.kind, **asdict(message)})

    def event(self, kind: str, step: int, detail: Any, *, seconds: float | None = None) -> None:
        self.said.append({"kind": "event", "event": kind, "step": step, "detail": detail, "seconds": seconds})


def fresh(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    job = Everything(width=8)
    model = job.model()
    return TrainState(job, model, job.optimizer(model))


def trained() -> TrainState:
    """With all that an optimizer keeps."""
    state = fresh()
    for p in state.model.parameters():
        p.grad = torch.full_like(p, 0.5) if p.requires_grad else None
    state.optimizer.step()
    return state


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, dict[str, Any], str]:
    """Two checkpoints of equal content: the storage, the manifest of the second as JSON, the weights' hash."""
    storage, state = Storage(str(tmp_path_factory.mktemp("hostile"))), trained()
    storage.in_process = True
    saver = Saver(storage)
    try:
        for step in (1, 2):
            saver.start(step, ATTEMPT, state.shards(0, 1))
            index = saver.wait(60).index
            assert index is not None
            commit(storage, ATTEMPT, Manifest(step, 0, "", {"size": 1}, state.values()), [index])
    finally:
        saver.close()
    return storage, json.loads(storage.read(NEWEST)), weights_sha256(state.model)


def listed(storage: Storage, raw: dict[str, Any]) -> dict[str, Any]:
    """The same manifest as format 3 had it: with a list of all chunks."""
    manifest = parse_manifest(seal(json.dumps({k: v for k, v in raw.items() if k != "checksum"}).encode()), "here")
    found = all_chunks(storage, attempt_folder(2, ATTEMPT), manifest)
    return json.loads(json.dumps({**manifest.head, "format": 3, "tensors": {n: asdict(e) for n, e in found.items()}}))


def restored(storage: Storage, raw: dict[str, Any]) -> tuple[int, TrainState, list[dict[str, Any]]]:
    """What a worker makes of the run with this manifest as its newest."""
    raw = {k: v for k, v in raw.items() if k != "checksum"}
    storage.replace(NEWEST, seal(json.dumps(raw).encode()))
    state, ledger = fresh(seed=1), Ledger()
    found = restore_newest(state, storage, ledger, convert=False)
    return found.step if found else 0, state, ledger.said


def refused(storage: Storage, raw: dict[str, Any], sha: str) -> str:
    """Why the newest was refused; the one before was used."""
    step, state, said = restored(storage, raw)
    assert step == 1, "it was believed"
    assert weights_sha256(state.model) == sha
    (failed,) = [m for m in said if m["kind"] == "unloadable"]
    assert failed["step"] == 2
    return str(failed["problem"])


def put(raw: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    target = raw
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return raw


@pytest.mark.parametrize("form", [3, 4])
def test_what_is_mutated_below_is_believed(run, form):
    storage, raw, sha = run
    raw = listed(storage, raw) if form == 3 else raw

    step, state, said = restored(storage, raw)

    assert step == 2
    assert weights_sha256(state.model) == sha
    assert [m["event"] for m in said] == ["restored"]


LIES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("values",), {}, "no training state: its values lack optimizer, groups, states, extra"),
    (("values", "optimizer"), "SGD", "of the optimizer SGD, this job's is AdamW"),
    (("values", "groups"), [{}], "has 1 parameter groups, this job's has 2"),
    (("values", "groups"), [1, 2], "its groups are no objects"),
    (("values", "states"), {"who.weight": {}}, "of a parameter 'who.weight' that is not here"),
    (("values", "states"), {"first.weight": 5}, "its states are no objects"),
    (("values", "states"), {"first.weight": {"exp_avg": 0}}, "of 'first.weight' has values in place of tensors"),
    (("values", "groups", 0, "params"), "all", "the parameters of a group are no names"),
    (("values", "groups", 0, "params"), ["who"], "of a parameter 'who' that is not here"),
    (("values", "began"), [{}], "has 1 parameter groups, this job's has 2"),
    (("values", "coded"), 2, "of a newer version"),
    (("values", "eval"), [{}], "its lists of names are invalid"),
    (("values", "changed"), {"other": 5}, "its lists of names are invalid"),
    (("values", "modules"), {"x": 1}, "the saved states of modules does not fit"),
    (("values", "extra", "more"), {"$": "tensor", "of": {"name": "model/x", "cpu": True}}, "refers to a tensor"),
    (
        ("values", "extra", "more"),
        {"$": "enum", "class": "os.system", "of": "x"},
        "of the class os.system, which is not",
    ),
    (("values", "extra", "more"), {"$": "torch.load", "of": "x"}, "is of the kind torch.load, which is not known"),
    (("values", "extra"), {}, "load_extra_state() does not take the saved values: KeyError: 'updates'"),
    (("values", "loss_scale"), {"factor": "x", "good": 0}, "its loss_scale is invalid"),
    (("families", 0, "tensors", "optimizer/zz"), ["int64", [0]], "is not tiled by its chunks"),
    (("families", 0, "tensors", "model/../x"), ["int64", [0]], "is not a plain relative name"),
    (("families", 0, "tensors", "model/first.weight", 0), "float8", "has the unknown dtype 'float8'"),
    (("families", 0, "tensors", "model/first.weight", 1), [8, 9], "its packs"),
    (("families", 0, "cut"), [[0, 2]], "cannot be cut as"),
    (("families", 0, "cut"), [[7, 1]], "cannot be cut as"),
    (("families",), [], "family 0, which there is not"),
    (("packs",), {}, "has parts in no pack"),
    (("packs", "rank-0000.pack", 0), 1 << 40, "its packs 1099511627776"),
    (("packs", "rank-0000.pack", 2), "0" * 32, "rank-0000.index has other bytes than were written"),
    (("packs", "rank-0000.pack", 1), 7, "rank-0000.index has other bytes than were written"),
    (("packs", "rank-0000.pack", 3, 0, 1), 1, "part 1 of family 0, which there is not"),
    (("packs", "rank-0000.pack", 3, 0, 2), 1, "is not tiled by its chunks"),
    (("packs", "rank-0000.pack", 3, 0, 4), 1, "is not tiled by its chunks"),
    (("packs", "rank-0000.pack", 3, 0, 5), 1, "is not tiled by its chunks: it has no row 1 to cut at"),
    (("packs", "rank-0000.pack", 4), {"../rank-0000.pack": [1, 1]}, "rank-0000.pack refers to"),
    (("packs", "../rank-0000.pack"), [0, 0, "0" * 32, [], {}], "it names the pack '../rank-0000.pack'"),
]


@pytest.mark.parametrize(("path", "value", "said"), LIES, ids=[said[:40] for _, _, said in LIES])
def test_a_state_that_is_none_is_refused_by_name_and_the_one_before_is_used(run, path, value, said):
    storage, raw, sha = run

    assert said in refused(storage, put(raw, path, value), sha)


def test_options_of_a_parameter_group_that_did_not_change_while_training_are_the_job_s(run):
    storage, raw, _ = run

    step, state, _ = restored(storage, put(raw, ("values", "groups", 0, "betas"), None))

    assert step == 2
    assert state.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_nothing_that_reads_checkpoints_runs_a_pickle():
    """Of DCP's, an unpickler that knows data classes alone takes the index; chunks are loaded as weights alone."""
    root = Path(elastic.__file__).parent
    unpickling, loading = [], []
    for file in (
        f for part in ("checkpoint", "snapshot", "run", "worker", "tools") for f in (root / part).glob("*.py")
    ):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                if {n.partition(".")[0] for n in names} & {"pickle", "cloudpickle", "marshal", "shelve", "dill"}:
                    unpickling.append(file.name)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                loading.append((file.name, [ast.unparse(k) for k in node.keywords]))
    assert unpickling == ["dcp.py"]
    assert loading == [("dcp.py", ["map_location='cpu'", "weights_only=True"])]


# ---- memory --------------------------------------------------------------------------------------------------------


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """No more than so many further bytes of address space."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def huge(size: int, piece: int, pack: str) -> dict[str, Any]:
    """A tensor of `size` bytes in pieces, all of which lie at the beginning of one small object."""
    count, blocks = size // piece, max(1, -(-piece // BLOCK_BYTES))
    proof = {"pack": pack, "start": 0, "end": piece, "hashes": ["0" * 32] * blocks, "crcs": [0] * blocks}
    chunks = [{"offsets": [i * piece], "sizes": [piece], **proof} for i in range(count)]
    return {"dtype": "uint8", "shape": [size], "chunks": chunks}


LISTED_LIES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("tensors", "model/nobody"), {"dtype": "int64", "shape": [0], "chunks": []}, "unexpected ['nobody']"),
    (("tensors", "else"), {"dtype": "int64", "shape": [0], "chunks": []}, "'else', which is part of no training state"),
]


@pytest.mark.parametrize(("path", "value", "said"), LISTED_LIES, ids=[said for _, _, said in LISTED_LIES])
def test_tensors_that_are_part_of_no_state_are_refused_by_name(run, path, value, said):
    storage, raw, sha = run

    assert said in refused(storage, put(listed(storage, raw), path, value), sha)


def test_a_tensor_larger_than_the_packs_takes_no_memory_and_what_packs_promise_must_be_there(run):
    storage, raw, sha = run
    lie = put(raw, ("families", 0, "tensors", "optimizer/first.weight/exp_avg", 1), [1 << 36])
    first = raw["packs"]["rank-0000.pack"][0]
    with at_most(512 * MIB):
        assert "its packs" in refused(storage, lie, sha)
        more = first + 4 * ((1 << 36) - math.prod(raw["families"][0]["tensors"]["optimizer/first.weight/exp_avg"][1]))
        said = refused(storage, put(lie, ("packs", "rank-0000.pack", 0), more), sha)

    assert "rank-0000.pack is too short for the tensor 'extra" in said
    assert f"it has {first} of {more} bytes" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw["starts"].pop(), "its lists have different lengths"),
        (lambda raw: raw["tensors"].reverse(), "its tensors are not in order"),
        (lambda raw: raw["tensors"].__setitem__(0, -1), "its tensors are not in order"),
        (lambda raw: raw["starts"].__setitem__(0, raw["ends"][0] + 1), "ends before it begins"),
        (lambda raw: raw["packs"].__setitem__(0, 1), "it names the packs"),
        (lambda raw: raw["elsewhere"].append("../x"), "it names the packs"),
        (lambda raw: raw.update(hashes=raw["hashes"][:-1]), "not as many checksums"),
        (lambda raw: raw.update(hashes="x" * len(raw["hashes"])), "invalid block hashes"),
        (lambda raw: raw.update(crcs="x" * len(raw["crcs"])), "invalid literal for int()"),
        (lambda raw: raw.update(crcs="0" * len(raw["crcs"])), ""),
        (
            lambda raw: raw.update(
                starts=raw["starts"][1:] + raw["starts"][:1], ends=raw["ends"][1:] + raw["ends"][:1]
            ),
            "",
        ),
        (
            lambda raw: raw.update(starts=[s + 1 for s in raw["starts"]], ends=[e + 1 for e in raw["ends"]]),
            "a chunk up to",
        ),
        (lambda raw: raw.update(ends=[e + 1 for e in raw["ends"]]), "lie in the same bytes of rank-0000.pack"),
        (lambda raw: raw.update(format=2), "it has format 2, this version reads 1; install a newer"),
        (lambda raw: raw.clear(), "KeyError"),
        (lambda raw: [raw[c].pop(0) for c in ("tensors", "starts", "ends", "packs")], "not as many checksums"),
    ],
)
def test_an_index_that_lies_is_refused_with_what_is_wrong(run, change, said):
    """Its hash in the manifest is right all the same."""
    storage, raw, sha = run
    path = f"{attempt_folder(2, ATTEMPT)}/rank-0000.index"
    before = storage.read(path)
    lie = json.loads(before)
    change(lie)
    data = json.dumps(lie).encode()
    storage.replace(path, data)
    proof = [len(data), xxhash.xxh3_128_hexdigest(data)]
    changed = put(put(raw, ("packs", "rank-0000.pack", 1), proof[0]), ("packs", "rank-0000.pack", 2), proof[1])
    try:
        if said:
            problem = refused(storage, changed, sha)
            assert said in problem
            assert path in problem
        else:  # crcs alone are for readers of parts; places that are swapped are found by the hashes of blocks
            step, state, _ = restored(storage, changed)
            assert weights_sha256(state.model) == sha
            assert step in (1, 2)
    finally:
        storage.replace(path, before)


@pytest.mark.parametrize("pieces", [1, 4096])
def test_an_optimizer_s_tensor_larger_than_its_object_takes_no_memory(run, pieces):
    """Room for what an optimizer keeps is made as the checkpoint says, as nobody else knows its shape."""
    storage, raw, sha = run
    lie = huge(1 << 36, (1 << 36) // pieces, "rank-0000.pack")
    with at_most(512 * MIB):
        said = refused(storage, put(listed(storage, raw), ("tensors", "optimizer/first.weight/exp_avg"), lie), sha)

    assert "is too short for the tensor 'optimizer/first.weight/exp_avg'" in said or "lie in the same bytes" in said


def test_tensors_that_lie_in_the_same_bytes_are_refused(run):
    """A thousand tensors in one object of a megabyte would take a gigabyte."""
    storage, raw, sha = run
    raw = listed(storage, raw)
    places = raw["tensors"]["model/first.weight"]["chunks"][0]

    said = refused(
        storage,
        put(
            raw,
            ("tensors", "optimizer/first.weight/more"),
            {**raw["tensors"]["model/first.weight"], "chunks": [places]},
        ),
        sha,
    )

    assert "lie in the same bytes of rank-0000.pack" in said


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"[" * 5_000_000 + b"]" * 5_000_000,
        lambda: b'{"a":' * 2_000_000,
        lambda: b"[" + b"[]," * 3_300_000 + b"[]]",
        lambda: b'{"tensors": {' + b",".join(b'"%d": {}' % i for i in range(700_000)) + b"}}",
        lambda: b"[" + b"0," * 5_000_000 + b"0]",
        lambda: b'{"format": 2, "step": ' + b"9" * 10_000_000 + b"}",
        lambda: b'"' + b"\\u0000" * 1_600_000 + b'"',
    ],
    ids=["lists in lists", "objects in objects", "many lists", "many tensors", "many numbers", "a long number", "text"],
)
def test_ten_megabytes_of_anything_take_memory_in_proportion(make):
    data = make()
    with at_most(64 * MIB + 40 * len(data)), pytest.raises(CheckpointError, match=r"^here"):
        parse_manifest(data, "here")


# ---- anything ------------------------------------------------------------------------------------------------------

hostile = st.sampled_from([None, True, -1, 0, 1, 2**40, 1e300, math.nan, "", "../x", "model/first.weight", [], {}, [1]])


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


@settings(max_examples=examples(60, fresh=150), deadline=None)
@given(st.data())
def test_whatever_is_changed_a_restore_ends_with_one_of_the_two_and_says_why(run, data):
    storage, raw, sha = run
    old = data.draw(st.booleans())
    changed = listed(storage, raw) if old else copy.deepcopy(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from(["values", "tensors"] if old else ["values", "families", "packs"]))
        inside = [p for p in _places(changed.get(part), (part,)) if len(p) > 1]
        if not inside:
            continue  # an earlier change took it away
        *path, key = data.draw(st.sampled_from(inside))
        target = changed
        for k in path:
            target = target[k]
        if data.draw(st.booleans()) or not isinstance(target, dict):
            target[key] = data.draw(hostile)
        elif data.draw(st.booleans()):
            del target[key]
        else:
            target[data.draw(st.text(max_size=5))] = target.pop(key)

    step, state, said = restored(storage, changed)

    failed = [m for m in said if m["kind"] == "unloadable"]
    assert (step, len(failed)) in ((2, 0), (1, 1))
    if step == 1:
        assert weights_sha256(state.model) == sha
        assert len(failed[0]["problem"]) < 3000
    assert said[-1]["event"] == "restored"
    assert Committed(step, ATTEMPT).attempt == said[-1]["detail"]["attempt"]
