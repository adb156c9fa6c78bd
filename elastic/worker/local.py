"""A run in plain processes on this machine, without Ray: the membership server here, each worker a child process.

`python -m elastic.worker --module jobs.digits --workers 2 [options of the job]`
"""

from __future__ import annotations

import contextlib
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from elastic.config import to_dict
from elastic.errors import ConfigError
from elastic.job_options import coded_options
from elastic.membership.driver import DriverLink, outlived
from elastic.membership.protocol import Gone, Note, Wish
from elastic.run.course import Over
from elastic.run.drive import HOST_LOST_S, Drive
from elastic.run.forecast import refuse_what_does_not_fit_here
from elastic.run.host import host_settings, keeper_options, new_token, start_detail
from elastic.run.logs import RunLogs
from elastic.run.prepare import PreparedRun, open_run
from elastic.run.signals import handled_by
from elastic.units import parse_amount
from elastic.worker.children import end_process, start_module
from elastic.worker.deaths import Memory, ended_how
from elastic.worker.hosting import HostHere, HostProcess
from elastic.worker.spool import ERR, Spool
from elastic.worker.vaults import HANG_TIMEOUT_S, VaultProcess

LOOPBACK = "127.0.0.1"
HEAR_S = 0.25  # between two looks at what workers print
LOOK_S = 1.0  # between two looks at how much memory is left
END_S = 10.0  # for processes to end by themselves after the run has ended
IDLE_S = 2.0  # without any worker process: a worker that ends the run reports that before it ends


def echo(worker: str, stream: str, line: str) -> None:
    """Show a line that a worker printed, on the same stream."""
    print(f"[{worker}] {line}", file=sys.stderr if stream == ERR else sys.stdout, flush=True)


