"""A run in plain processes on this machine, without Ray: the membership server here, each worker a child process.

`python -m elastic.worker --module jobs.digits --workers 2 [options of the job]`
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from elastic.config import to_dict
from elastic.errors import ConfigError, RunFailed
from elastic.job import job_options
from elastic.membership.client import DriverLink
from elastic.run.host import RunHost, host_settings, keeper_options, new_token
from elastic.run.prepare import PreparedRun, open_run

LOOPBACK = "127.0.0.1"


class LocalRun:
    """Starts the workers of a prepared run and waits for its end. Use as a context manager.

    Args:
        workers: processes to start.
        host: the address of this machine that the membership server listens on.
        on_record: called with every row and event, on another thread.
        environment: further environment variables of the workers.
    """

    def __init__(
        self, run: PreparedRun, workers: int, *, host: str = LOOPBACK, accelerator: str = "cpu",
        on_record: Callable[[dict[str, Any]], None] | None = None, environment: dict[str, str] | None = None,
    ):  # fmt: skip
        self._run, self._workers, self._address, self._accelerator = run, workers, host, accelerator
        self._environment = environment or {}
        self._on_record = on_record or (lambda record: None)
        self._end: dict[str, Any] | None = None
        self._ended = threading.Event()
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> LocalRun:
        run = self._run
        epoch = open_run(run)
        token = new_token()
        self._host = RunHost(
            run.folder.storage.url, keeper_options(run, epoch), host_settings(run.config, token, self._address)
        )
        self.url = self._host.start({"changed_code": run.changed_code or None})
        self.link = DriverLink(self.url, token)
        self._follower = threading.Thread(target=self._follow, name="local-run-follower", daemon=True)
        self._follower.start()
        for index in range(self._workers):
            self.start_worker(index, token, epoch)
        return self

    def start_worker(self, index: int, token: str, epoch: int) -> None:
        """Start one worker process; its specification goes through standard input, so the token is in no listing."""
        run = self._run
        job_class = type(run.job)
        specification = {
            "module": _importable(job_class), "class": job_class.__qualname__, "job_options": job_options(run.job),
            "config": to_dict(run.config), "plan": run.plan.__dict__, "digest": run.digest,
            "folder_url": run.folder.storage.url, "server_url": self.url, "token": token,
            "identity": {
                "id": f"w{epoch}-{index}", "node": platform.node(), "local_index": index, "host": self._address,
                "accelerator": self._accelerator,
            },
        }  # fmt: skip
        environment = {**os.environ, **self._environment, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        process = subprocess.Popen(
            [sys.executable, "-m", "elastic.worker", "--child"], stdin=subprocess.PIPE, env=environment
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(specification).encode())
        process.stdin.close()
        self.processes.append(process)

    def _follow(self) -> None:
        def on_record(record: dict[str, Any]) -> None:
            if record.get("kind") == "end":
                self._end = record
                self._ended.set()
            self._on_record(record)

        asyncio.run(self.link.follow(on_record))

    def stop(self, detail: str = "") -> None:
        """Ask the run to save and end at the next step boundary."""
        self.link.request("/wish", {"wish": "stop", "detail": detail})

    def wait(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the end of the run.

        Returns:
            the contents of result.json.

        Raises:
            RunFailed: it failed, every worker died, or it did not end within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while not self._ended.wait(0.05):
            if all(p.poll() is not None for p in self.processes) and not self._ended.wait(2.0):
                codes = [p.returncode for p in self.processes]
                message = f"every worker of run {self._run.name} ended without a result; exit codes {codes}"
                self.link.request("/close", {"status": "failed", "message": message})
                if not self._ended.wait(10.0):
                    raise RunFailed(message)
            if time.monotonic() > deadline:
                raise RunFailed(f"run {self._run.name} did not end within {timeout_s:.0f} s")
        assert self._end is not None
        if self._end["status"] not in ("finished", "stopped"):
            raise RunFailed(self._end["message"])
        return self._end["result"]

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + 10
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()) if self._ended.is_set() else 0.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._host.stop()
        self._follower.join(10)


def _importable(job_class: type) -> str:
    """The module that a new process imports to find the job, also where it was started with `python -m`."""
    if job_class.__module__ != "__main__":
        return job_class.__module__
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    if specification is None:
        raise ConfigError(
            f"job {job_class.__qualname__} is defined in a script; start plain processes with python -m MODULE"
        )
    return str(specification.name)


def run_local(run: PreparedRun, workers: int, *, timeout_s: float = 600.0, **options: Any) -> dict[str, Any]:
    """Run to the end; returns the contents of result.json."""
    with LocalRun(run, workers, **options) as local:
        return local.wait(timeout_s)
