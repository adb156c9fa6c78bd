"""`elastic checkpoints export|import`: files that other programs read and write, and runs that go on from them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from elastic import cli, fault
from elastic.checkpoint.reader import newest_first
from elastic.errors import CheckpointError, ConfigError
from elastic.run.folder import RunFolder
from elastic.storage import Storage
from elastic.tools import importing
from elastic.tools.dcp import open_dcp
from elastic.tools.inspecting import verify
from elastic.tools.output import Output, Stream
from tests import forked
from tests.state_by_hand import load_state, save_state
from tests.tiny_jobs import Everything, Plain

WEIGHTS = {
    "a.weight": torch.randn(30, 7),
    "a.bias": torch.randn(7, dtype=torch.float64),
    "half": torch.randn(5).bfloat16(),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "mask": torch.tensor([True, False, True]),
}
STATE = {
    **{f"model/{name}": tensor for name, tensor in WEIGHTS.items()},
    "optimizer/a.weight/exp_avg": torch.randn(30, 7),
    "extra/average": torch.randn(2, 2).to(torch.complex128),
}
VALUES = {"optimizer": "AdamW", "groups": [{"betas": [0.9, 0.95]}], "states": {}, "extra": {"updates": 4}}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("moving") / "run")
    save_state(url, 4, STATE, VALUES)
    return url


def elastic(*arguments: object) -> None:
    assert cli.main(["checkpoints", *map(str, arguments)]) == 0


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in wanted.items()
    )


# ---- export --------------------------------------------------------------------------------------------------------


def test_weights_are_exported_to_one_file_that_safetensors_loads(stored, tmp_path, capsys):
    elastic("export", stored, tmp_path / "w.safetensors", "--json")

    assert same(load_file(tmp_path / "w.safetensors"), WEIGHTS)
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["tensors"], told["files"]) == (4, len(WEIGHTS), ["w.safetensors"])
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_a_folder_is_cut_at_the_shard_size_and_has_an_index(stored, tmp_path):
    elastic("export", stored, tmp_path / "cut", "--max-shard-size", "100B")
    elastic("export", stored, tmp_path / "whole")

    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "cut").glob("*.safetensors"))
    count = len(files)
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    assert 2 < count < len(WEIGHTS)
    merged = {}
    for file in files:
        part = load_file(tmp_path / "cut" / file)
        assert sum(t.nbytes for t in part.values()) <= 100 or len(part) == 1
        assert all(index["weight_map"][name] == file for name in part)
        merged |= part
    assert same(merged, WEIGHTS)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in WEIGHTS.values())
    assert os.listdir(tmp_path / "whole") == ["model.safetensors"]
    assert same(load_file(tmp_path / "whole" / "model.safetensors"), WEIGHTS)


def test_floating_point_weights_are_converted_and_others_left_alone(stored, tmp_path):
    elastic("export", stored, tmp_path / "w.safetensors", "--dtype", "bfloat16")

    wanted = {n: t.bfloat16() if t.is_floating_point() else t for n, t in WEIGHTS.items()}
    assert same(load_file(tmp_path / "w.safetensors"), wanted)


def test_what_safetensors_cannot_hold_is_refused_by_name(stored, tmp_path, capsys):
    assert cli.main(["checkpoints", "export", stored, str(tmp_path / "w.safetensors"), "--full"]) == 2

    assert "tensor 'extra/average' is complex128" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_dcp_export_is_loaded_by_torch_under_its_own_names(stored, tmp_path):
    elastic("export", stored, tmp_path / "dcp", "--format", "dcp")

    mine = {name: torch.zeros_like(tensor) for name, tensor in WEIGHTS.items()}
    moments = {"a.weight": {"exp_avg": torch.zeros(30, 7)}}
    dcp.load({"model": mine, "optimizer": {"state": moments}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert same(mine, WEIGHTS)
    assert torch.equal(moments["a.weight"]["exp_avg"], STATE["optimizer/a.weight/exp_avg"])


def test_a_dcp_export_becomes_a_torch_save_file(stored, tmp_path):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    elastic("export", stored, tmp_path / "dcp", "--format", "dcp")
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")

    assert same(torch.load(tmp_path / "whole.pt", weights_only=True)["model"], WEIGHTS)


def test_a_damaged_checkpoint_is_not_exported_and_nothing_is_left(tmp_path, capsys):
    save_state(str(tmp_path / "run"), 1, {"model/w": torch.ones(9)})
    [pack] = (tmp_path / "run").rglob("*.pack")
    pack.write_bytes(b"\1" + pack.read_bytes()[1:])

    for out in ("w.safetensors", "folder"):
        assert cli.main(["checkpoints", "export", str(tmp_path / "run"), str(tmp_path / out)]) == 1
        assert "has other bytes than were written, in the block at 0" in capsys.readouterr().err

    assert os.listdir(tmp_path) == ["run"]


def test_a_stream_is_uploaded_in_parts_and_read_in_batches(stored, tmp_path, monkeypatch):
    monkeypatch.setattr("elastic.tools.output.PART_BYTES", 64)
    monkeypatch.setattr("elastic.tools.exporting.BATCH_BYTES", 90)
    url = f"memory://parts-{uuid.uuid4().hex}"

    elastic("export", stored, tmp_path / "w.safetensors")
    elastic("export", stored, f"{url}/w.safetensors")

    assert same(load_file(tmp_path / "w.safetensors"), WEIGHTS)
    assert Storage(url).read("w.safetensors") == (tmp_path / "w.safetensors").read_bytes()
    Storage(url).remove("")


# ---- import --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dcp", "safetensors"])
def test_a_full_export_comes_back_as_it_was(tmp_path, kind):
    state = {name: t for name, t in STATE.items() if kind == "dcp" or t.dtype != torch.complex128}
    save_state(str(tmp_path / "run"), 4, state, VALUES)

    elastic("export", tmp_path / "run", tmp_path / "out", "--full", "--format", kind, *SHARDS[kind])
    elastic("import", tmp_path / "new", tmp_path / "out")

    tensors, manifest = load_state(str(tmp_path / "new"))
    assert same(tensors, state)
    assert (manifest.step, manifest.values) == (4, VALUES)
    storage = Storage(str(tmp_path / "new"))
    assert verify(storage, list(newest_first(storage))).damages == ()


SHARDS = {"dcp": [], "safetensors": ["--max-shard-size", "200B"]}


def test_foreign_safetensors_and_dcp_are_imported_as_weights(tmp_path):
    weights = {"net.w": torch.randn(4, 3), "net.b": torch.randn(3), "other": torch.ones(1)}
    save_file(weights, tmp_path / "w.safetensors")
    dcp.save({"model": weights}, checkpoint_id=tmp_path / "dcp", no_dist=True)

    elastic("import", tmp_path / "one", tmp_path / "w.safetensors", "--prefix", "net.")
    elastic("import", tmp_path / "two", tmp_path / "dcp", "--prefix", "model.", "--step", "70")

    one, first = load_state(str(tmp_path / "one"))
    two, second = load_state(str(tmp_path / "two"))
    assert same(one, {"model/w": weights["net.w"], "model/b": weights["net.b"]})
    assert same(two, {f"model/{n}": t for n, t in weights.items()})
    assert (first.step, second.step) == (0, 70)


def test_a_live_run_is_left_alone_and_its_owner_named(tmp_path, stored, capsys):
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    folder = RunFolder(Storage(str(tmp_path / "run")))
    folder.write_status({"status": "running", "heartbeat": time.time(), "owner": "ann@host-7 (process 41)"})

    assert cli.main(["checkpoints", "import", str(tmp_path / "run"), str(tmp_path / "w.safetensors")]) == 2

    assert "is live, driven by ann@host-7 (process 41) (heartbeat 0 s ago)" in capsys.readouterr().err
    assert folder.storage.names() == ["status.json"]


def test_an_import_is_fenced_by_who_begins_to_drive_the_run(tmp_path, monkeypatch, capsys):
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    folder = RunFolder(Storage(str(tmp_path / "run")))
    written = Stream.__exit__

    def drive(self, *arguments):
        written(self, *arguments)
        with pytest.raises(ConfigError, match=r"is being driven by .*which claimed it 0 s ago"):
            folder.claim(take_over=False)
        folder.claim(take_over=True)

    monkeypatch.setattr(Stream, "__exit__", drive)
    assert cli.main(["checkpoints", "import", str(tmp_path / "run"), str(tmp_path / "w.safetensors")]) == 1

    assert "was claimed by another command (claim 2)" in capsys.readouterr().err
    assert list(newest_first(folder.storage)) == []
    assert folder.storage.names("checkpoints") == [], "nothing is left over"


class Hostile:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_no_pickle_of_a_dcp_folder_is_ever_run(tmp_path):
    dcp.save({"w": torch.ones(4)}, checkpoint_id=tmp_path / "a", no_dist=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    [data] = (tmp_path / "a").glob("*.distcp")
    data.write_bytes(pickle.dumps(Hostile(tmp_path / "ran")).ljust(data.stat().st_size, b"\0"))

    with pytest.raises(
        ConfigError, match=r"\.metadata wants posix\.mkdir, which is not one of the format's data classes"
    ):
        importing.open_source(str(tmp_path / "b"))
    with pytest.raises(CheckpointError, match="'w' cannot be read"):
        importing.import_checkpoint(str(tmp_path / "run"), str(tmp_path / "a"))

    assert not (tmp_path / "ran").exists()
    assert list(newest_first(Storage(str(tmp_path / "run")))) == []


@pytest.mark.parametrize("lie", ["size", "offset", "missing", "path", "chunk", "truncated", "class"])
def test_dcp_metadata_that_lies_is_refused(tmp_path, lie):
    dcp.save({"w": torch.ones(4, 2)}, checkpoint_id=tmp_path / "a", no_dist=True)
    file = tmp_path / "a" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    entry, [index] = metadata.state_dict_metadata["w"], list(metadata.storage_data)
    if lie == "size":  # would take 8 TiB of memory
        entry.size = torch.Size([1 << 40, 2])
        entry.chunks[0].sizes = entry.size
    elif lie == "offset":
        metadata.storage_data[index].offset += 100_000
    elif lie == "missing":
        metadata.storage_data.clear()
    elif lie == "path":
        metadata.storage_data[index].relative_path = "../secret"
    elif lie == "chunk":
        entry.chunks[0].offsets = torch.Size([1, 0])
    elif lie == "class":
        metadata = ["no metadata"]
    data = pickle.dumps(metadata)
    file.write_bytes(data[:-9] if lie == "truncated" else data)

    with pytest.raises(CheckpointError):
        open_dcp(Storage(str(tmp_path / "a"))).tensor("w")


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.parametrize("kind", ["dcp", "safetensors"])
def test_a_run_exported_and_imported_elsewhere_goes_on_and_ends_with_the_undisturbed_hash(tmp_path, undisturbed, kind):
    options = {"eval__every": "3st"}
    forked.train(Everything(), forked.configure(tmp_path, "one", run__stop_after="5st", **options), workers=2)
    elastic("export", tmp_path / "one", tmp_path / "out", "--full", "--format", kind)
    elastic("import", tmp_path / "two", tmp_path / "out")

    ran = forked.train(Everything(), forked.configure(tmp_path, "two", **options), workers=1)

    assert ran.failure is None
    assert [(e["step"], e["detail"]["rung"]) for e in ran.events("restored")] == [(5, "checkpoint")]
    assert ran.sha == undisturbed.sha


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.usefixtures("fork_server")
def test_a_run_is_resumed_in_another_dtype_where_that_is_asked_for(tmp_path):
    forked.train(Halved(), forked.configure(tmp_path, "run", run__stop_after="4st"), workers=2)
    change = {"run__allow_change": ("job.dtype",)}

    refused = forked.train(Halved(dtype="bfloat16"), forked.configure(tmp_path, "run", **change), workers=1)
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    for strategy, name in (("ddp", "run"), ("fsdp", "cut")):
        options = {**change, "checkpoint__convert": True, "parallel__strategy": strategy}
        ran = forked.train(Halved(dtype="bfloat16"), forked.configure(tmp_path, name, **options), workers=2)
        assert ran.failure is None
        assert [e["step"] for e in ran.events("restored") if e["detail"]["rung"] == "checkpoint"] == [4]
        assert {v[0] for k, v in ran.state().items() if k.startswith("model/")} == {torch.bfloat16}
        assert {v[0] for k, v in ran.state().items() if k.endswith("/exp_avg")} == {torch.bfloat16}

    assert refused.failure is not None
    assert (
        "is float32 (16,), this one is bfloat16 (16,); start another run, or give --checkpoint.convert"
        in refused.failure
    )


@dataclass
class Halved(Plain):
    """Parameters in a dtype that is an option."""

    dtype: str = "float32"

    def model(self):
        return super().model().to(getattr(torch, self.dtype))

    def loss(self, model, batch):
        features, labels, ids = batch
        return super().loss(model, (features.to(getattr(torch, self.dtype)), labels, ids))


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.usefixtures("fork_server")
def test_imported_weights_start_a_run_as_initial_weights_do(tmp_path):
    torch.manual_seed(7)
    weights = {
        n: torch.randn_like(t) if t.is_floating_point() else t for n, t in Everything().model().state_dict().items()
    }
    del weights["tied.weight"]  # the checkpoint has it by its other name
    save_file({n: t.contiguous() for n, t in weights.items()}, tmp_path / "w.safetensors")
    elastic("import", tmp_path / "imported", tmp_path / "w.safetensors")
    options = {"checkpoint__init_from": str(tmp_path / "w.safetensors"), "run__stop_after": "3st"}

    given = forked.train(Everything(), forked.configure(tmp_path, "given", **options), workers=1)
    imported = forked.train(Everything(), forked.configure(tmp_path, "imported", run__stop_after="3st"), workers=2)

    assert (given.failure, imported.failure) == (None, None)
    assert [e["step"] for e in imported.events("restored")] == [0, 0]
    assert imported.sha == given.sha


# ---- interruptions -------------------------------------------------------------------------------------------------


def _verb(arguments: list[str], plan: list[dict[str, object]], said: Path | None, group: tuple[str, ...]) -> None:
    if said is not None:
        sys.stderr = said.open("w")
    os.environ["ELASTIC_FAULTS"] = json.dumps(plan)
    fault.read_plan()
    sys.exit(cli.main([*group, *arguments]))


def _state_of(pid: int) -> str:
    """The kernel's letter for what a process does; empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""