class LocalRun:
    """Starts the workers of a prepared run and waits for its end. Use as a context manager.

    It is the launcher of its drive: it starts workers once, and more if the run is scaled up. It does not replace lost
    workers.

    Args:
        workers: number of processes to start.
        host: address on this machine on which the membership server listens.
        on_record: called with every row and event, on another thread.
        print_line: called with a line for the console.
        show: called with a worker, the stream, and a line that it printed there.
        environment: further environment variables of the workers.
        own_host: host the run in a process of its own, with these further environment variables; it is restarted if
            it dies.
        in_vaults: further environment variables of the vaults, if snapshots are taken.
        expects: number of workers that will come; by default those that are started.
    """

    def __init__(
        self,
        run: PreparedRun,
        workers: int,
        *,
        host: str = LOOPBACK,
        accelerator: str = "cpu",
        on_record: Callable[[dict[str, Any]], None] = lambda record: None,
        print_line: Callable[[str], None] = lambda text: None,
        show: Callable[[str, str, str], None] = echo,
        environment: dict[str, str] | None = None,
        own_host: dict[str, str] | None = None,
        in_vaults: dict[str, str] | None = None,
        expects: int | None = None,
    ):
        self._expects = workers if expects is None else expects
        self._in_vaults = in_vaults or {}
        self._run, self._workers, self._address, self._accelerator = run, workers, host, accelerator
        self._environment, self._own_host = environment or {}, own_host
        self.logs = RunLogs(run.folder.storage)
        self._show, self._spool, self._memory = show, Spool(), Memory()
        self._next_hearing = self._next_look = 0.0
        self.drive = Drive(run, [self._note, self.logs.on_record, outlived(on_record)], print_line)
        self._wanted = 0  # number of processes to have, after the run was scaled
        self._reported: set[int] = set()  # ended processes that the server knows
        self._let_go: set[str] = set()  # workers that were handed over, and end now
        self._known, self._idle_since = 0, 0.0  # processes started when one last lived, and when that was
        self._epoch = 0
        self.hosting: HostHere | HostProcess | None = None
        self.processes: list[subprocess.Popen[bytes]] = []
        self.vaults: dict[str, VaultProcess] = {}  # by node

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
        self.logs.__enter__()
        settings = host_settings(run.config, self.token, self._address)
        settings = replace(settings, port=run.config.observe.port or 0)
        settings = replace(settings, limits=replace(settings.limits, expects=self._expects))
        arguments = (
            run.folder.storage.url,
            keeper_options(run, self._epoch),
            settings,
            start_detail(run),
        )
        if self._own_host is None:
            self.hosting = HostHere(*arguments)
        else:
            self.hosting = HostProcess(*arguments, living=self._living, environment=self._own_host)
        self.url = self.hosting.start()
        self.link = DriverLink(self.url, self.token)
        self.drive.follow(self.link)
        self.start()

    def start(self) -> None:
        """Start the workers."""
        vaults = [self._vault_of(self.node_of(index)) for index in range(self._workers)]  # all start at the same time
        for vault in vaults:
            if vault is not None:
                vault.wait()  # here, so that workers do not start one after another
        for _ in range(self._workers):
            self.add_worker()

    def add_worker(self, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start one more worker process."""
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
            "prepared": run.prepared,
            "output": self._spool.open(self.worker_id(index)),
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
        process = start_module(["elastic.worker", "--child"], specification, own)
        self.processes.append(process)
        return process

    def worker_id(self, index: int) -> str:
        """The id of the worker that was started as number `index`, from 0."""
        return f"w{self._epoch}-{index}"

    def _living(self) -> list[str]:
        return [self.worker_id(index) for index, process in enumerate(self.processes) if process.poll() is None]

    def _vault_of(self, node: str) -> VaultProcess | None:
        if self._run.plan.snapshot_every is None:
            return None
        if node not in self.vaults:
            given = self._run.config.recovery.hang_timeout
            hang_timeout_s = (
                HANG_TIMEOUT_S
                if given == "auto"
                else parse_amount("--recovery.hang-timeout", given, clock=True).seconds
            )
            report = partial(self._report_vault, node)
            self.vaults[node] = VaultProcess(self.token, self._address, self._in_vaults, hang_timeout_s, report)
        return self.vaults[node]

    def node_of(self, index: int) -> str:
        """The node of worker `index`; with --scaling.workers-per-node, as if so many workers shared a machine."""
        per_node = self._run.config.scaling.workers_per_node
        return platform.node() if per_node is None else f"{platform.node()}/{index // per_node}"

    def _note(self, record: dict[str, Any]) -> None:
        if record.get("kind") == "handed_over":
            self._let_go.add(record["member"])
        elif record.get("kind") == "scaled":
            self._wanted = record["detail"]["max_workers"]

    def stop(self, detail: str = "") -> None:
        """Ask the run to save and end at the next step boundary."""
        self.link.request(Wish("stop", detail), patience_s=HOST_LOST_S)

    def wait(self, timeout_s: float) -> dict[str, Any]:
        """Supervise the run until it ends; returns the contents of result.json. See `Drive.wait`."""
        with self.logs.telling_of_deaths():
            return self.drive.wait(self, timeout_s)

    # ---- the launcher of its drive -----------------------------------------------------------------------------------

    def turn(self, worlds: int) -> None:
        """Start missing workers after scaling up, and tell the host which processes ended."""
        self._grow()
        if time.monotonic() >= self._next_hearing:
            self._next_hearing = time.monotonic() + HEAR_S
            for worker in self._spool.workers:
                self._hear(worker)
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_S
            self._memory.look()
        self._report_ended()

    def silent(self) -> str:
        """Always empty: only this process keeps the workers."""
        return ""

    def over(self) -> Over | None:
        """How the workers have ended, if none has lived for `IDLE_S`."""
        codes = [process.poll() for process in self.processes]
        if None in codes or self._known != len(codes):
            self._known, self._idle_since = len(codes), time.monotonic()
        if not codes or time.monotonic() - self._idle_since <= IDLE_S:
            return None
        how = (f"{self.worker_id(i)}: {ended_how(c)}" for i, c in enumerate(codes) if c is not None)
        why = (
            f"every worker of run {self._run.name} ended without a result ({'; '.join(how)}); give {self._run.again} "
            "to go on from the newest checkpoint"
        )
        for worker in map(self.worker_id, range(len(codes))):
            self._hear(worker, ended=True)
            if words := self.logs.last_words(worker):
                return Over(f"{why}\nworker {worker}: {words}")
        return Over(why)

    def end(self) -> None:
        """End the workers at once."""
        for process in self.processes:
            process.kill()

    def _report_vault(self, node: str, why: str) -> None:
        with contextlib.suppress(OSError):  # the host is away, and the event is lost
            self.link.request(Note("vault_restarted", {"node": node, "why": why}))

    def _grow(self) -> None:
        """After the run was scaled up, start missing workers, once: lost ones are not replaced."""
        wanted, self._wanted = self._wanted, 0
        if not wanted:
            return
        for _ in range(wanted - len(set(self._living()) - self._let_go)):
            self.add_worker()

    def _report_ended(self) -> None:
        """Tell the membership server which processes ended, and how, except workers that ended as planned."""
        for index, process in enumerate(self.processes):
            if process.poll() is None or index in self._reported:
                continue
            worker = self.worker_id(index)
            self._hear(worker, ended=True)
            with contextlib.suppress(OSError):  # the host is away: repeated at the next turn
                if process.returncode:
                    memory = self._memory.ran_out() if process.returncode == -signal.SIGKILL else None
                    how = ended_how(process.returncode, memory)
                    self.link.request(Gone([worker], True, how, self.logs.last_words(worker)))
                self._reported.add(index)

    def _hear(self, worker: str, *, ended: bool = False) -> None:
        """Write what a worker printed into its log, and show it."""
        found = self._spool.read(worker, ended=ended)
        for (stream, _), line in zip(found, self.logs.add(worker, [line for _, line in found])):
            self._show(worker, stream, line)

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + (END_S if self.drive.ended else 0.0)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                process.kill()
            end_process(process, END_S)
        for worker in self._spool.workers:
            self._hear(worker, ended=True)
        self._spool.close()
        for vault in self.vaults.values():
            vault.stop()
        if self.hosting is not None:
            self.hosting.stop()
        self.drive.close()
        if self._epoch:
            self.logs.__exit__()
            self._run.folder.release(self._epoch)


def _importable(job_class: type) -> str:
    """The module that a new process imports to find the job, even if it was started with `python -m`."""
    if job_class.__module__ != "__main__":
        return job_class.__module__
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    if specification is None:
        raise ConfigError(
            f"job {job_class.__qualname__} is defined in a script; start plain processes with python -m MODULE"
        )
    return str(specification.name)


def run_local(run: PreparedRun, workers: int, *, timeout_s: float = 600.0, **options: Any) -> dict[str, Any]:
    """Run to the end; returns the contents of result.json. The first SIGINT or SIGTERM saves and ends the run, a second
    one ends it at once."""
    local = LocalRun(run, workers, **options)
    with handled_by(local.drive.on_signal), local:
        return local.wait(timeout_s)
