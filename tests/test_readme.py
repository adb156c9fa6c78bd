"""The documents tell the truth: their commands work, their diffs, tables and outputs are the real ones."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import elastic
from elastic import TrainConfig, cli, errors
from elastic.command import run
from elastic.errors import ElasticError
from elastic.job_file import load_job
from elastic.sweep.command import run as sweep

ROOT = Path(__file__).parent.parent
#: Those with commands. Those of clusters.md and kubernetes.md are tried in `tests/test_cluster_files.py`.
PAGES = ["README.md", *(f"docs/{n}.md" for n in ("benchmarks", "exactness", "files", "jobs", "operations", "sweeps"))]
MAKEFILE = (ROOT / "Makefile").read_text()
PORTED = "docs.port.ported"
OPERATIONS = "docs/operations.md"
HEADER = "| who, what was killed | kills | p50 | p95 | worst | steps lost | where it goes |"  # of benchmarks.md
GOOD_ACCURACY = 0.93  # seeds 0 to 2 of plain.py reach 0.950 to 0.972


def text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    """The contents of all code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text(page), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """Every command of every bash block, without comments."""
    lines = [line.split(" #")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def table(page: str, header: str) -> list[list[str]]:
    """The rows of the first table under a header row, cell by cell."""
    rows, lines = [], text(page).splitlines()
    for line in lines[lines.index(header) + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def python(*arguments: str, cwd: Path) -> str:
    """Run Python in `cwd` with the repository on its path; its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def libraries() -> None:
    """Torch and scikit-learn set environment variables when they are first used: that is no leak of a test."""
    import sklearn.datasets  # noqa: F401
    import torch

    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])


# ---- the first screen ----------------------------------------------------------------------------------------------


def test_the_first_screen_has_what_a_newcomer_asks():
    screen = "\n".join(text("README.md").splitlines()[:40])

    assert "```diff" in screen
    assert "the same bits" in screen
    for words in ("torchft", "torchrun", "stock Ray Train", "**For**", "**Not for**"):
        assert words in screen


def test_the_excerpt_of_the_port_has_lines_of_the_two_scripts_in_order():
    [shown] = blocks("README.md", "diff")
    scripts = {"-": text("docs/port/plain.py"), "+": text("docs/port/ported.py")}

    for line in shown.splitlines():
        _, found, scripts[line[0]] = scripts[line[0]].partition(f"\n{line[1:]}\n")
        assert found, f"{line!r} is in no script, or not there"
        scripts[line[0]] = "\n" + scripts[line[0]]


def test_figures_beside_peers_are_those_of_the_benchmark():
    measured = {row[0]: row for row in table("docs/benchmarks.md", HEADER)}
    rows = table("README.md", "| one of three workers is killed | seconds without a step | steps lost |")
    peers = ("here on Ray, process", "torchft, lighthouse tuned to 50 ms and 300 ms", "torchrun, process")

    assert len(rows) == 4
    for (_, shown, lost), peer in zip(rows, (*peers, "stock Ray Train elastic, process")):
        digits = len(shown.partition(".")[2])
        assert shown == f"{float(measured[peer][2]):.{digits}f}", peer
        assert lost == measured[peer][5], peer


def test_the_minimal_job_is_a_job_that_learns(libraries, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    (tmp_path / "minimal.py").write_text(blocks("README.md", "python")[0])
    job_class, config = job_of(tmp_path / "minimal.py")
    job = job_class()
    torch.manual_seed(0)
    model = job.model()
    optimizer = job.optimizer(model)
    batch = job.collate_fn(job.train_data()[:512])

    losses = []
    for _ in range(60):
        loss, weight, _ = job.loss(model, batch)
        (loss / weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / weight)

    assert losses[-1] < 0.9 * losses[0]
    assert run(job_class, config, ["--dry-run"]) == 0


# ---- the port ------------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_the_plain_script_learns(tmp_path):
    shown = python(str(ROOT / "docs" / "port" / "plain.py"), cwd=tmp_path)

    assert float(shown.split("held-out accuracy ")[1]) > GOOD_ACCURACY


@pytest.mark.processes
def test_the_ported_script_learns_as_well_leaves_what_is_listed_and_is_refused_as_shown(
    libraries, tmp_path, monkeypatch, capsys
):
    """A run of the ported script, in plain processes, by the documented command."""
    [line] = [c for c in commands("docs/jobs.md") if c.startswith("python -m elastic.worker")]
    python(*shlex.split(line)[1:], "--run.name", "run", cwd=tmp_path)
    ported = tmp_path / "runs" / "run"
    result = json.loads((ported / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["metrics"]["eval/accuracy"] > GOOD_ACCURACY

    listed = {name.strip("`") for name, _ in table("docs/files.md", "| file | what it is |")}
    assert {f"{p.name}/" if p.is_dir() else p.name for p in ported.iterdir()} == listed
    assert list(ported.glob("checkpoints/step-*/*/manifest.json"))

    monkeypatch.chdir(tmp_path)
    assert run(*job_of(module_file(PORTED)), ["--run.name", "run", "--run.seed", "2"]) == 2
    assert capsys.readouterr().err.replace("run run ", "run mine ") in text(OPERATIONS)


def test_the_shown_diff_is_that_of_the_two_scripts():
    done = subprocess.run(
        ["diff", "-u", "docs/port/plain.py", "docs/port/ported.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    real = [line.rstrip() for line in done.stdout.splitlines()[2:]]

    [shown] = blocks("docs/jobs.md", "diff")

    assert [line.rstrip() for line in shown.splitlines()] == real


@pytest.mark.parametrize("sign", ["-", "+"])
def test_porting_changes_little(sign: str):
    [shown] = blocks("docs/jobs.md", "diff")

    changed = [line for line in shown.splitlines() if line.startswith(sign) and line[1:].strip()]

    assert 0 < len(changed) <= 16


# ---- commands ------------------------------------------------------------------------------------------------------


def job_of(file: Path) -> tuple[type[elastic.Job], TrainConfig]:
    """The one job of a file, and its defaults."""
    specification = importlib.util.spec_from_file_location(file.stem, file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[file.stem] = module  # where a dataclass looks its annotations up
    try:
        specification.loader.exec_module(module)
    finally:
        del sys.modules[file.stem]
    jobs = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, elastic.Job)]
    [job_class] = [c for c in jobs if c.__module__ == module.__name__]
    return job_class, getattr(module, "CONFIG", TrainConfig())


def dry_run(file: Path, options: list[str]) -> None:
    """All that a job's command does before it starts anything."""
    job_class, config = job_of(file)
    if "--help" in options:
        with pytest.raises(SystemExit) as left:
            run(job_class, config, options)
        assert left.value.code == 0
    else:
        assert run(job_class, config, [*options, "--dry-run"]) == 0


def module_file(name: str) -> Path:
    specification = importlib.util.find_spec(name)
    assert specification is not None, name
    assert specification.origin is not None
    return Path(specification.origin)


def check_make(words: list[str]) -> None:
    """The target exists; running it here would be endless."""
    assert re.search(rf"^{words[1]}:", MAKEFILE, re.MULTILINE), f"the Makefile has no target {words[1]}"


def test_ci_runs_the_linter_and_the_test_command_that_are_shown():
    run = re.findall(r"^make [\w-]+", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)

    assert run == ["make lint", "make test", "make test-slow"]
    assert set(run) < set(commands("README.md"))


def check_activate(words: list[str]) -> None:
    assert f"BIN := {Path(words[1]).parent}" in MAKEFILE


def check_elastic(words: list[str]) -> None:
    assert 'elastic = "elastic.cli:main"' in (ROOT / "pyproject.toml").read_text()
    if words[1] == "doctor":  # runs whole in tests.test_doctor
        with pytest.raises(SystemExit) as left:
            cli.main([*words[1:], "--help"])
        assert left.value.code == 0
        return
    if words[1] == "sweep":  # runs whole in tests.test_ray_sweep
        assert sweep([*words[2:], "--dry-run"]) == 0
        return
    if words[1] == "evaluate":  # runs whole in tests.test_job_files
        assert load_job(words[words.index("--job") + 1])[0].__name__ == "Digits"
        return
    if words[1] != "init":
        run_mine()
    if "runs/lr" in words:
        sweep_lr()
    assert cli.main(words[1:]) == (1 if words[1] in ("stop", "scale", "drain", "checkpoint", "stacks") else 0), (
        "nobody drives it"
    )


def run_mine() -> None:
    """Checkpoints where the commands before would have left some; those are not run to their end here."""
    import torch

    from elastic.run.folder import RunFolder
    from elastic.storage import Storage
    from tests.state_by_hand import save_state

    if not Path("runs/mine/checkpoints").exists():
        for step in (100, 200):
            save_state("runs/mine", step, {"model/weight": torch.ones(3)})
        RunFolder(Storage("runs/mine")).write_status({"status": "stopped", "heartbeat": time.time(), "step": 200})
        row = {"format": 1, "step": 200, "time": time.time(), "generation": "1-1", "sample_hash": "0"}
        row |= {"loss": 1.0, "world_size": 1}
        Path("runs/mine/metrics.jsonl").write_text(json.dumps(row) + "\n")
        Path("runs/mine/logs").mkdir()
        Path("runs/mine/logs/w1-0.txt").write_text("2026-11-29 01:02:03 [rank 0, here] hello\n")
        shutil.copytree("runs/mine", "runs/twin")


def sweep_lr() -> None:
    """A sweep with one trial, as the command before would have left it."""
    if not Path("runs/lr").exists():
        Path("runs/lr").mkdir(parents=True)
        shutil.copytree("runs/mine", "runs/lr/lr-0000")
        sweep = {
            "format": 1,
            "status": "finished",
            "heartbeat": time.time(),
            "metric": "eval/accuracy",
            "mode": "max",
            "fixed": {"search": {"job.lr": "uniform(0, 1)"}, "trials": 1, "scheduler": "asha", "searcher": "random"},
            "best": {"run": "lr-0000", "step": 200},
        }
        Path("runs/lr/sweep.json").write_text(json.dumps(sweep))
        line = {"trial": 0, "kind": "started", "run": "lr-0000", "options": {"job.lr": 0.1}, "until": 1}
        Path("runs/lr/trials.jsonl").write_text(json.dumps(line) + "\n")


class LineRead(Exception):
    """A command took its line; it is not run further."""


def read_line(module: str, line: list[str]) -> None:
    """A benchmark takes these options. Some run for half an hour."""
    main = importlib.import_module(module).main
    if not line and "parse_args" not in main.__code__.co_names:
        return

    real = argparse.ArgumentParser.parse_args

    def parse_args(reader: argparse.ArgumentParser) -> None:
        real(reader, line)
        raise LineRead

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(LineRead):
            main()


def check_pip(words: list[str]) -> None:
    """The extra exists."""
    extra = re.fullmatch(r"elastic-train\[(\w+)\]", words[2])
    assert extra is not None
    assert extra[1] in tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]


def check_python(words: list[str]) -> None:
    if words[1] == "-m" and words[2] == "elastic.worker":  # runs whole in its own test
        at = words.index("--module")
        assert words[3:5] == words[at : at + 2]
        dry_run(module_file(words[at + 1]), words[words.index("--workers") + 2 :])
    elif words[1] == "-m" and words[2].startswith("jobs.bench."):
        read_line(words[2], words[3:])
    elif words[1] == "-m":
        dry_run(module_file(words[2]), words[3:])
    elif words[1] == "docs/port/plain.py":  # runs whole in its own test
        assert (ROOT / words[1]).is_file()
    else:
        here, there = Path(words[1]), ROOT / words[1]
        dry_run(here if here.exists() else there, words[2:])


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    ".": check_activate,
    "elastic": check_elastic,
    "python": check_python,
    "pip": check_pip,
}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_works_as_far_as_it_can_be_tried_here(libraries, tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    assert commands(page)

    for line in commands(page):
        words = shlex.split(line)
        assert words[0] in CHECKS, f"nobody checks {line!r}"
        CHECKS[words[0]](words)


@pytest.mark.processes
def test_the_shown_dry_run_is_the_real_one(tmp_path):
    [line] = [c for c in commands(OPERATIONS) if c.endswith("--dry-run")]
    [shown] = [b for b in blocks(OPERATIONS, "text") if b.startswith("run mine in")]

    real = iter(python(*shlex.split(line)[1:], cwd=tmp_path).splitlines())

    assert next(real) == f"run mine in {tmp_path}/runs/mine"
    for wanted in shown.splitlines()[1:]:
        assert wanted.strip() == "..." or wanted in real, f"not printed, or not in this place: {wanted!r}"


# ---- tables --------------------------------------------------------------------------------------------------------


def test_the_exit_codes_are_those_of_our_errors():
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, ElasticError)]

    assert {int(code) for code, _ in table(OPERATIONS, "| exit code | meaning |")} == {0, *(e.exit_code for e in kinds)}