def stopped_at(
    arguments: list[str], plan: dict[str, object], said: Path | None = None, group: tuple[str, ...] = ("checkpoints",)
):
    """A process that carries out a verb and has stopped itself at the planned point; `said` gets its errors."""
    process = forked._context.Process(target=_verb, args=(arguments, [{"do": "stop", **plan}], said, group))
    process.start()
    deadline = time.monotonic() + forked.WAIT_S
    while _state_of(process.pid) != "T":
        assert process.exitcode is None, f"it ended before {plan}"
        assert time.monotonic() < deadline, f"it did not come to {plan} within {forked.WAIT_S} s"
        time.sleep(0.01)
    return process


def resume(process, number: int) -> int:
    """Send a signal to the stopped process, let it go on, and wait for its end; its exit code."""
    os.kill(process.pid, number)
    os.kill(process.pid, signal.SIGCONT)
    process.join(forked.WAIT_S)
    code = process.exitcode
    assert code is not None
    return code


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("at", [{"point": "output.file", "step": 1}, {"point": "output.before_complete"}])
def test_an_interrupted_export_leaves_nothing_that_looks_like_one(stored, tmp_path, number, at):
    out, said = tmp_path / "to" / "out", tmp_path / "said"
    process = stopped_at(["export", stored, str(out), "--max-shard-size", "100B"], at, said)
    [half] = out.parent.iterdir()
    assert half.name.startswith(".tmp-out-")

    code = resume(process, number)

    assert not out.exists()
    if number == signal.SIGKILL:
        elastic("export", stored, out)  # what is left of the other is in nobody's way
        assert same(load_file(out / "model.safetensors"), WEIGHTS)
        return
    assert code == 130
    assert said.read_text() == "interrupted; nothing of it is left\n"
    assert list(out.parent.iterdir()) == []


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize(
    ("point", "code", "steps"),
    [
        ("output.before_complete", 130, []),
        ("checkpoint.before_manifest", 0, [0]),
        ("checkpoint.after_manifest", 0, [0]),
    ],
)
def test_an_interrupted_import_is_committed_whole_or_not_at_all(tmp_path, point, code, steps):
    save_file({"w": torch.ones(5)}, tmp_path / "w.safetensors")
    run = tmp_path / "run"

    found = resume(stopped_at(["import", str(run), str(tmp_path / "w.safetensors")], {"point": point}), signal.SIGINT)

    storage = Storage(str(run))
    assert found == code
    assert [c.step for c in newest_first(storage)] == steps
    assert verify(storage, list(newest_first(storage))).damages == ()
    assert bool(list(run.rglob("*.pack"))) == bool(steps)


