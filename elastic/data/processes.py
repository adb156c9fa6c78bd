"""Loader processes: those of torch's DataLoader, with the dataset pickled by value, restarted when one of them dies.

No other process can import what a job defines in a script or a notebook, so the dataset is sent to the processes by
value, and so are the batches that they return. Tensors go through torch's shared memory.
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
    """Processes that answer a queue of keys in order. The source of the keys can be replaced at any time.

    Args:
        dataset: maps a key to its answer, in each of the processes; it must not raise.
        sent: objects in the dataset that may not be picklable, by the name for an error message.
        count: the number of processes.
        prefetch: the number of keys that each process answers ahead.
        begin: called first in each process.
    """

    def __init__(
        self,
        dataset: Any,
        sent: dict[str, Any],
        *,
        count: int,
        prefetch: int,
        begin: Callable[[], None],
    ):
        self._dataset, self._sent, self._count, self._prefetch = dataset, sent, count, prefetch
        self._begin = begin
        self._keys = _Keys()
        self._answers: Iterator[Any] | None = None
        self._processes: list[BaseProcess] = []
        # The folder of multiprocessing's sockets, which a killed worker leaves behind. An inherited one is not ours.
        self._folder = util.get_temp_dir() if multiprocessing.parent_process() is None else ""
        self._life: tuple[Connection, Connection] | None = Pipe(duplex=False)

    def feed(self, source: Iterator[Any]) -> None:
        """Replace the source of the keys. Keys that were taken from the old source are answered first."""
        self._keys.source = source
        if self._answers is None:
            self._start()

    def _start(self) -> None:
        assert self._life is not None, "they were closed"
        before = set(multiprocessing.active_children())
        begin = partial(_begin, self._begin, self._life[0], os.getpid(), self._folder)
        loader: DataLoader[Any] = DataLoader(
            _Sent(self._dataset, self._sent, self._count),
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
        """Return the answers in the order of the keys. If the iterator raises, the processes can no longer be used:
        call `restart`."""
        assert self._answers is not None, "feed them first"
        return self._answers

    def restart(self, source: Iterator[Any]) -> str:
        """End the processes and start new ones with these keys.

        Returns:
            a description of how the dead processes ended, for a message.
        """
        wait([p.sentinel for p in self._processes], DYING_S)  # a dying process closes its connections before it ends
        how = self._end()
        self.feed(source)
        return how

    def renew(self, source: Iterator[Any]) -> bool:
        """Start processes with these keys and the dataset as it is now; returns whether there were others."""
        others = self._answers is not None
        if others:
            self._end()
        self.feed(source)
        return others

    def _end(self) -> str:
        codes = [p.exitcode for p in self._processes if p.exitcode is not None]
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(END_S)
        held: list[Any] = [self._answers]
        self._answers, self._processes = None, []
        # On a thread, because torch, when it ends the others, waits for a lock that a killed process may have held.
        threading.Thread(target=held.clear, name="drop-loader", daemon=True).start()
        return ", ".join(map(_exit_text, codes)) or "they did not answer as they should"

    def close(self) -> None:
        """End the processes."""
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
    """A dataset that is sent to a process: it is unpickled there as a `_Received`, and never used here."""

    def __init__(self, dataset: Any, sent: dict[str, Any], count: int):
        self._dataset, self._sent, self._count = dataset, sent, count

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        try:
            return _Received, (_by_value(self._dataset),)
        except Exception as error:
            found = [(name, why) for name, value in self._sent.items() if (why := _why_unsendable(value)) is not None]
            name, why = found[0] if found else ("the training data", one_line(error))
            raise ConfigError(
                f"{name} cannot be sent to loader processes ({why}): make what cannot be sent, such as open files and "
                f"connections, at the first sample, or give --data.workers 0 instead of {self._count}"
            ) from error


class _Received(Dataset[Any]):
    """A dataset in a loader process."""

    def __init__(self, data: bytes):
        self._dataset = pickle.loads(data)
        self._pickle: Callable[[Any], bytes] = _by_name

    def __getitem__(self, key: Any) -> Any:
        return _Answer(self, self._dataset[key])

    def pickled(self, value: Any) -> bytes:
        """Pickle an answer: by name until that fails once, from then on by value. If that fails too, send what the
        dataset's `unsendable` returns."""
        with contextlib.suppress(Exception):
            return self._pickle(value)
        self._pickle = _by_value  # for good, because each failed attempt leaves descriptors of tensors open
        try:
            return _by_value(value)
        except Exception as error:
            return pickle.dumps(self._dataset.unsendable(value, error))


class _Answer:
    """An answer that is sent back."""

    def __init__(self, dataset: _Received, value: Any):
        self._dataset, self._value = dataset, value

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return pickle.loads, (self._dataset.pickled(self._value),)


def _by_name(value: Any) -> bytes:
    return bytes(ForkingPickler.dumps(value))


def _by_value(value: Any) -> bytes:
    """Pickle a value together with the definitions that no other process can import; tensors as torch sends them."""
    import cloudpickle

    buffer = io.BytesIO()
    pickler: Any = cloudpickle.Pickler(buffer)
    pickler.dispatch_table = ChainMap(ForkingPickler(io.BytesIO()).dispatch_table, pickler.dispatch_table)
    pickler.dump(value)
    return buffer.getvalue()


def _why_unsendable(value: Any) -> str | None:
    import cloudpickle

    try:
        cloudpickle.dumps(value)
    except Exception as error:  # an object's own pickling may raise anything
        return one_line(error)
    return None


def _exit_text(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"killed by signal {-exit_code}"


def _begin(begin: Callable[[], None], life: Connection, worker: int, folder: str, _: int) -> None:
    """Begin a loader process, and have it end when its worker dies: only the worker holds the other end of `life`, so
    that end closes then.

    torch's own check does not help: it watches the parent, but the parent is the fork server, which may outlive the
    worker.
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
    """Whether a process that closed its connections has ended, which takes a moment, rather than goes on."""
    deadline = time.monotonic() + GONE_S
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):  # the latter: it ended while its file was read
            return Path("/proc/self").exists()
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False
