"""Runs in plain processes whose workers start in a tenth of a second.

`LocalRun` starts each worker as a new Python, which spends seconds on importing torch. Here the same code starts
them as forks of one process that has imported everything, through what looks like `subprocess` to it.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import pytest

import elastic.worker.children
from elastic import fault as faults_of_process
from elastic.checkpoint.loader import load_all
from elastic.checkpoint.reader import newest_first, read_manifest
from elastic.checkpoint.tensors import tensor_bytes
from elastic.config import TrainConfig
from elastic.data.fetching import Order
from elastic.errors import RunFailed
from elastic.job import Job
from elastic.observe.ledger import EVENTS, METRICS, kept_history, read_records
from elastic.run.prepare import PreparedRun, prepare
from elastic.worker.local import LocalRun
from tests import leaks, nccl_manners
from tests.hosts import Host, enter
from tests.tiny_jobs import CONFIG

WAIT_S = 60.0
#: For runs that compile. On a machine that has compiled nothing yet, torch first finds out what its compiler can do and
#: compiles headers, which takes 30 s where nothing else runs.
COMPILING_S = 2 * WAIT_S
B = CONFIG.batch.global_size
STDERR = "FORKED_STDERR"  # environment variable of a worker: a file for its standard error
STDOUT = "FORKED_STDOUT"  # and for its standard output
LONG = 400  # samples of jobs whose runs see none of them twice
_context = multiprocessing.get_context("forkserver")
_OF_WORKERS = [
    "elastic.worker.__main__",
    "elastic.run.__main__",
    "elastic.snapshot.__main__",
    "elastic.worker.session",
    "tests.random_jobs.job",
    "tests.slow_job",
    "tests.forked",
    "tests.tiny_jobs",
    "torch._dynamo",
    "numpy.ma",
    "numpy.random",
    "s3fs",
    "tests.botocore_models",
]  # the first optimizer imports torch._dynamo, which takes as long as torch itself
_OF_DRIVERS = [
    "elastic.cli",
    "elastic.cluster.trainer",
    "elastic.cluster.driving",
    "elastic.cluster.group",
    "elastic.sweep.raytune",
    "matplotlib.pyplot",
    "sklearn.datasets",
]


def start_fork_server(*, ray: bool = False) -> None:
    """Start the process that others are forked from, and wait until it has imported everything.

    Args:
        ray: what drivers of runs on Ray need too.
    """
    _context.set_forkserver_preload([*_OF_WORKERS, *(_OF_DRIVERS if ray else []), "tests.frozen"])
    first = _context.Process(target=_nothing)
    first.start()
    first.join()
    assert first.exitcode == 0


def stop_fork_server() -> None:
    """End that process and the one that tracks its resources."""
    forkserver._forkserver._stop()
    resource_tracker._resource_tracker._stop()


@contextmanager
def forking_with(*modules: str) -> Iterator[None]:
    """Inside, workers are forks of another process, which has imported these modules too: for what few tests need, and
    what would make all others wait."""
    other = forkserver.ForkServer()
    other.set_forkserver_preload([*_OF_WORKERS, *modules, "tests.frozen"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forkserver, "_forkserver", other)
        patch.setattr(forkserver, "ensure_running", other.ensure_running)
        patch.setattr(forkserver, "connect_to_new_process", other.connect_to_new_process)
        first = _context.Process(target=_nothing)
        first.start()
        first.join()
        assert first.exitcode == 0
        yield
        other._stop()


def fork(target: Callable[..., Any], *arguments: Any) -> Any:
    """A process that calls this function of a module."""
    process = _context.Process(target=target, args=arguments)
    process.start()
    return process


def fork_driver(target: Callable[..., Any], *arguments: Any) -> Any:
    """Like `fork`, of a function that drives a run: its workers, host and vaults are forked from the same server."""
    return fork(_drive, forkserver._forkserver._forkserver_address, target, arguments)


def _drive(server: str, target: Callable[..., Any], arguments: Sequence[Any]) -> None:
    _fork_from(server)
    elastic.worker.children.subprocess = _Subprocess(())  # type: ignore[attr-defined]
    target(*arguments)


def _fork_from(server: str) -> None:
    """Processes of multiprocessing's that this one starts, such as loader processes, are forked from that server."""
    known: Any = forkserver._forkserver
    known._forkserver_address, known.ensure_running = server, _nothing