def write_half(url: str, size: int) -> None:
    """An output that is interrupted in the middle of its second object."""
    with Output(url, folder=True, option="OUT") as output:
        output.put("one", b"1")
        with output.stream("two", size) as stream:
            stream.write(memoryview(bytes(size * 2 // 3)))
            raise KeyboardInterrupt


def test_an_output_in_object_storage_that_is_interrupted_is_removed():
    url = f"memory://fails-{uuid.uuid4().hex}"
    with pytest.raises(KeyboardInterrupt):
        write_half(f"{url}/out", 9)

    assert Storage(url).names("out") == []


# ---- S3 ------------------------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.long
def test_everything_works_on_s3(bucket, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("elastic.tools.output.PART_BYTES", 5 << 20)
    state = {"model/big": torch.randn(3 << 19), "model/w": torch.ones(3)}
    url = f"{bucket}/runs/a"
    save_state(url, 4, state, VALUES)
    save_state(url, 2, state, VALUES)

    elastic("ls", url, "--verify")
    elastic("verify", url)
    elastic("export", url, f"{bucket}/out/w.safetensors")
    elastic("export", url, f"{bucket}/dcp", "--format", "dcp")
    elastic("import", f"{bucket}/runs/b", f"{bucket}/dcp")
    elastic("import", f"{bucket}/runs/c", f"{bucket}/out/w.safetensors")
    elastic("prune", url, "--keep-last", "1", "--yes")
    elastic("pin", url)
    out = Storage(f"{bucket}/out")
    (tmp_path / "w.safetensors").write_bytes(out.read("w.safetensors"))
    with pytest.raises(KeyboardInterrupt):
        write_half(f"{bucket}/half", 9 << 20)

    wanted = {n.removeprefix("model/"): t for n, t in state.items()}
    assert same(load_file(tmp_path / "w.safetensors"), wanted)
    assert same(load_state(f"{bucket}/runs/b")[0], state)
    assert same(load_state(f"{bucket}/runs/c")[0], state)
    assert [c.step for c in newest_first(Storage(url))] == [4]
    assert Storage(f"{bucket}/half").names() == []
    uploads = out.fs.call_s3("list_multipart_uploads", Bucket=bucket.removeprefix("s3://"))
    assert uploads.get("Uploads", []) == []
    cli.main(["prune", f"{bucket}/runs", "--older-than", "0s", "--yes"])
    left = {
        name.removeprefix(f"{bucket}/runs/").split("/")[0]
        for name in map("s3://{}".format, out.fs.find(f"{bucket}/runs"))
    }
    assert left == {"a"}, "a pinned one stays"
    assert "pinned: step 4" in capsys.readouterr().out
