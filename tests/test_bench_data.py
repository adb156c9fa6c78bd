"""The benchmark of data in shards runs, and reads each byte once at every number of workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.long
@pytest.mark.processes
def test_the_quick_mode_reads_every_byte_once(tmp_path):
    file = tmp_path / "figures.json"

    ended = subprocess.run(
        [sys.executable, "-m", "jobs.bench.data", "--quick", "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=ROOT,
    )

    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads(file.read_text())
    assert found["samples"] == 128
    for world in (1, 2, 4):
        assert found["read"][f"here, {world}"] == pytest.approx(1.0, abs=1e-3)
    assert found["mb_s"]["here"] > found["mb_s"]["one by one"]
