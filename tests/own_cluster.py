"""A Ray cluster of its own, started by `ray start` with its own settings, beside the one that other tests share."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from jobs.bench.nodes import OBJECT_STORE_BYTES, REPOSITORY, free_port

RAY = str(Path(sys.executable).parent / "ray")


def install_wheel(folder: Path) -> Path:
    """Build the wheel, and unpack it below this folder; returns a folder with what it installs, and nothing else of
    this project."""
    source, built = folder / "source", folder / "built"
    source.mkdir()
    shutil.copytree(REPOSITORY / "elastic", source / "elastic", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built), str(source)]
    subprocess.run(build, check=True, timeout=60, stdout=subprocess.DEVNULL)
    (file,) = built.glob("*.whl")
    shutil.unpack_archive(file, folder / "installed", "zip")
    return folder / "installed"


class OwnCluster:
    """A head, and whatever it starts. As a context manager it ends them all.

    Ray's own `ray stop` ends every Ray process of the machine, those of other tests too.

    Args:
        options: of `ray start --head`.
        environment: of the head and its workers, beside that of this process.
    """

    def __init__(self, *options: str, environment: Mapping[str, str], port: int | None = None):
        from ray.util import get_node_ip_address

        mark = "ELASTIC_TEST_CLUSTER", uuid.uuid4().hex
        self._mark = "=".join(mark).encode()
        port = port or free_port()
        self.address = f"{get_node_ip_address()}:{port}"
        self._temporary = tempfile.mkdtemp(prefix="r-", dir="/tmp")  # paths of sockets may not be long
        self._command = [
            RAY,
            "start",
            "--head",
            f"--port={port}",
            f"--object-store-memory={OBJECT_STORE_BYTES}",
            "--disable-usage-stats",
            f"--temp-dir={self._temporary}",
            *options,
        ]
        seldom = {"REPORTER_UPDATE_INTERVAL_MS": "600000"}  # its agents look at all processes of the machine
        self._environment = {**os.environ, **seldom, **environment, mark[0]: mark[1]}

    def __enter__(self) -> OwnCluster:
        try:
            started = subprocess.run(
                self._command,
                env=self._environment,
                timeout=60,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if started.returncode:
                raise OSError(f"ray start ended with {started.returncode}:\n{started.stdout}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while pids := self.processes():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._temporary, ignore_errors=True)

    def processes(self, name: str = "") -> list[int]:
        """Living processes of this cluster whose command line has this in it."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and self._mark in (entry / "environ").read_bytes().split(b"\0"):
                    found += [int(entry.name)] if name.encode() in (entry / "cmdline").read_bytes() else []
        return found
