"""Runs on a terminal and side by side: what `elastic watch`, `compare` and `runs` show."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from elastic import cli
from elastic.observe.ledger import METRICS
from elastic.storage import Storage
from elastic.tools.comparing import compare
from elastic.tools.looking import Onlooker
from elastic.tools.target import open_run
from elastic.tools.terminal import bars, braille, over_time, picture
from tests.test_history import STORED, row


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORED, tmp_path / "mine"))


# ---- watching ------------------------------------------------------------------------------------------------------


def test_a_curve_is_drawn_in_dots_and_worlds_in_bars():
    assert braille([0.0, 1.0, 2.0, 3.0], 2, 1) == ["⣠⠏"]
    assert braille([None, None], 2, 2) == ["  ", "  "]
    assert braille([5.0] * 4, 2, 1) == ["⠤⠤"]
    assert over_time([1.0, 3.0], [10.0, 30.0], 4.0, 4) == [None, 15.0, 25.0, None]
    assert bars([[1.0, 4, "1-1"], [2.1, 0, "1-1"], [3.1, 2, "1-2"]], 4.0, 4) == "██ ▄"


@pytest.mark.parametrize(("width", "height"), [(40, 12), (80, 24), (200, 60)])
def test_a_screen_of_any_size_is_filled_and_not_overrun(run: Path, width: int, height: int):
    from rich.console import Console

    console = Console(width=width, height=height, color_system=None, record=True, file=io.StringIO())
    console.print(picture(Onlooker(open_run(str(run), read_only=True)).look(), width, height))
    lines = console.export_text().splitlines()

    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("exact  stopped")
    assert any("step 4 of 8" in line for line in lines)
    assert height < 24 or any(line.startswith("   health ") for line in lines)


def test_a_run_that_ended_is_watched_to_its_end_in_lines_and_as_json(run: Path, capsys):
    assert cli.main(["watch", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("mine: stopped, step 4 of 8")
    assert cli.main(["watch", str(run), "--json"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line)["format"] == 1


# ---- comparing -----------------------------------------------------------------------------------------------------


def told(rows: list[dict[str, Any]], sha: str | None = None, **options: Any) -> dict[str, Any]:
    config = {"config": {"run": {"name": "x", "seed": 0}}, "job": {"options": options}, "result": ["job.lr"]}
    result = {} if sha is None else {"weights_sha256": sha, "steps": len(rows)}
    return {"rows": rows, "config": config, "result": result}


def test_two_runs_are_the_same_or_part_somewhere():
    rows = [row(s) for s in range(1, 6)]
    other = [*rows[:3], row(4, loss=0.26), row(5, sample_hash="other")]

    same = compare(told(rows, "a", lr=1.0), told(rows, "a", lr=1.0))
    assert (same["same_samples"], same["same_bits"], same["same_weights"], same["options"]) == (True, True, True, [])
    parted = compare(told(rows, "a", lr=1.0), told(other, "b", lr=2.0))
    assert (parted["samples_part_at"], parted["parts_at"], parted["values"]["loss"]) == (5, 4, [0.25, 0.26])
    assert parted["same_weights"] is False
    assert [(o["option"], o["result_option"], o["values"]) for o in parted["options"]] == [("job.lr", True, [1.0, 2.0])]
    shorter = compare(told(rows, "a"), told(rows[:2], "b"))
    assert (shorter["common_steps"], shorter["same_bits"], shorter["same_weights"]) == (2, True, None)
    apart = compare(told(rows[:1]), told(rows[1:]))
    assert (apart["common_steps"], apart["same_bits"]) == (0, None)


def test_compare_exits_with_1_where_runs_part(run: Path, tmp_path: Path, capsys):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    assert cli.main(["compare", str(run), str(other)]) == 0
    assert "the same in all 4 common steps" in capsys.readouterr().out
    lines = (other / METRICS).read_text().splitlines(keepends=True)
    (other / METRICS).write_text("".join(lines).replace(json.loads(lines[1])["sample_hash"], "0" * 16))
    assert cli.main(["compare", str(run), str(other), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["samples_part_at"] == 2


# ---- listing -------------------------------------------------------------------------------------------------------


def test_runs_are_listed_with_what_they_hold_and_cost_in_any_order(run: Path, tmp_path: Path, capsys):
    large = Path(shutil.copytree(run, tmp_path / "large"))
    (large / "more").write_bytes(bytes(5 << 20))
    (large / "result.json").write_text(json.dumps({**json.loads((large / "result.json").read_text()), "cost": 1.25}))

    assert cli.main(["runs", str(tmp_path), "--sort", "size", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"]
    assert [(r["name"], r["cost"]) for r in found] == [("large", 1.25), ("mine", None)]
    assert found[0]["bytes"] > 5 << 20 > found[1]["bytes"] > 0
    assert cli.main(["runs", str(tmp_path)]) == 0
    head, first, _ = capsys.readouterr().out.splitlines()
    assert ("disk" in head, "cost" in head, "5.0 MiB" in first, "1.25" in first) == (True, True, True, True)
    assert cli.main(["runs", str(tmp_path), "--watch"]) == 2
    assert "--watch is for a terminal" in capsys.readouterr().err


def test_what_a_place_holds_is_the_same_sum_on_disk_and_in_an_object_store(tmp_path: Path):
    for storage in (Storage(str(tmp_path / "run")), Storage("memory://usage/run")):
        assert storage.usage() == 0
        storage.replace("a", b"12")
        storage.replace("deep/er/b", b"345")
        assert storage.usage() == 5
    Storage("memory://usage").remove("run")
