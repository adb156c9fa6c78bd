"""The benchmark of the GPU path, on processors: what gloo can show of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.bench.gpu import LIMITS, NCCL_ONLY

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.minutes, pytest.mark.timeout(1800)]


def test_what_gloo_can_show_passes(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = [sys.executable, "-m", "jobs.bench.gpu", "--cpu", "--limit", "1500", "--json", str(results)]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=1700)

    found = {result["check"]: result for result in json.loads(results.read_text())}
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert {name for name, result in found.items() if result["ok"]} == LIMITS.keys() - set(NCCL_ONLY)
    assert len(ended.stdout.splitlines()) == len(LIMITS)
