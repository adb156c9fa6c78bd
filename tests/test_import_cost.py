"""What an import costs: `elastic --help` must not wait for torch or Ray."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import pytest


@pytest.mark.processes
@pytest.mark.parametrize(
    "line",
    [
        "import elastic",
        "import elastic.job, elastic.config",
        "from elastic import Job, TrainConfig, RunOptions, hf, main",
    ],
)
def test_importing_what_a_job_file_needs_imports_neither_torch_nor_ray(line):
    program = f"{line}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)

    loaded = set(json.loads(done.stdout))
    assert "elastic" in loaded
    assert {"torch", "ray", "numpy", "aiohttp", "tyro", "transformers"} & loaded == set()


@pytest.mark.processes
def test_the_command_looks_at_checkpoints_without_torch_and_helps_without_anything(tmp_path):
    program = """
import json, sys
from elastic import cli
try:
    cli.main(["--help"])
except SystemExit:
    pass
helped = sorted(sys.modules)
cli.main(["checkpoints", "ls", sys.argv[1], "--verify"])
cli.main(["runs", sys.argv[1]])
for verb in ("status", "stop", "checkpoint"):
    cli.main([verb, sys.argv[1] + "/run"])
print(json.dumps([helped, sorted(sys.modules)]))
"""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "run").mkdir()
    status = {"format": 1, "status": "running", "heartbeat": time.time(), "host": "here", "owner": "ann"}
    status["server"] = "http://127.0.0.1:9"
    (tmp_path / "run" / "status.json").write_text(json.dumps(status))

    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )

    helped, looked = json.loads(done.stdout.splitlines()[-1])
    assert "no committed checkpoint" in done.stdout
    assert {"torch", "ray", "numpy", "aiohttp", "tyro", "rich", "xxhash", "fsspec"} & set(helped) == set()
    assert {"elastic.tools.inspecting", "elastic.tools.registry", "elastic.tools.live"} < set(looked)
    assert {"torch", "ray", "aiohttp"} & set(looked) == set()


@pytest.mark.processes
def test_what_drives_a_run_imports_neither_torch_nor_a_server(tmp_path):
    """A job that imports torch in its methods starts 1.5 seconds sooner."""
    program = """
import json, sys
import elastic.cluster.driving
from elastic.command import run
from jobs.codegpt import CONFIG, CodeGPT
assert run(CodeGPT, CONFIG, ["--dry-run", "--run.storage", sys.argv[1]]) == 0
print(json.dumps(sorted(sys.modules)))
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert {"torch", "aiohttp", "pandas"} & set(json.loads(done.stdout.splitlines()[-1])) == set()


@pytest.mark.processes
def test_the_command_helps_in_under_0_3_seconds_of_its_own_time():
    """It waits for nothing, and what a busy machine adds is not its own."""
    took = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "elastic.cli", "--help"], check=True, timeout=60, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    assert min(took) < 0.3


@pytest.mark.processes
def test_every_public_name_can_be_imported():
    program = "import elastic\nfor n in elastic.__all__: assert getattr(elastic, n).__name__ == n, n"

    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


def test_a_name_that_is_not_there_is_an_attribute_error():
    import elastic

    with pytest.raises(AttributeError, match="module 'elastic' has no attribute 'Trainer'"):
        elastic.Trainer  # noqa: B018
