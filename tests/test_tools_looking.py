"""`elastic checkpoints ls|show|verify|pin`: what is told of good, damaged and missing objects."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import uuid
from pathlib import Path

import pytest
import torch

from elastic import cli
from elastic.checkpoint import format
from elastic.checkpoint.chunks import all_chunks
from elastic.checkpoint.format import MANIFEST, seal
from elastic.checkpoint.reader import newest_first
from elastic.storage import Storage
from elastic.tools.inspecting import verify
from tests.state_by_hand import save_state


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model/w": torch.randn(40, 5, generator=generator),
        "model/b": torch.arange(7),
        "extra/n": torch.tensor(step),
    }


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "run"
    for step in (3, 6):
        save_state(str(folder), step, tensors(step), {"note": f"after {step}"}, attempt=f"1-2-{step}")
    return folder


@pytest.fixture
def run(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "run"))


def told(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict:
    """What a verb of `elastic checkpoints` prints as JSON."""
    assert cli.main(["checkpoints", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def folder(run: Path, step: int) -> Path:
    return run / format.attempt_folder(step, f"1-2-{step}")


# ---- ls and show ---------------------------------------------------------------------------------------------------


def test_ls_shows_each_checkpoint_and_what_is_unfinished(run, capsys):
    (run / "checkpoints/step-00000009/1-2-9").mkdir(parents=True)
    (run / "checkpoints/step-00000009/1-2-9/rank-0000.pack").write_bytes(b"half")
    assert cli.main(["checkpoints", "pin", str(run), "--step", "3"]) == 0
    capsys.readouterr()

    found = told(capsys, "ls", run)
    assert cli.main(["checkpoints", "ls", str(run), "--verify"]) == 0
    shown = capsys.readouterr().out.splitlines()

    assert [(c["step"], c["generation"], c["attempt"]) for c in found["checkpoints"]] == [
        (6, "1-2", "1-2-6"),
        (3, "1-2", "1-2-3"),
    ]
    assert [(c["pinned"], c["state"]) for c in found["checkpoints"]] == [(False, "complete"), (True, "complete")]
    assert all(c["bytes"] == 40 * 5 * 4 + 7 * 8 + 8 and 0 <= c["age_s"] < 600 for c in found["checkpoints"])
    assert found["unfinished"] == ["checkpoints/step-00000009/1-2-9"]
    assert shown[0].split() == ["step", "generation", "attempt", "size", "age", "pinned", "state"]
    assert [line.split()[-1] for line in shown[1:3]] == ["verified", "verified"]
    assert shown[3] == "1 unfinished: checkpoints/step-00000009/1-2-9"


def test_ls_says_what_is_damaged_and_goes_on(run, capsys):
    (folder(run, 6) / "rank-0000.pack").unlink()
    (folder(run, 3) / MANIFEST).write_bytes(b"{")

    newest, before = told(capsys, "ls", run)["checkpoints"]

    assert (newest["state"], newest["problem"]) == (
        "damaged",
        f"{folder(run, 6) / 'rank-0000.pack'}: is missing".removeprefix(f"{run}/"),
    )
    assert before["state"] == "damaged"
    assert "is not JSON" in before["problem"]


def test_show_tells_values_and_where_each_tensor_lies(run, capsys):
    found = told(capsys, "show", run, "--step", 3)
    assert cli.main(["checkpoints", "show", str(run)]) == 0
    shown = capsys.readouterr().out

    assert found["values"] == {"note": "after 3"}
    entry = found["tensors"]["model/w"]
    assert (entry["dtype"], entry["shape"], entry["bytes"]) == ("float32", [40, 5], 800)
    [chunk] = entry["chunks"]
    data = (run / chunk["object"]).read_bytes()[chunk["start"] : chunk["end"]]
    assert data == tensors(3)["model/w"].numpy().tobytes()
    assert '"after 6"' in shown
    assert any(line.split()[:4] == ["model/w", "float32", "40x5", "800"] for line in shown.splitlines())


# ---- verify --------------------------------------------------------------------------------------------------------


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


def damage(run: Path, how: str) -> tuple[str, str]:
    """Break something of step 6; the object and words that a report must have."""
    pack, manifest = folder(run, 6) / "rank-0000.pack", folder(run, 6) / MANIFEST
    other = folder(run, 3) / "rank-0000.pack"
    if how == "flipped":
        flip(pack, 801)
        return "rank-0000.pack", "has other bytes than were written"
    if how == "truncated":
        pack.write_bytes(pack.read_bytes()[:-1])
        return "rank-0000.pack", "bytes of at least"
    if how == "deleted":
        pack.unlink()
        return "rank-0000.pack", "is missing"
    if how == "swapped":
        a, b = pack.read_bytes(), other.read_bytes()
        pack.write_bytes(b)
        other.write_bytes(a)
        return "rank-0000.pack", "has other bytes than were written"
    if how == "manifest flipped":
        flip(manifest, len(manifest.read_bytes()) // 2)
        return MANIFEST, ""
    if how == "manifest of another step":
        manifest.write_bytes((folder(run, 3) / MANIFEST).read_bytes())
        return MANIFEST, "is of step 3"
    raw = json.loads(manifest.read_bytes())  # of another attempt of the step, which two worlds may have written
    del raw["checksum"]
    raw["world"]["generation"] = "1-7"
    manifest.write_bytes(seal(json.dumps(raw).encode()))
    return MANIFEST, "is of world 1-7"


@pytest.mark.parametrize(
    "how",
    ["flipped", "truncated", "deleted", "swapped", "manifest flipped", "manifest of another step", "manifest moved"],
)
def test_verify_names_the_damaged_object_and_exits_1(run, capsys, how):
    name, words = damage(run, how)

    found = told(capsys, "verify", run, code=1)
    assert cli.main(["checkpoints", "verify", str(run), "--step", "6"]) == 1
    shown = capsys.readouterr().out

    mine = [d for d in found["damages"] if d["step"] == 6]
    assert mine
    assert {d["object"] for d in mine} == {f"{format.attempt_folder(6, '1-2-6')}/{name}"}
    assert all(words in d["problem"] for d in mine)
    assert {d["step"] for d in found["damages"]} == ({3, 6} if how == "swapped" else {6})
    assert f"{format.attempt_folder(6, '1-2-6')}/{name}" in shown
    assert cli.main(["checkpoints", "verify", str(run), "--step", "3"]) == (1 if how == "swapped" else 0)


def test_verify_reads_each_block_once_and_names_the_one_that_is_damaged(monkeypatch):
    monkeypatch.setattr(format, "BLOCK_BYTES", 64)
    url = f"memory://verify-{uuid.uuid4().hex}"
    whole = torch.arange(100, dtype=torch.float32)
    manifest = save_state(url, 1, {"a": whole, "b": torch.ones(3)})
    storage = Storage(url)
    committed = list(newest_first(storage))
    [chunk] = all_chunks(storage, committed[0].folder, manifest)["a"].chunks
    seen: list[int] = []

    good = verify(storage, committed, lambda total: seen.append)
    for number in range(len(chunk.hashes)):
        path = f"{committed[0].folder}/rank-0000.pack"
        data = storage.read(path)
        place = chunk.start + number * 64 + 5
        storage.replace(path, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        [found] = verify(storage, committed).damages
        assert (found.start, found.end, found.tensor) == (
            chunk.start + number * 64,
            min(chunk.start + number * 64 + 64, chunk.end),
            "a",
        )
        storage.replace(path, data)

    assert (good.blocks, good.bytes, good.damages) == (8, 412, ())
    assert sum(seen) == 412
    storage.remove("")


def test_what_a_live_run_prunes_meanwhile_is_not_damaged(run):
    storage = Storage(str(run))
    committed = list(newest_first(storage))

    def prune(total: int):
        storage.remove(f"{committed[1].folder}/{MANIFEST}")
        storage.remove(committed[1].folder)
        return lambda done: None

    found = verify(storage, committed, prune)

    assert (found.checkpoints, found.damages) == (1, ())


def test_progress_is_drawn_on_a_terminal_and_nowhere_else(run, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert cli.main(["checkpoints", "verify", str(run)]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert cli.main(["checkpoints", "verify", str(run)]) == 0

    assert "verifying" in terminal.getvalue()
    assert capsys.readouterr().out.count("all as written") == 1


# ---- pins, and bad input -------------------------------------------------------------------------------------------


def test_pins_are_set_and_taken_away(run, capsys):
    assert told(capsys, "pin", run) == {"format": 1, "step": 6, "pinned": True}
    assert told(capsys, "pin", run, "--step", 6)["pinned"], "twice is once"
    assert [c["pinned"] for c in told(capsys, "ls", run)["checkpoints"]] == [True, False]
    assert told(capsys, "pin", run, "--step", 6, "--unpin") == {"format": 1, "step": 6, "pinned": False}
    assert not any(c["pinned"] for c in told(capsys, "ls", run)["checkpoints"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ls", "{above}"], "is no run; give one of the runs in it"),
        (["ls", "{above}/nothing"], "is no run; give the folder of one"),
        (["ls", "warp://x/run"], "URL is 'warp://x/run', whose scheme 'warp' is not known"),
        (["show", "{run}", "--step", "4"], "--step is 4, but .* has checkpoints of the steps 3, 6; give one of them"),
        (["verify", "{run}", "--step", "4"], "--step is 4"),
        (["pin", "{run}", "--unpin"], "--step is 6, which is not pinned .pinned: none.; give one that is"),
        (["export", "{run}", "{above}/taken.safetensors"], "OUT is .*, which exists and is left as it is"),
        (["export", "{run}", "{above}"], "OUT is .*, which exists and is left as it is"),
        (["export", "{run}", "{above}/new", "--dtype", "int8"], "--dtype is 'int8'; give one of float32"),
        (["export", "{run}", "{above}/new", "--full", "--dtype", "float16"], "leave --dtype or --full out"),
        (["export", "{run}", "{above}/new", "--max-shard-size", "5"], "--max-shard-size is '5'; give a number and a"),
        (["export", "{run}", "{above}/a.safetensors", "--max-shard-size", "5GB"], "leave it out"),
        (["export", "{run}", "{above}/a.safetensors", "--format", "dcp"], "but dcp is a folder"),
        (["import", "{run}", "{above}/nothing"], "SOURCE is .*, which cannot be read"),
        (
            ["import", "{run}", "{above}/weights.safetensors", "--step", "6"],
            "committed checkpoint of step 6; give another",
        ),
        (["import", "{run}", "{above}/weights.safetensors", "--step", "-1"], "--step is -1; give 0 or more"),
        (["import", "{run}", "{above}/weights.safetensors", "--prefix", "x."], "--prefix is 'x.', but no tensor of"),
        (["prune", "{run}", "--keep-last", "0"], "--keep-last is 0; give 1 or more"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(run, capsys, arguments, said):
    from safetensors.torch import save_file

    (run / "config.json").write_text(json.dumps({"format": 1, "config": {"checkpoint": {}}}))
    (run.parent / "taken.safetensors").write_bytes(b"")
    save_file({"w": torch.ones(2)}, run.parent / "weights.safetensors")
    before = sorted(run.parent.rglob("*"))

    code = cli.main(["checkpoints", *(a.format(run=run, above=run.parent) for a in arguments)])

    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(said, error), error
    assert sorted(run.parent.rglob("*")) == before, "nothing was written"
