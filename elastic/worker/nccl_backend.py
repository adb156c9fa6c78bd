"""NCCL, for worlds on GPUs, through torch. Once a world is broken, no result of NCCL is trusted.

NCCL's calls return before their work is done, and a lost peer raises no error: kernels wait for it for ever. Waiting
threads are freed by aborting the communicators; then all enqueued work "succeeds" with arbitrary results. An abort
takes half a second or more, and crashes if two aborts of one communicator run at the same time. So aborts run in
threads of their own, with a time limit after which this process exits: its device would be unusable.

A thread that makes a communicator cannot be freed: an abort does not see that communicator yet, or, where it is made
without blocking, waits for a lock that torch holds meanwhile (measured on a H200, torch 2.11). The thread is left
behind, and spins; the next world works (measured). So communicators are made once all members are here: only a member
that is lost within the moments after that leaves such threads.

Evidence: torch's ProcessGroupNCCL.cpp and NCCLUtils.cpp, torch issues 119797 and 153960, NCCL issue 863, and NVIDIA's
nvidia-resiliency-ext, whose in-process restart does the same; `jobs.bench.gpu --only creation connecting kills`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from elastic.compat.torch_groups import failure_of_group, forget_groups, process_groups
from elastic.errors import WorldBroken, one_line
from elastic.parallel.device import synchronize
from elastic.parallel.nccl import make_settings
from elastic.worker.backend import Backend
from elastic.worker.nccl_report import ask_nccl
from elastic.worker.sockets import interface_of

ABORT_S = 20.0  # NVIDIA's in-process restart measures 0.5 s, and 0.01 s more for each waiting kernel
CONNECT_S = 2.0  # that a thread making a communicator has to return, after its world broke
LOOK_S = 1.0  # between two looks at the errors that NCCL found
POLL_S = 0.01
UNUSED_S = 1.0  # that the abort of a communicator has which may not be made yet


class NcclBackend(Backend):
    """torch knows each group before a thread waits in it: NCCL makes its communicator after that."""

    name = "nccl"
    leaves_garbage = True

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._connected: set[dist.ProcessGroup] = set()
        self._unused: set[dist.ProcessGroup] = set()  # groups whose communicator may not be made yet
        self._opened = 0  # calls of `open`
        self._aborts: dict[dist.ProcessGroup, threading.Thread] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._looking: threading.Thread | None = None

    @staticmethod
    def prepare(address: str) -> None:
        make_settings(interface_of(address))

    # ---- connecting ------------------------------------------------------------------------------------------------

    @contextmanager
    def connecting(self) -> Iterator[None]:
        if self.freed:
            raise self.broken()
        yield
        if self.freed:  # perhaps before there was any group to abort
            raise self.broken()
        self._looking = threading.Thread(target=self._look, name="watch-communicators", daemon=True)
        self._looking.start()

    def open(self, store: dist.Store, timeout_s: float) -> None:
        new = [group for group in process_groups() if group not in self._connected]
        self._connected.update(new)
        self._unused.update(new)
        self._opened += 1
        self._beside(partial(self._make, new, store, timeout_s))
        if self.freed:
            raise self.broken()

    def _make(self, groups: list[dist.ProcessGroup], store: dist.Store, timeout_s: float) -> None:
        """Make the communicators of these groups, by a first sum over each."""
        self._wait_until_all_are_here(store, timeout_s)
        for group in groups:
            if self._over:
                return
            one = torch.ones(1, device=self.device)
            try:
                dist.all_reduce(one, group=group)
            finally:
                self._unused.discard(group)
                if self._over:
                    self._abort_late(group)
            if not self._over:
                one.item()

    @property
    def _over(self) -> bool:
        """Whether this world is broken, or closed already while a thread was left behind."""
        return self.freed or self._closed.is_set()

    def _wait_until_all_are_here(self, store: dist.Store, timeout_s: float) -> None:
        """Wait until all members have come here; returns earlier when the world is freed.

        Raises:
            WorldBroken: some did not come within the time-out.
        """
        until, key, pause_s = time.monotonic() + timeout_s, f"here/{self._opened}", 0.001
        if self._over:
            return  # the others would count on this member
        here = store.add(key, 1)
        while here < self.size and not self._over:
            if time.monotonic() > until:
                raise WorldBroken(
                    f"{self.size - here} of {self.size} members of world {self.world} did not come to connect within "
                    f"{timeout_s:g} s"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_S * (1 + self.size // 64))
            here = store.add(key, 0)

    def _beside(self, work: Callable[[], None]) -> None:
        """Run `work` in another thread, and leave that thread behind if it does not return from a broken world.

        Raises:
            WorldBroken: it does not return.
        """
        failed: list[Exception] = []

        def attempt() -> None:
            try:
                work()
            except Exception as error:  # raised again below
                failed.append(error)

        thread = threading.Thread(target=attempt, name="connect-group", daemon=True)
        thread.start()
        left: float | None = None
        while thread.is_alive():
            if self.freed and left is None:
                left = time.monotonic() + CONNECT_S
            if left is not None and time.monotonic() > left:
                raise self.broken()
            thread.join(POLL_S)
        if failed:
            raise failed[0]

    # ---- freeing ---------------------------------------------------------------------------------------------------

    def free(self) -> None:
        with self._lock:
            self.freed = True
            if not self._closed.is_set():
                self._abort()

    def _abort(self) -> None:
        """Begin to abort each group, once, all at the same time: communicators whose kernels wait for each other could
        not be aborted one after another."""
        for group in process_groups():
            if group not in self._aborts:
                abort = self._abort_unused if group in self._unused else self._abort_one
                thread = threading.Thread(target=abort, args=(group,), name="abort-group", daemon=True)
                self._aborts[group] = thread
                thread.start()

    def _abort_unused(self, group: dist.ProcessGroup) -> None:
        """Abort a group whose communicator may not be made yet, or came too late. This may wait for ever, and then does
        no harm."""
        try:
            group.abort()
        except Exception as error:  # nothing ran on it, and the process goes on
            print(f"aborting a communicator of world {self.world} failed: {one_line(error)}", file=sys.stderr)

    def _abort_late(self, group: dist.ProcessGroup) -> None:
        """Abort a communicator again that was made while its world broke: the abort may not have seen it. Otherwise the
        kernel that was just begun would wait for ever."""
        with self._lock:
            before = self._aborts.get(group)
        if before is not None:
            before.join()
        if self._closed.is_set():  # this process is in its next world, and is not to end for this one
            self._abort_unused(group)
        else:
            self._abort_one(group)

    def _abort_one(self, group: dist.ProcessGroup) -> None:
        with self._limited("aborting a communicator"):
            group.abort()

    @contextmanager
    def _limited(self, what: str) -> Iterator[None]:
        """If something inside takes too long, or fails, end this process at once: its state is lost or may be wrong.
        The other workers go on."""
        late = threading.Timer(ABORT_S, self._leave, (f"{what} took more than {ABORT_S:g} s",))
        late.daemon = True
        late.start()
        try:
            yield
        except Exception as error:  # after any error here this process cannot use the device any more
            self._leave(f"{what} failed: {one_line(error)}")
        finally:
            late.cancel()

    def _leave(self, why: str) -> NoReturn:
        print(f"this worker leaves after world {self.world} broke: {why}", file=sys.stderr, flush=True)
        os._exit(1)

    def has_failed(self) -> bool:
        return False  # NCCL's operations raise errors of torch's own type, or none

    def report(self) -> str:
        return ask_nccl()

    def close(self) -> None:
        """Abort, and wait until the device is idle. Destroying groups would wait for the other members, which may wait
        for this one's next message. Work for an update has been waited for before."""
        with self._lock:
            self._closed.set()  # groups that torch makes later belong to another world
            self._abort()
        if self._looking is not None:
            self._looking.join()
        if self._aborts:
            with self._limited("aborting the communicators"):
                for group, thread in self._aborts.items():
                    thread.join(UNUSED_S if group in self._unused else None)
            with self._limited("what the device still had to do"):  # it may write to memory that is used again
                synchronize(self.device)
        self._connected.clear()
        forget_groups()

    # ---- looking ---------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Ask for errors that NCCL found, such as a lost network: a thread that waits for a kernel never sees them."""
        while not self._closed.wait(LOOK_S) and not self.freed:
            for group in list(self._connected):
                failure = failure_of_group(group, self.device)
                if failure is not None and not self.freed:
                    self.on_failure(f"NCCL reports {failure}")
                    return
