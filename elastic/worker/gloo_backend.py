"""Gloo, for worlds on CPUs. Waiting threads are freed by shutting down its sockets, and directly where gloo fails
to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from elastic.parallel import gloo
from elastic.worker.backend import Backend
from elastic.worker.sockets import any_connected, knock, open_sockets, opened_since, shut_down, use_interface_of

FREE_S = 0.02


class GlooBackend(Backend):
    """Gloo connects while torch makes a group, so `free` must also shut down sockets that are still being opened."""

    name = gloo.BACKEND

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._sockets: dict[str, int] = {}
        self._before: dict[str, int] | None = None  # while members connect: the sockets that were open before
        self._freeing: threading.Thread | None = None
        self._closed = False
        self._lock = threading.Lock()

    @staticmethod
    def prepare(address: str) -> None:
        use_interface_of(address)

    @contextmanager
    def connecting(self) -> Iterator[None]:
        before = self._before = open_sockets()
        try:
            if self.freed:
                raise self.broken()
            yield
            self._sockets = opened_since(before)
        finally:
            self._before = None
            if self._freeing is not None:
                self._freeing.join()  # it must not touch sockets that are opened later
        if self.freed:  # the thread that freed it may have seen no sockets yet
            raise self.broken()

    def open(self, store: dist.Store, timeout_s: float) -> None:
        """Does nothing: torch connected the groups when it made them."""

    def free(self) -> None:
        self.freed = True
        with self._lock:
            if self._freeing is None and not self._closed:
                thread = threading.Thread(target=self._free, name="free-group", daemon=True)
                thread.start()
                self._freeing = thread

    def _free(self) -> None:
        while (before := self._before) is not None:
            sockets = opened_since(before)
            shut_down(sockets)
            knock(sockets, self.size)
            self._end_waits(sockets)
            time.sleep(FREE_S)
        shut_down(self._sockets)
        self._end_waits(self._sockets)

    def _end_waits(self, sockets: dict[str, int]) -> None:
        groups = gloo.groups()
        gloo.settle(groups, lambda: any_connected(sockets))
        for group in groups:
            group.free(f"world {self.world} is broken")

    def has_failed(self) -> bool:
        return any(group.failure is not None for group in gloo.groups())

    def close(self) -> None:
        """Drop the groups; peers blocked in them are freed."""
        with self._lock:
            self._closed = True  # sockets that this process opens later belong to another world
        if self._freeing is not None:
            self._freeing.join()
        if (groups := gloo.groups()) and any(group.is_running for group in groups):
            shut_down(self._sockets)  # one of several pending operations has failed
            gloo.settle(groups, lambda: any_connected(self._sockets))
        if dist.is_initialized():
            dist.destroy_process_group()
        for group in groups:
            group.shutdown()
