"""The ranks of `jobs.bench.checkpoint`: processes with a gloo group that do what the benchmark tells them, together."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jobs.bench.seaweed import LOOPBACK

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["jobs.bench.checkpoint_engines"])
ANSWER_S = 900.0
STEPS = 10
_COMPUTE_RATE = 1e9  # bytes of a rank's state for each second of forward and backward: enough to hide a copy
_LEAST_COMPUTE_S = 0.05


@dataclass(frozen=True)
class Shape:
    """What is saved: `count` float32 tensors with `total` bytes together."""

    name: str
    total: int
    count: int

    @property
    def columns(self) -> int:
        """Of each tensor, which has 12 rows: any world of 1, 2, 3 or 4 gets as many."""
        return self.total // self.count // 4 // 12

    @property
    def nbytes(self) -> int:
        return self.count * 12 * self.columns * 4


class Ranks:
    """Use as a context manager; `ask` makes all ranks do one thing and returns their answers.

    Raises:
        RuntimeError: a rank failed or died; its traceback.
    """

    def __init__(self, world: int, port: int, environment: dict[str, str]):
        self._world, self._port, self._environment = world, port, environment

    def __enter__(self) -> Ranks:
        self._log = tempfile.NamedTemporaryFile(prefix="ranks-")  # torch's helpers say all they do
        pairs = [_context.Pipe() for _ in range(self._world)]
        self._ends = [ours for ours, _ in pairs]
        self._processes = [
            _context.Process(
                target=_rank, args=(theirs, rank, self._world, self._port, self._environment, self._log.name)
            )
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process, (_, theirs) in zip(self._processes, pairs, strict=True):
            process.start()
            theirs.close()
        return self

    @property
    def pids(self) -> list[int]:
        return [p.pid for p in self._processes if p.pid is not None]

    def ask(self, do: str, **values: Any) -> list[dict[str, Any]]:
        """Have all ranks do it; returns what each measured."""
        for end in self._ends:
            end.send((do, values))
        answers = []
        for rank, end in enumerate(self._ends):
            if not end.poll(ANSWER_S):
                raise RuntimeError(f"rank {rank} did not {do} within {ANSWER_S:.0f} s")
            try:
                answers.append(end.recv())
            except EOFError as error:
                self._log.seek(0)
                said = self._log.read()[-2000:].decode(errors="replace")
                raise RuntimeError(f"rank {rank} died when told to {do}; it said:\n{said}") from error
        for rank, answer in enumerate(answers):
            if "error" in answer:
                raise RuntimeError(f"rank {rank} could not {do}:\n{answer['error']}")
        return answers

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._log.close()


def _rank(end: Connection, rank: int, world: int, port: int, environment: dict[str, str], log: str) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    os.environ.update(environment)
    os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    work = _Work()
    while True:
        try:
            do, values = end.recv()
        except EOFError:
            break
        try:
            end.send(getattr(work, do)(**values) or {})
        except Exception:
            end.send({"error": traceback.format_exc()})
    work.close()
    dist.destroy_process_group()


class _Work:
    """What a rank can be told to do."""

    def __init__(self) -> None:
        import torch.distributed as dist

        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._engine: Any = None
        self._passes = 0

    def state(self, shape: Shape) -> None:
        """Make the tensors, and find out how many passes of made-up work outlast copying them."""
        import torch

        self._state = {f"layer.{i:04d}": _expected(i, self._rows(), shape.columns) for i in range(shape.count)}
        self._matrix = torch.ones(256, 256) / 256
        began, passes = time.perf_counter(), 200
        for _ in range(passes):
            self._matrix = self._matrix @ self._matrix
        each = (time.perf_counter() - began) / passes
        self._passes = int(max(_LEAST_COMPUTE_S, shape.nbytes / self._world / _COMPUTE_RATE) / each) + 1

    def _rows(self) -> slice:
        each = 12 // self._world
        return slice(each * self._rank, each * (self._rank + 1))

    def engine(self, name: str, url: str) -> None:
        from jobs.bench.checkpoint_engines import ENGINES

        self._engine = ENGINES[name](url)

    def save(self, step: int) -> dict[str, float]:
        """Save and do nothing else until it is durable."""
        with _timed() as timed:
            self._engine.save(self._state, step)
            self._engine.before_update()
            self._engine.wait()
        return timed

    def steps(self, count: int = STEPS) -> dict[str, float]:
        """Train without saving."""
        with _timed() as timed:
            for _ in range(count):
                self._step(lambda: None)
        return timed

    def save_and_train(self, step: int) -> dict[str, float]:
        """Save, and take STEPS steps while it is written; `stall_s` is what the save and the first update waited."""
        helpers = _descendants_cpu_s(os.getpid())
        began = time.perf_counter()
        self._engine.save(self._state, step)
        stall = time.perf_counter() - began
        with _timed() as timed:
            waited = self._step(self._engine.before_update)
            for _ in range(STEPS - 1):
                self._step(lambda: None)
        self._engine.wait()
        durable = time.perf_counter() - began
        helper_cores = (_descendants_cpu_s(os.getpid()) - helpers) / durable
        return {
            "stall_s": stall + waited,
            "steps_s": timed["seconds"] - waited,
            "durable_s": durable,
            "helper_cores": helper_cores,
        }

    def _step(self, before_update: Any) -> float:
        """A forward and backward pass, and an update; returns what the update had to wait for."""
        for _ in range(self._passes):
            self._matrix = self._matrix @ self._matrix
        began = time.perf_counter()
        before_update()
        waited = time.perf_counter() - began
        for tensor in self._state.values():
            tensor.mul_(1.0)  # the values stay, so that a load can be checked; the memory is written to
        return waited

    def load_one(self, step: int) -> None:
        """Load the first tensor: what a process pays for its first request of all is no throughput."""
        self._engine.load(dict(list(self._state.items())[:1]), step)

    def load(self, step: int) -> dict[str, float]:
        """Load into tensors that hold something else, and check every value."""
        import torch

        for tensor in self._state.values():
            tensor.fill_(-1)
        with _timed() as timed:
            self._engine.load(self._state, step)
        for i, tensor in enumerate(self._state.values()):
            assert torch.equal(tensor, _expected(i, self._rows(), tensor.shape[1])), f"tensor {i} came back wrong"
        return timed

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def _expected(number: int, rows: slice, columns: int) -> Any:
    """Rows of tensor `number`: every row can be told from every other."""
    import torch

    base = torch.arange(columns, dtype=torch.float32)
    return torch.stack([base + (1000 * number + row) for row in range(rows.start, rows.stop)])


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Seconds from when all ranks begin until this one is done."""
    import torch.distributed as dist

    dist.barrier()
    found: dict[str, float] = {}
    began = time.perf_counter()
    yield found
    found["seconds"] = time.perf_counter() - began


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [p for child in thread.read_text().split() for p in family(int(child))]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return found


def _descendants_cpu_s(pid: int) -> float:
    ticks = 0
    for child in family(pid)[1:]:
        try:
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def proportional_mib(pids: list[int]) -> float:
    """Memory of processes and all below them; what they share counts once (PSS)."""
    total = 0
    for pid in (p for first in pids for p in family(first)):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024
