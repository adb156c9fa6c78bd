"""How a run is looked at: its ledger is followed while it is written, its course is put together, and shown."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic import cli
from elastic.observe.history import History
from elastic.observe.ledger import METRICS, Follower, LedgerFile, read_records, to_line
from elastic.observe.thinning import BUCKETS
from elastic.storage import Storage

STORED = Path(__file__).parent / "stored_runs" / "format-3" / "exact"
STEPS = 100_000
MOST_S = 3.0  # of a processor, for all of them; 0.8 where nobody else computes


def row(step: int, generation: str = "1-1", **more: Any) -> dict[str, Any]:
    told = {"step": step, "time": 100.0 + step, "generation": generation, "sample_hash": f"{step:x}", "loss": 1 / step}
    return {**told, "world_size": 2, "samples": 8 * step, "step_s": 1.0, "compute_s": 0.75, "sync_s": 0.25, **more}


def event(kind: str, at: float, **more: Any) -> dict[str, Any]:
    return {"kind": kind, "time": at, "generation": "1-0", **more}


def formed(size: int, at: float, generation: str = "1-1") -> dict[str, Any]:
    return event("world_formed", at, generation=generation, detail={"size": size})


def history(rows: list[dict[str, Any]] = [], events: list[dict[str, Any]] = []) -> History:  # noqa: B006
    found = History()
    found.add_rows(rows)
    found.add_events(events)
    return found


# ---- following -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["{folder}/run", "memory://follow/run"])
def test_a_ledger_is_followed_through_a_torn_tail_and_a_compaction_each_record_once(tmp_path: Path, url: str):
    storage = Storage(url.format(folder=tmp_path))
    ledger, reader = LedgerFile(storage, METRICS, 1), Follower(storage, METRICS)
    assert reader.new() == []
    seen: list[int] = []
    for step in range(1, 7):
        ledger.add(row(step))
        ledger.flush()
        if step % 2:
            seen += [r["step"] for r in reader.new()]
    ledger.compact()
    seen += [r["step"] for r in reader.new()]
    whole = storage.read(METRICS)
    line = to_line({"format": 1, **row(7)}).encode()
    for end in (10, len(line)):  # somebody is in the middle of writing it
        storage.replace(METRICS, whole + line[:end])
        seen += [r["step"] for r in reader.new()]

    assert seen == [1, 2, 3, 4, 5, 6, 7]
    if not storage.local:
        fsspec.filesystem("memory").rm("/follow", recursive=True)


# ---- the course ----------------------------------------------------------------------------------------------------


def test_steps_that_were_done_again_count_once_and_late_rows_of_a_given_up_world_not_at_all():
    found = history([row(1), row(2), row(3, loss=9.0), row(3, "1-2", loss=0.5), row(3, loss=9.0), row(4, "1-2")])
    found.add_recent([row(3, "1-2"), row(4, "1-2"), row(5, "1-2"), row(7, "1-2")])  # 6 is on its way in storage

    view = found.view()
    assert view["steps"] == [1, 2, 3, 4, 5]
    assert view["curves"]["loss"]["mean"][2] == 0.5
    assert (view["redone"], view["totals"]["compute"]) == (1, 5 * 0.75)


def test_what_passed_between_two_commands_is_no_time_of_the_run():
    events = [event("run_started", 100.0), formed(2, 101.0), event("run_finished", 110.0, detail="stopped")]
    events += [event("run_started", 5000.0), formed(3, 5002.0, "2-1"), event("run_finished", 5010.0)]
    found = history([row(s, time=100.0 + s) for s in range(1, 9)] + [row(9, "2-1", time=5005.0)], events)

    view = found.view()
    assert view["elapsed_s"] == 20.0
    assert view["worlds"] == [[1.0, 2, "1-1"], [10.0, 0, "1-0"], [12.0, 3, "2-1"], [20.0, 0, "1-0"]]
    assert view["stalls"] == [], "nobody drove it"
    assert view["marks"] == [], "another command is no worker that joined"


def test_a_loss_a_joiner_and_a_drained_node_are_marked_and_their_stalls_explained():
    events = [
        event("run_started", 100.0),
        formed(3, 100.5),
        event("member_lost", 103.2, generation="1-1", member="w1-1", detail="connection lost"),
        formed(2, 103.4, "1-2"),
        formed(3, 106.1, "1-3"),
        event("notice", 107.0, node="n2", detail="goes away"),
        event("handed_over", 108.1, member="w1-0"),
        formed(3, 108.2, "1-4"),
    ]
    rows = [row(s) for s in (1, 2, 3)] + [row(s, "1-2") for s in (4, 5)]
    rows += [row(6, "1-3", time=110.0)]

    view = history(rows, events).view()

    assert [(m["word"], m["tone"], m["elapsed"]) for m in view["marks"]] == [
        ("worker lost", "bad", 3.2),
        ("1 joined", "good", 6.1),
        ("node goes away", "warn", 7.0),
        ("handed over", "warn", 8.1),
    ]
    assert [size for _, size, _ in view["worlds"]] == [3, 0, 2, 3, 3]
    assert [(s["step"], s["why"]) for s in view["stalls"]] == [
        (4, "member lost w1-1"),
        (6, "goes away, handed over w1-0"),
    ]


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
NAMES = st.sampled_from([*row(1), *event("", 0.0), "detail", "member", "node", "tokens", "data_s", "eval/x", "mine"])
KINDS = st.sampled_from(["world_formed", "member_lost", "notice", "scaled", "run_started", "parked"])


class OneByOne(History):
    def _goes_on(self, rows: list[dict[str, Any]]) -> bool:
        return False


@given(
    st.lists(st.tuples(st.integers(-1, 3), st.sampled_from(["1-1", "1-2", 7]), st.dictionaries(NAMES, ODD, max_size=1)))
)
def test_rows_that_are_looked_at_together_give_what_each_of_them_gives(jumps):
    rows, step = [], 0
    for jump, generation, odd in jumps:
        step = max(1, step + (jump if jump < 2 else 1))
        rows.append({**row(step), "generation": generation, **(odd if jump == 2 else {})})

    views = []
    for found, parts in ((OneByOne(), [rows]), (History(), [rows]), (History(), [[r] for r in rows])):
        for part in parts:
            found.add_rows(part)
        views.append(json.dumps(found.view()))
    assert views[0] == views[1] == views[2]


@given(st.lists(st.dictionaries(NAMES, ODD)), st.lists(st.tuples(st.dictionaries(NAMES, ODD), KINDS)))
def test_whatever_stands_in_a_ledger_gives_a_view_of_strict_json(rows, events):
    """Others may write into a folder: what is no row or event is left out, and what is odd in one is."""
    rows = [{**row(i), **odd} for i, odd in enumerate(rows, start=1)]
    events = [{**event(kind, float(i)), **odd} for i, (odd, kind) in enumerate(events)]

    text = json.dumps(history(rows, events).view(), allow_nan=False)

    assert len(text) < 100_000


# ---- the report ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORED, tmp_path / "mine"))


def test_a_report_is_told_written_as_one_page_and_drawn(run: Path, tmp_path: Path, capsys):
    page, plots = tmp_path / "out" / "page.html", tmp_path / "plots"
    with (run / METRICS).open("a") as ledger:
        ledger.write('{"format": 1, "step": 99, "ti')  # a torn tail

    assert cli.main(["report", str(run), "--html", str(page), "--plots", str(plots)]) == 0

    told = capsys.readouterr().out
    assert "step 4 of 8" in told
    assert "where steps took their time" in told
    assert re.search(r"^waiting for data +\d+\.\d% +< 2 % +poor +let other processes fetch", told, re.MULTILINE)
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!#)|https?://(?!www\.w3\.org/2000/svg)|@import|url\((?!#)", text)
    assert sorted(p.name for p in plots.iterdir()) == ["account.png", "overview.png", "steps.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in plots.iterdir())
    assert not list(run.glob("*.png")), "what only looks writes nothing into the run"


def test_the_data_of_a_page_cannot_end_the_element_that_it_is_in(run: Path, tmp_path: Path, capsys):
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "message": "</script><script>alert(1)</script>"}))

    assert cli.main(["report", str(run), "--html", str(tmp_path / "page.html")]) == 0

    text = (tmp_path / "page.html").read_text()
    assert "alert(1)" in text
    assert "<script>alert" not in text


def test_a_run_of_many_steps_is_reported_at_once(run: Path, capsys):
    told = next(r for r in read_records(Storage(str(STORED)), METRICS) if "sample_hash" in r)
    line = to_line({**told, "step": 7_654_321, "time": 1_795_000_000.5})
    with (run / METRICS).open("w") as ledger:
        ledger.writelines(
            line.replace("7654321", str(step)).replace("1795000000", str(1_795_000_000 + step))
            for step in range(1, STEPS + 1)
        )
    cli.main(["report", str(STORED)])  # imports
    capsys.readouterr()

    began = time.process_time()
    assert cli.main(["report", str(run), "--json"]) == 0
    spent = time.process_time() - began

    found = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(word))
    assert found["format"] == 1
    assert found["step"] == found["history"]["steps"][-1] == STEPS
    assert len(found["history"]["steps"]) == BUCKETS
    assert spent < MOST_S


# ---- what is no run ------------------------------------------------------------------------------------------------


def test_what_is_no_run_is_named_as_what_it_is(run: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign" / "photos").mkdir(parents=True)
    (tmp_path / "half" / "claims").mkdir(parents=True)
    shutil.copytree(run, tmp_path / "runs" / "usual")
    hostile = Path(shutil.copytree(run, tmp_path / "hostile"))
    (hostile / "status.json").write_text("[" * 100_000)
    deep = Path(shutil.copytree(run, tmp_path / "deep"))
    (deep / METRICS).write_text("[" * 100_000 + "\n" + '{"step": {}, "sample_hash": 1, "time": []}\n' * 3)

    for url, told in {
        f"{tmp_path}/mnie": f"which is no run; give near that name: {tmp_path}/mine",
        "usuel": "which is no run; give near that name: usual",
        "foreign": "which is no run (it has photos); give the folder of one",
        "half": "which is half a run",
        "hostile": "status.json is damaged",
    }.items():
        assert cli.main(["report", url]) == 2
        assert told in capsys.readouterr().err
    assert cli.main(["report", str(deep)]) == 0, "the rest of it can be looked at"
