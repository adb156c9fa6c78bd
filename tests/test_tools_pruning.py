"""`elastic checkpoints prune` and `elastic prune`: what goes, what never goes, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic import cli
from elastic.checkpoint.reader import newest_first
from elastic.run.folder import RunFolder
from elastic.storage import Storage
from elastic.tools.inspecting import unfinished, verify
from elastic.tools.pruning import RunFacts, decide, look_at_runs, prune_runs
from elastic.tools.text import age_text, parse_age, parse_size, size_text
from tests.state_by_hand import load_state, save_state
from tests.test_tools_moving import resume, stopped_at

DAY = 86400.0


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of six steps, in a folder of runs."""
    run = tmp_path_factory.mktemp("stored") / "run"
    for step in range(1, 7):
        save_state(str(run), step, {"model/w": torch.full((50,), float(step))}, attempt=f"1-1-{step}")
    return run


@pytest.fixture
def make(stored: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes runs/NAME: last driven `days` ago, with a result."""

    def make(name: str = "run", days: float = 40, status: str = "finished", loss: float | None = None, **keep: object):
        run = Path(shutil.copytree(stored, tmp_path / "runs" / name))
        folder = RunFolder(Storage(str(run)))
        driven = {"format": 1, "owner": "ann@host-7 (process 41)", "time": time.time() - days * DAY}
        folder.storage.create("claims/000001.json", json.dumps(driven).encode())
        folder.write_status(
            {
                "status": status,
                "heartbeat": time.time() - days * DAY,
                "owner": "ann@host-7 (process 41)",
                "epoch": 1,
            }
        )
        os.utime(run / "status.json", times=(time.time() - days * DAY,) * 2)
        folder.write_config({"job": {"name": "digits"}, "config": {"checkpoint": keep}})
        folder.write_result({"metrics": {} if loss is None else {"eval/loss": loss}})
        return run

    return make


def elastic(*arguments: object, code: int = 0) -> None:
    assert cli.main(list(map(str, arguments))) == code


def steps(run: Path) -> list[int]:
    return [c.step for c in newest_first(Storage(str(run)))]


def orphan(run: Path, step: int, attempt: str) -> Path:
    """What a save leaves behind whose writer died."""
    folder = run / f"checkpoints/step-{step:08d}/{attempt}"
    folder.mkdir(parents=True)
    (folder / "rank-0000.pack").write_bytes(b"half")
    (folder / ".tmp-x").write_bytes(b"half")
    return folder


# ---- one run -------------------------------------------------------------------------------------------------------


def test_it_is_only_shown_until_yes_is_given(make, capsys):
    run = make(keep_last=2)
    before = sorted(p for p in run.rglob("*"))

    elastic("checkpoints", "prune", run)
    shown = capsys.readouterr().out
    elastic("checkpoints", "prune", run, "--json")
    would = json.loads(capsys.readouterr().out)["would_remove"]

    assert [r["step"] for r in would] == [1, 2, 3, 4]
    assert all(r["bytes"] > 200 and r["committed"] for r in would)
    assert "nothing was done, give --yes" in shown
    assert sorted(p for p in run.rglob("*")) == before
    elastic("checkpoints", "prune", run, "--yes")
    assert steps(run) == [6, 5], "what the run itself keeps"


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ([], [6, 5, 4]),
        (["--keep-last", "1"], [6]),
        (["--keep-last", "1", "--keep-every", "2"], [6, 4, 2]),
        (["--keep-last", "9"], [6, 5, 4, 3, 2, 1]),
    ],
)
def test_pins_and_what_is_to_be_kept_stay(make, options, kept):
    run = make()
    elastic("checkpoints", "pin", run, "--step", 1)

    elastic("checkpoints", "prune", run, "--yes", *options)

    assert steps(run) == sorted({*kept, 1}, reverse=True)
    storage = Storage(str(run))
    assert verify(storage, list(newest_first(storage))).damages == ()
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"pins", *(f"step-{s:08d}" for s in {*kept, 1})}


def test_a_cadence_of_the_run_that_is_not_in_steps_is_asked_for(make, capsys):
    run = make(keep_last=1, keep_every="2ep")

    elastic("checkpoints", "prune", run, "--yes", code=2)
    assert (
        "the run keeps every 2ep by --checkpoint.keep-every; give that as --keep-every STEPS" in capsys.readouterr().err
    )
    assert len(steps(run)) == 6
    elastic("checkpoints", "prune", run, "--keep-every", 3, "--yes")
    assert steps(run) == [6, 3]


def test_the_cadence_of_the_run_in_steps_is_kept(make):
    run = make(keep_last=1, keep_every="3st")

    elastic("checkpoints", "prune", run, "--yes")

    assert steps(run) == [6, 3]


def test_unfinished_attempts_of_a_run_that_nobody_drives_go_even_newer_ones(make):
    run = make()
    old, newer = orphan(run, 2, "1-9-9"), orphan(run, 99, "1-9-9")
    assert len(unfinished(Storage(str(run)))) == 2

    elastic("checkpoints", "prune", run, "--keep-last", 9, "--yes")

    assert not old.exists()
    assert not newer.parent.exists()
    assert steps(run) == [6, 5, 4, 3, 2, 1]


def test_what_a_kept_checkpoint_refers_to_stays(tmp_path):
    from elastic.checkpoint.format import Manifest
    from elastic.checkpoint.saver import Saver
    from elastic.checkpoint.tensors import Shard
    from elastic.checkpoint.writer import commit

    storage = Storage(str(tmp_path / "run"))
    frozen, live = torch.ones(9), torch.zeros(9)
    saver = Saver(storage)
    for step in (1, 2):
        live += 1
        saver.start(step, f"1-1-{step}", [Shard.whole("frozen", frozen, frozen=True), Shard.whole("live", live)])
        index = saver.wait(60).index
        assert index is not None
        commit(storage, f"1-1-{step}", Manifest(step, 0, "", {"size": 1}, {}), [index])
        saver.committed(step, f"1-1-{step}")
    saver.close()

    for _ in range(2):
        elastic("checkpoints", "prune", storage.url, "--keep-last", 1, "--yes")

    tensors, manifest = load_state(storage.url)
    assert manifest.step == 2
    assert torch.equal(tensors["frozen"], frozen)
    assert steps(tmp_path / "run") == [2]
    assert [p.name for p in (tmp_path / "run").rglob("step-00000001/*/*")] == ["rank-0000.pack"]


@pytest.mark.parametrize("what", [["checkpoints", "prune"], ["checkpoints", "prune", "--yes"]])
def test_a_live_run_is_left_to_its_server_and_alone_where_that_cannot_be_asked(make, capsys, what):
    run = make(days=0, status="running")

    elastic(*what, run, code=1)

    said = capsys.readouterr().err
    assert "is driven by ann@host-7 (process 41) (heartbeat 0 s ago), which gives no address of its server" in said
    assert len(steps(run)) == 6
    assert os.listdir(run / "claims") == ["000001.json"]


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_prune_lists_nothing_torn_and_the_next_does_the_rest(make, number, tmp_path):
    run = make()
    arguments = ["prune", str(run), "--keep-last", "1", "--yes"]
    process = stopped_at(arguments, {"point": "prune.after_manifest", "step": 3}, tmp_path / "said")

    code = resume(process, number)

    storage = Storage(str(run))
    assert code == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert steps(run) == [6, 5, 4]
    assert len(unfinished(storage)) == 3
    assert verify(storage, list(newest_first(storage))).damages == ()
    if number == signal.SIGINT:
        assert (tmp_path / "said").read_text() == "interrupted; the next prune does the rest\n"
    elastic("checkpoints", *arguments)
    assert steps(run) == [6]
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-00000006"}


# ---- whole runs ----------------------------------------------------------------------------------------------------

FACTS = st.builds(
    RunFacts,
    name=st.uuids().map(str),
    status=st.sampled_from(["finished", "failed", "stopped", "running"]),
    last=st.floats(0, 100 * DAY),
    live=st.none() | st.just("ann (heartbeat 3 s ago)"),
    pinned=st.lists(st.integers(0, 9), max_size=1).map(tuple),
    group=st.sampled_from(["a", "b"]),
    score=st.none() | st.integers(-3, 3).map(float),
    problem=st.none() | st.just("torn"),
)


@given(st.lists(FACTS, unique_by=lambda r: r.name), st.floats(0, 100 * DAY), st.booleans(), st.randoms())
def test_only_old_runs_go_that_are_neither_live_nor_pinned_nor_best(runs, older, keep_final, random):
    now = 100 * DAY

    found = {d.name: d for d in decide(runs, now, older, keep_final=keep_final)}
    random.shuffle(runs)
    again = {d.name: d for d in decide(runs, now, older, keep_final=keep_final)}

    assert found == again
    assert found.keys() == {r.name for r in runs}
    for run in runs:
        d = found[run.name]
        if run.live or run.pinned or run.problem or now - run.last < older:
            assert d.do == "keep"
        elif d.do == "keep":
            assert d.why == f"best of {run.group}"
        else:
            assert d.do == ("keep final" if keep_final else "remove")
    for group in ("a", "b"):
        scores = [r.score for r in runs if r.group == group and r.score is not None]
        if scores:
            assert any(found[r.name].do == "keep" for r in runs if r.group == group and r.score == min(scores))


def test_of_old_runs_those_that_matter_stay_and_a_dry_run_only_tells(make, capsys, tmp_path):
    make("old", loss=0.5)
    make("best", loss=0.1)
    make("pinned", loss=0.7)
    make("young", days=3)
    make("live", days=0, status="running")
    make("crashed", status="running")
    torn = make("torn")
    (torn / "status.json").write_text("{")
    (tmp_path / "runs" / "no run").mkdir()
    elastic("checkpoints", "pin", tmp_path / "runs" / "pinned")
    capsys.readouterr()
    command = ("prune", tmp_path / "runs", "--older-than", "30d")

    elastic(*command, "--json")
    told = {r["name"]: r for r in json.loads(capsys.readouterr().out)["runs"]}
    assert {n for n, r in told.items() if r["do"] == "remove"} == {"old", "crashed"}
    assert told["best"]["why"] == "best of digits by eval/loss (min)"
    assert told["live"]["why"].startswith("live: ann@host-7")
    assert told["pinned"]["why"] == "pinned: step 6"
    assert "cannot be read" in told["torn"]["why"]
    assert len(told) == 7
    elastic(*command, "--yes")

    assert "removed 2 of 7 runs" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"best", "pinned", "young", "live", "torn", "no run"}


def test_with_keep_final_records_and_the_newest_checkpoint_stay(make, tmp_path, capsys):
    run = make()
    orphan(run, 99, "1-9-9")

    elastic("prune", tmp_path / "runs", "--older-than", "30d", "--keep-final", "--yes")

    assert steps(run) == [6]
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"step-00000006"}
    assert {"config.json", "status.json", "result.json"} <= {p.name for p in run.iterdir()}
    assert "1 of 1 runs, but for final checkpoints" in capsys.readouterr().out


def test_a_run_that_somebody_began_to_drive_meanwhile_is_left_alone(make, tmp_path, capsys):
    run = make()
    storage, facts = look_at_runs(str(tmp_path / "runs"))
    decisions = decide(facts, time.time(), DAY, keep_final=False)
    folder = RunFolder(Storage(str(run)))
    folder.write_status({"status": "running", "heartbeat": time.time(), "owner": "bob"})

    assert prune_runs(storage, decisions) == [("run", "it is live now")]

    assert len(steps(run)) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{runs}", "--older-than", "30"], "--older-than is '30'; give a number and a unit of s, min, h, d, w"),
        (["{runs}/run", "--older-than", "30d"], "which is a run; give the folder of runs"),
    ],
)
def test_bad_input_is_refused(make, tmp_path, capsys, arguments, said):
    make()

    elastic("prune", *(a.format(runs=tmp_path / "runs") for a in arguments), "--yes", code=2)

    assert said in capsys.readouterr().err
    assert len(steps(tmp_path / "runs" / "run")) == 6


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("step", [5, -1])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whole_runs_whose_removal_was_interrupted_are_still_runs_and_go_the_next_time(make, number, step, tmp_path):
    make()
    command = ["prune", str(tmp_path / "runs"), "--older-than", "0s", "--yes"]
    process = stopped_at(command, {"point": "prune.run", "step": step}, tmp_path / "said", group=())

    code = resume(process, number)

    assert code == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert len(look_at_runs(str(tmp_path / "runs"))[1]) == 1
    elastic(*command)
    assert list((tmp_path / "runs").iterdir()) == []


# ---- figures -------------------------------------------------------------------------------------------------------


def test_sizes_and_ages_are_read_and_written():
    assert [parse_size("--x", t) for t in ("5GB", "500 MiB", "1.5kB", "7B")] == [5 * 10**9, 500 << 20, 1500, 7]
    assert [parse_age("--x", t) for t in ("30d", "1.5h", "2 w")] == [30 * DAY, 5400, 14 * DAY]
    assert [size_text(s) for s in (0, 1023, 1536, 5 << 30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
    assert [age_text(s) for s in (-3, 59, 600, 7200, 30 * DAY)] == ["0s", "59s", "10min", "2.0h", "30d"]
