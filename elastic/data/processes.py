"""Loader processes: torch's, sent by value what they need, made again when one of them dies.

What a job defines in a script or a notebook can be imported by no other process, so it goes there by value, and so do
its batches on their way back. Tensors go through shared memory, as torch sends them.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
from collections import ChainMap
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import Pipe, util
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from elastic.errors import ConfigError, one_line

END_S = 5.0
DYING_S = GONE_S = 1.0


class LoaderProcesses:
    """Processes that work off a queue of keys, in order; its source can be replaced at any time.

    Args:
        dataset: answers a key, in each of the processes; it raises nothing.
        parts: what may keep it from being sent, by name, for people.
        prefetch: keys that each process works off ahead.
        begin: what each calls first.
    """

    def __init__(
        self,
        dataset: Any,
        parts: dict[str, Any],
        *,
        count: int,
        prefetch: int,
        begin: Callable[[], None],
    ):
        self._dataset, self._parts, self._count, self._prefetch = dataset, parts, count, prefetch
        self._begin = begin
        self._keys = _Keys()
        self._answers: Iterator[Any] | None = None
        self._processes: list[BaseProcess] = []
        # Where they and we listen. One that is killed leaves its folder behind; one that was inherited is not ours.
        self._folder = util.get_temp_dir() if multiprocessing.parent_process() is None else ""
        self._life: tuple[Connection, Connection] | None = Pipe(duplex=False)

    def feed(self, source: Iterator[Any]) -> None:
        """From now on these keys are worked off, after those that were begun before."""
        self._keys.source = source
        if self._answers is None:
            self._start()

    def _start(self) -> None:
        assert self._life is not None, "they were closed"
        before = set(multiprocessing.active_children())
        begin = partial(_begin, self._begin, self._life[0], os.getpid(), self._folder)
        loader: DataLoader[Any] = DataLoader(
            _Sent(self._dataset, self._parts, self._count),
            batch_size=None,
            sampler=self._keys,
            num_workers=self._count,
            prefetch_factor=self._prefetch,
            multiprocessing_context="forkserver",
            persistent_workers=True,
            worker_init_fn=begin,
        )
        self._answers = iter(loader)
        self._processes = [p for p in multiprocessing.active_children() if p not in before]

    def answers(self) -> Iterator[Any]:
        """The answers, in the order of the keys. Whatever this raises says that the processes are of no use any more:
        `restart` them."""
        assert self._answers is not None, "feed them first"
        return self._answers

    def restart(self, source: Iterator[Any]) -> str:
        """End them, and start others with these keys.

        Returns:
            how those ended that had died, for people.
        """
        how = self._end()
        self.feed(source)
        return how

    def _end(self) -> str:
        wait([p.sentinel for p in self._processes], DYING_S)  # its connections end before it does
        codes = [p.exitcode for p in self._processes if p.exitcode is not None]
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(END_S)
        held: list[Any] = [self._answers]
        self._answers, self._processes = None, []
        # A process that was killed may have held a lock, for which torch waits when it ends the others.
        threading.Thread(target=held.clear, name="drop-loader", daemon=True).start()
        return ", ".join(map(_told, codes)) or "they did not answer as they should"

    def close(self) -> None:
        """End them."""
        self._answers = None
        if self._life is not None:
            for end in self._life:
                end.close()
            self._life = None


class _Keys(Sampler[Any]):
    """The endless queue of keys."""

    def __init__(self) -> None:
        self.source: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield next(self.source)


class _Sent(Dataset[Any]):
    """A dataset on its way to a process: there it is `_There`, here it is never asked."""

    def __init__(self, dataset: Any, parts: dict[str, Any], count: int):
        self._dataset, self._parts, self._count = dataset, parts, count

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        try:
            return _There, (_by_value(self._dataset),)
        except Exception as error:
            found = [(name, why) for name, part in self._parts.items() if (why := _why_unsendable(part)) is not None]
            name, why = found[0] if found else ("the training data", one_line(error))
            raise ConfigError(
                f"{name} cannot be sent to loader processes ({why}): make what cannot be sent, such as open files and "
                f"connections, at the first sample, or give --data.workers 0 instead of {self._count}"
            ) from error


class _There(Dataset[Any]):
    """A dataset in a loader process."""

    def __init__(self, data: bytes):
        self._dataset = pickle.loads(data)
        self._pickle: Callable[[Any], bytes] = _by_name

    def __getitem__(self, key: Any) -> Any:
        return _Answer(self, self._dataset[key])

    def pickled(self, value: Any) -> bytes:
        """By name until that fails, then by value; for what cannot be sent, what the dataset makes of that."""
        with contextlib.suppress(Exception):
            return self._pickle(value)
        self._pickle = _by_value  # not tried again: each try would leave descriptors of tensors open
        try:
            return _by_value(value)
        except Exception as error:
            return pickle.dumps(self._dataset.unsendable(value, error))


class _Answer:
    """An answer on its way back."""

    def __init__(self, there: _There, value: Any):
        self._there, self._value = there, value

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return pickle.loads, (self._there.pickled(self._value),)


def _by_name(value: Any) -> bytes:
    return bytes(ForkingPickler.dumps(value))


def _by_value(value: Any) -> bytes:
    """Pickled, with the definitions of what no other process can import; tensors as torch sends them."""
    import cloudpickle

    buffer = io.BytesIO()
    pickler: Any = cloudpickle.Pickler(buffer)
    pickler.dispatch_table = ChainMap(ForkingPickler(io.BytesIO()).dispatch_table, pickler.dispatch_table)
    pickler.dump(value)
    return buffer.getvalue()


def _why_unsendable(part: Any) -> str | None:
    import cloudpickle

    try:
        cloudpickle.dumps(part)
    except Exception as error:  # whatever its own way of being pickled raises
        return one_line(error)
    return None


def _told(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"killed by signal {-exit_code}"


def _begin(begin: Callable[[], None], life: Connection, worker: int, folder: str, _: int) -> None:
    """The beginning of a loader process. The other end of `life` is the worker's alone, so it closes when that dies.

    torch's own watch does not help: it looks at the parent, which is the fork server, which lives as long as we do.
    """
    torch.set_num_threads(1)
    begin()
    threading.Thread(target=_end_with, args=(life, worker, folder), name="end-with-worker", daemon=True).start()


def _end_with(life: Connection, worker: int, folder: str) -> None:
    with contextlib.suppress(EOFError, OSError):
        life.recv_bytes()
    if folder and _is_gone(worker):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _is_gone(process: int) -> bool:
    """Whether a process that closed what it had open ended, which takes a moment, or goes on."""
    deadline = time.monotonic() + GONE_S
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):  # the latter: it ended while this was read
            return Path("/proc/self").exists()
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False
