"""A run in plain processes on this machine, without Ray: the membership server here, each worker a child process.

`python -m elastic.worker --module jobs.digits --workers 2 [options of the job]`
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from elastic.config import to_dict
from elastic.errors import ConfigError, Interrupted, RunFailed
from elastic.job import coded_options
from elastic.membership.driver import DriverLink, outlived
from elastic.membership.protocol import Close, Gone, Note, Wish
from elastic.run.forecast import refuse_what_does_not_fit_here
from elastic.run.host import host_settings, keeper_options, new_token
from elastic.run.prepare import PreparedRun, open_run
from elastic.run.signals import heard_by
from elastic.units import parse_amount
from elastic.worker.hosting import HostHere, HostProcess, ended_how
from elastic.worker.vaults import STILL_S, VaultProcess

LOOPBACK = "127.0.0.1"
HOST_LOST_S = 60.0
IDLE_S = 2.0  # without any worker process; who ends a run says so before it ends


class LocalRun:
    """Starts the workers of a prepared run and waits for its end. Use as a context manager.

    Args:
        workers: processes to start.
        host: the address of this machine that the membership server listens on.
        on_record: called with every row and event, on another thread.
        environment: further environment variables of the workers.
        own_host: host the run in a process of its own, which is started again when it dies; with these further
            environment variables.
        in_vaults: further environment variables of the vaults, where snapshots are taken.
        expects: workers that come; the default is those that are started.
    """

    def __init__(
        self,
        run: PreparedRun,
        workers: int,
        *,
        host: str = LOOPBACK,
        accelerator: str = "cpu",
        on_record: Callable[[dict[str, Any]], None] | None = None,
        environment: dict[str, str] | None = None,
        own_host: dict[str, str] | None = None,
        in_vaults: dict[str, str] | None = None,
        expects: int | None = None,
    ):
        self._expects = workers if expects is None else expects
        self._in_vaults = in_vaults or {}
        self._run, self._workers, self._address, self._accelerator = run, workers, host, accelerator
        self._environment, self._own_host = environment or {}, own_host
        self._on_record = outlived(on_record or (lambda record: None))
        self._end: dict[str, Any] | None = None
        self._ended = threading.Event()
        self._wanted = 0  # processes to have, once the run was scaled
        self._told: set[int] = set()  # processes that ended, and the server knows
        self._let_go: set[str] = set()  # workers that end now, if they have not yet
        self._follower: threading.Thread | None = None
        self._epoch = 0
        self.hosting: HostHere | HostProcess | None = None
        self.processes: list[subprocess.Popen[bytes]] = []
        self.vaults: dict[str, VaultProcess] = {}  # by node

    @property
    def name(self) -> str:
        """Of the run."""
        return self._run.name

    @property
    def again(self) -> str:
        """What to give the same command, for the run to go on."""
        return self._run.again

    @property
    def ended_as(self) -> str | None:
        """The run's last status, once it has ended."""
        return self._end["status"] if self._end is not None else None

    def __enter__(self) -> LocalRun:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        run = self._run
        refuse_what_does_not_fit_here(run)
        self._epoch, self.token = open_run(run), new_token()
        settings = host_settings(run.config, self.token, self._address)
        settings = replace(settings, limits=replace(settings.limits, expects=self._expects))
        arguments = (
            run.folder.storage.url,
            keeper_options(run, self._epoch),
            settings,
            {"changed_code": run.changed_code or None},
        )
        if self._own_host is None:
            self.hosting = HostHere(*arguments)
        else:
            self.hosting = HostProcess(*arguments, living=self._living, environment=self._own_host)
        self.url = self.hosting.start()
        self.link = DriverLink(self.url, self.token)
        self._follower = threading.Thread(target=self._follow, name="local-run-follower", daemon=True)
        self._follower.start()
        vaults = [self._vault_of(self.node_of(index)) for index in range(self._workers)]  # they start side by side
        for vault in vaults:
            if vault is not None:
                vault.wait()  # so that all workers start at one time
        for _ in range(self._workers):
            self.add_worker()

    def add_worker(self, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start one more worker process; its specification goes through standard input, so the token is in no listing.
        It ends when that is closed, as it is when this process ends in whatever way."""
        index = len(self.processes)
        run = self._run
        job_class, vault = type(run.job), self._vault_of(self.node_of(index))
        specification = {
            "module": _importable(job_class),
            "class": job_class.__qualname__,
            "job_options": coded_options(run.job),
            "config": to_dict(run.config),
            "plan": run.plan.__dict__,
            "digest": run.digest,
            "folder_url": run.folder.storage.url,
            "server_url": self.url,
            "token": self.token,
            "identity": {
                "id": self.worker_id(index),
                "node": self.node_of(index),
                "local_index": index,
                "host": self._address,
                "accelerator": self._accelerator,
                "vault": vault.wait() if vault else "",
            },
        }
        own = self._environment if environment is None else environment
        process = subprocess.Popen(
            [sys.executable, "-m", "elastic.worker", "--child"],
            stdin=subprocess.PIPE,
            env={**os.environ, **own, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already, and is found so
            process.stdin.write(json.dumps(specification).encode() + b"\n")
            process.stdin.flush()
        self.processes.append(process)
        return process

    def worker_id(self, index: int) -> str:
        """Of the worker that was started as this one, from 0."""
        return f"w{self._epoch}-{index}"

    def _living(self) -> list[str]:
        return [self.worker_id(index) for index, process in enumerate(self.processes) if process.poll() is None]

    def _vault_of(self, node: str) -> VaultProcess | None:
        if self._run.plan.snapshot_every is None:
            return None
        if node not in self.vaults:
            given = self._run.config.recovery.hang_timeout
            still_s = STILL_S if given == "auto" else parse_amount("--recovery.hang-timeout", given, clock=True).seconds
            self.vaults[node] = VaultProcess(self.token, self._address, self._in_vaults, still_s)
        return self.vaults[node]

    def node_of(self, index: int) -> str:
        """Where worker `index` is said to be: with --scaling.workers-per-node, as if so many shared a machine."""
        each = self._run.config.scaling.workers_per_node
        return platform.node() if each is None else f"{platform.node()}/{index // each}"

    def _follow(self) -> None:
        def on_record(record: dict[str, Any]) -> None:
            if record.get("kind") == "end":
                self._end = record
            elif record.get("kind") == "handed_over":
                self._let_go.add(record["member"])
            elif record.get("kind") == "scaled":
                self._wanted = record["detail"]["max_workers"]
            self._on_record(record)
            if self._end is not None:
                self._ended.set()

        if not self.link.follow_to_the_end(on_record, self._ended, HOST_LOST_S):
            self._end = {"status": "failed", "message": "the host of the run is gone and did not come back"}
            self._ended.set()

    def stop(self, detail: str = "") -> None:
        """Ask the run to save and end at the next step boundary."""
        self.link.request(Wish("stop", detail), patience_s=HOST_LOST_S)

    def end_at_once(self, message: str) -> None:
        """Have the run stopped without saving."""
        self.link.request(Close("stopped", message), patience_s=HOST_LOST_S)

    def wait(self, timeout_s: float) -> dict[str, Any]:
        """Wait for the end of the run.

        Returns:
            the contents of result.json.

        Raises:
            RunFailed: it failed, every worker died, or it did not end within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        known, idle_since = 0, 0.0  # how many processes had been started when there last was one
        while not self._ended.wait(0.05):
            self._grow()
            self._tell_ended()
            codes = [process.poll() for process in self.processes]
            if None in codes or known != len(codes):
                known, idle_since = len(codes), time.monotonic()
            self._keep_vaults()
            if time.monotonic() - idle_since > IDLE_S:
                how = (f"{self.worker_id(i)}: {ended_how(c)}" for i, c in enumerate(codes) if c is not None)
                message = (
                    f"every worker of run {self._run.name} ended without a result ({'; '.join(how)}); what they said "
                    f"stands above; give {self._run.again} to go on from the newest checkpoint"
                )
                self.link.request(Close("failed", message), patience_s=HOST_LOST_S)
                if not self._ended.wait(10.0):
                    raise RunFailed(message)
            if time.monotonic() > deadline:
                raise RunFailed(f"run {self._run.name} did not end within {timeout_s:.0f} s")
        return self.ended(0.0)

    def ended(self, timeout_s: float) -> dict[str, Any]:
        """The contents of result.json, once the run has ended; its processes are not looked after meanwhile.

        Raises:
            RunFailed: it failed, or did not end within `timeout_s`.
        """
        if not self._ended.wait(timeout_s):
            raise RunFailed(f"run {self._run.name} did not end within {timeout_s:.0f} s")
        assert self._end is not None
        if self._end["status"] not in ("finished", "stopped"):
            raise RunFailed(self._end["message"])
        return self._end["result"]

    def _keep_vaults(self) -> None:
        for node, vault in self.vaults.items():
            why = vault.keep()
            if why is not None:
                with contextlib.suppress(OSError):  # the host is away
                    detail = {"node": node, "why": why}
                    self.link.request(Note("vault_restarted", detail))

    def _grow(self) -> None:
        """After the run was scaled up: start what is missing, once; nobody replaces lost ones here."""
        missing, self._wanted = self._wanted - len(set(self._living()) - self._let_go), 0
        for _ in range(missing):
            self.add_worker()

    def _tell_ended(self) -> None:
        """Tell the membership server which processes ended, and how, but for those whose part was over."""
        for index, process in enumerate(self.processes):
            if process.poll() is None or index in self._told:
                continue
            with contextlib.suppress(OSError):  # the host is away: it is told when it is back
                if process.returncode:
                    self.link.request(Gone([self.worker_id(index)], True, ended_how(process.returncode)))
                self._told.add(index)

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + 10
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()) if self._ended.is_set() else 0.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # of what it did not read
                process.stdin.close()
        self._ended.set()
        for vault in self.vaults.values():
            vault.stop()
        if self.hosting is not None:
            self.hosting.stop()
        if self._follower is not None:
            self._follower.join(10)
        if self._epoch:
            self._run.folder.release(self._epoch)


@contextmanager
def heeding_signals(local: LocalRun) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM save and end the run, and a second one ends it at once.

    Raises:
        Interrupted: the run was stopped for that.
    """
    came: list[str] = []
    asking: list[threading.Thread] = []

    def handle(name: str) -> None:
        came.append(f"interrupted by {name}")
        target = local.stop if len(came) == 1 else local.end_at_once
        words = came[0] if len(came) == 1 else "interrupted twice, nothing saved since the newest checkpoint"
        asking.append(threading.Thread(target=target, args=(words,), name="interrupt", daemon=True))
        asking[-1].start()  # a handler must not wait for an answer

    try:
        with heard_by(handle):
            yield
        if came and local.ended_as == "stopped":
            raise Interrupted(f"run {local.name} was {came[0]}; give {local.again} to go on")
    finally:
        for thread in asking:
            thread.join(HOST_LOST_S)


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
    """Run to the end; returns the contents of result.json. See `heeding_signals` for what ends it before."""
    with LocalRun(run, workers, **options) as local, heeding_signals(local):
        return local.wait(timeout_s)