def _nothing() -> None:
    pass


def _take_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    faults_of_process.read_plan()


def _work(reading: Connection, server: str, environment: dict[str, str], namespace: str | None) -> None:
    from elastic.worker.__main__ import _child

    _fork_from(server)
    if namespace is not None:
        enter(namespace)
    for name, number in ((STDOUT, 1), (STDERR, 2)):
        if name in environment:
            os.dup2(os.open(environment[name], os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    _take_environment(environment)
    if nccl_manners.VARIABLE in environment:
        nccl_manners.install()
    sys.stdin = os.fdopen(os.dup(reading.fileno()))
    reading.close()
    sys.exit(_child())


def _serve(reading: Connection, module: str, environment: dict[str, str]) -> None:
    _take_environment(environment)
    sys.stdin = os.fdopen(os.dup(reading.fileno()))
    sys.exit(importlib.import_module(f"{module}.__main__").main())


class _Input:
    """The standard input of a worker, which starts when its first line is there."""

    def __init__(self, start: Callable[[bytes], IO[bytes]]):
        self._start, self._line = start, b""
        self._there: IO[bytes] | None = None

    def write(self, data: bytes) -> None:
        self._line += data

    def flush(self) -> None:
        self._there = self._there or self._start(self._line)

    def close(self) -> None:
        if self._there is not None:
            self._there.close()


class ForkedProcess:
    """Looks like the `subprocess.Popen` of a worker, of a host, or of a vault.

    Args:
        places: the hosts that workers are on, by their index; none is the same as all on this one.
    """

    def __init__(
        self,
        command: list[str],
        *,
        stdin: int,
        env: dict[str, str],
        places: Sequence[Host] = (),
    ):
        assert stdin == subprocess.PIPE
        self._environment, self._places = env, places
        self._process: Any = None
        self.stdin: Any
        if command[1:] in (["-m", "elastic.run"], ["-m", "elastic.snapshot"]):  # which read to the end of their input
            reading, writing = _context.Pipe(duplex=False)
            self.stdin = os.fdopen(os.dup(writing.fileno()), "wb")
            self._start(_serve, reading, command[2], env)
            reading.close()
            writing.close()
        else:
            assert command[1:] == ["-m", "elastic.worker", "--child"]
            self.stdin = _Input(self._start_worker)

    def _start_worker(self, specification: bytes) -> IO[bytes]:
        namespace, values = None, json.loads(specification)
        if {STDOUT, STDERR} & set(self._environment):  # a test's own
            values["output"] = []
        if self._places:
            host = self._places[values["identity"]["local_index"]]
            values["identity"] |= {"node": host.name, "host": host.address}
            namespace = host.name
        specification = json.dumps(values).encode() + b"\n"
        reading, writing = _context.Pipe(duplex=False)
        life = os.fdopen(os.dup(writing.fileno()), "wb")
        self._start(_work, reading, forkserver._forkserver._forkserver_address, self._environment, namespace)
        reading.close()
        writing.close()
        life.write(specification)
        life.flush()
        return life

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        self._process = _context.Process(target=target, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked worker", timeout or 0.0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


class _Subprocess:
    """What `elastic.worker.children` uses of `subprocess`."""

    PIPE, TimeoutExpired = subprocess.PIPE, subprocess.TimeoutExpired

    def __init__(self, places: Sequence[Host]):
        self.Popen = partial(ForkedProcess, places=places)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Wait for something that no record tells."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for {what}"
        time.sleep(0.01)


class Watch:
    """Collects the rows and events of a run as they come; others wait for one."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self._came = threading.Condition()

    def __call__(self, record: dict[str, Any]) -> None:
        with self._came:
            self.records.append(record)
            self._came.notify_all()

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first record that is wanted, waiting for it."""
        with self._came:
            came = self._came.wait_for(lambda: any(map(wanted, self.records)), WAIT_S)
            assert came, f"the record did not come within {WAIT_S} s; there are {self.records[-5:]}"
            return next(filter(wanted, self.records))

    def wait_for_step(self, step: int) -> dict[str, Any]:
        """The first row of a step of at least `step`."""
        return self.wait_for(lambda record: "sample_hash" in record and record["step"] >= step)


def fault(point: str, step: int | None = None, rank: int | None = None, do: str = "kill", **more: Any) -> dict:
    """One planned fault; without step or rank it happens at any. See `elastic.fault`."""
    places = {"point": point, "step": step, "rank": rank, "do": do, **more}
    return {k: str(v) if isinstance(v, Path) else v for k, v in places.items() if v is not None}


def plan(*faults: dict) -> dict[str, str]:
    """The environment of a process in which these happen."""
    return {"ELASTIC_FAULTS": json.dumps(faults)}


class Ran:
    """A run that ended: its result and ledger, read from storage."""

    def __init__(self, run: PreparedRun, failure: str | None):
        self.run, self.storage, self.failure = run, run.folder.storage, failure
        self.result: dict[str, Any] = run.folder.result() or {}

    @property
    def sha(self) -> str:
        return self.result["weights_sha256"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All step and evaluation rows, in the order written."""
        return read_records(self.storage, METRICS)

    @property
    def history(self) -> list[dict[str, Any]]:
        return kept_history(self.rows)

    def column(self, name: str) -> list[Any]:
        """A column of the kept history."""
        return [row[name] for row in self.history]

    @property
    def evaluations(self) -> dict[int, dict[str, float]]:
        """Evaluation values by step."""
        found: dict[int, dict[str, float]] = {}
        for row in self.rows:
            values = {k: v for k, v in row.items() if k.startswith("eval/")}
            if values:
                found[row["step"]] = values
        return found

    def state(self, at: int = 0) -> dict[str, Any]:
        """All of a checkpoint: tensors as (dtype, shape, bytes), and values; `at` 0 is the newest, 1 the one before."""
        checkpoint = list(newest_first(self.storage))[at]
        manifest = read_manifest(self.storage, checkpoint)
        found: dict[str, Any] = {"step": manifest.step, "values": manifest.values}
        for name, tensor in load_all(self.storage, checkpoint.folder, manifest).items():
            found[name] = (tensor.dtype, tuple(tensor.shape), bytes(tensor_bytes(tensor)))
        return found

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_records(self.storage, EVENTS) if event["kind"] == kind]


def configure(storage: object, name: str | None, **options: Any) -> TrainConfig:
    """The tiny jobs' configuration in bitwise, with options such as `run__stop_after="5st"`; quick to start."""
    parts: dict[str, dict[str, Any]] = {
        "run": {"storage": str(storage), "name": name, "exactness": "bitwise"},
        "observe": {"tensorboard": False},  # its library takes long to import
    }
    for key, value in options.items():
        part, _, field = key.partition("__")
        parts.setdefault(part, {})[field] = value
    return replace(CONFIG, **{part: replace(getattr(CONFIG, part), **values) for part, values in parts.items()})


def sample_at(step: int, microbatch: int = 4, place: int = 0) -> int:
    """A sample of a microbatch of a step (from 1), of jobs with `LONG` samples: there it occurs only once."""
    order = Order(seed=0, dataset_size=LONG, global_size=B, microbatches=CONFIG.batch.microbatches)
    return int(order.span(step - 1, microbatch, 1).ids[place])


@contextmanager
def local_run(
    run: PreparedRun, workers: int, *, places: Sequence[Host] = (), beside_ray: bool = False, **options: Any
) -> Iterator[LocalRun]:
    """A `LocalRun` with forked workers, on these hosts if any are given, which must leave nothing behind; beside a
    cluster, whose processes come and go, no process is looked for."""
    before = leaks.take()
    with leaks.adopting_orphans():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(elastic.worker.children, "subprocess", _Subprocess(places))
            with LocalRun(run, workers, **options) as local:
                yield local
        assert leaks.wait_until_clean(before, ray=beside_ray) == []


def train(
    job: Job,
    config: TrainConfig,
    workers: int,
    wait_s: float = WAIT_S,
    faults: Any = (),
    *,
    beside_ray: bool = False,
    manners: nccl_manners.Manners | None = None,
) -> Ran:
    """Train to the end, or to the pause or failure. No more workers are waited for than are started.

    Args:
        manners: they communicate through the stand-in for NCCL, which behaves like this.
    """
    run = prepare(job, replace(config, scaling=replace(config.scaling, max_workers=workers)))
    failure = None
    environment = plan(*faults) | (manners.environment() if manners is not None else {})
    with local_run(run, workers, beside_ray=beside_ray, environment=environment) as local:
        try:
            local.wait(wait_s)
        except RunFailed as error:
            failure = str(error)
    return Ran(run, failure)
