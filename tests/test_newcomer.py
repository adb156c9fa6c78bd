"""A first day as the README tells it, by the wheel alone, in a fresh folder: see `newcomer.sh`, which does it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.bench.nodes import free_port
from tests.own_cluster import OwnCluster, install_wheel

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.minutes, pytest.mark.timeout(900)]
SCRIPT = Path(__file__).parent / "newcomer.sh"


def follow(part: str, site: Path, folder: Path, *more: str) -> None:
    """Do one part of the day."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [str(SCRIPT), part, sys.executable, str(site), str(folder), *more],
        env=variables,
        text=True,
        timeout=600,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux on this machine")
def test_a_first_day_is_as_documented(tmp_path: Path) -> None:
    (tmp_path / "wheel").mkdir()
    site = install_wheel(tmp_path / "wheel")
    follow("alone", site, tmp_path / "day")
    port = free_port()
    options = ("--num-cpus=2", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with OwnCluster(*options, environment={"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(site), "PATH": path}):
        follow("cluster", site, tmp_path / "day", f"http://127.0.0.1:{port}")
