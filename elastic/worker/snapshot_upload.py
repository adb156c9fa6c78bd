"""A worker's part of a snapshot on its way: copied behind the next pass, then sent to the vaults, all on the side."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from elastic import fault
from elastic.checkpoint.staging import StagingBuffer
from elastic.checkpoint.tensors import Shard
from elastic.compat.torch import version_of
from elastic.errors import SnapshotError
from elastic.snapshot.client import VaultClient
from elastic.snapshot.holdings import SnapshotId
from elastic.worker.snapshot_layout import Head, starts

SETTLE_S = 600.0
SEND_S = 20.0  # a vault that takes nothing for so long is given up
CLOSE_S = 60.0
CALLED_OFF = "called off"


@dataclass
class Part:
    """One worker's part of a snapshot. `error` says why it is not in every vault, once it `ended`."""

    id: SnapshotId
    shard: int
    shards: int
    rank: int
    urls: tuple[str, ...]
    keep: SnapshotId | None
    values: dict[str, Any]
    heads: list[Head]
    tensors: list[Shard]
    error: str | None = None
    staged: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    versions: dict[int, int] = field(default_factory=dict)

    @property
    def head(self) -> bytes:
        """What the vault keeps beside the bytes: how to read all parts, in the first one; JSON."""
        if self.shard:
            return b"{}"
        heads = [[h.name, h.dtype, list(h.shape), h.cut] for h in self.heads]
        return json.dumps({"shards": self.shards, "values": self.values, "tensors": heads}).encode()


class Sender:
    """Sends one part at a time. All methods from the training thread; `on_end` is called from another."""

    def __init__(self, token: str, device: torch.device, on_end: Callable[[Part], None]):
        self._token, self._on_end = token, on_end
        self._cuda = device if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._buffer = StagingBuffer(pinned=self._cuda is not None)
        self._queue: queue.SimpleQueue[tuple[Part, list[int], list[int]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._unsteady: set[str] = set()  # said to be stable, but written to in a forward pass
        self._vault: VaultClient | None = None
        self._part: Part | None = None
        self._cut = threading.Event()

    def start(self, part: Part) -> None:
        """Begin with the state as it is now. What a forward pass may move is copied before this returns.

        Raises:
            MemoryError, OSError: there is no room for the copy.
        """
        assert self._part is None or self._part.ended.is_set(), "one part at a time"
        fault.point("snapshot.begin", part.rank, part.id.step)
        places = starts(part.heads, part.shard, part.shards)
        self._buffer.reserve(places[-1])
        self._cut.clear()
        later = []
        for i, tensor in enumerate(part.tensors):
            if not len(part.heads[i].rows(part.shard, part.shards)):
                continue
            if tensor.stable and tensor.name not in self._unsteady:
                part.versions[i] = version_of(tensor.tensor)
                later.append(i)
            else:
                self._copy(part, i, places)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._cuda))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="snapshot-sender", daemon=True)
            self._thread.start()
        self._part = part
        self._queue.put((part, later, places))

    def settle(self) -> float:
        """To be called before the state is written to; returns the seconds that it waited.

        Raises:
            SnapshotError: copying took longer than SETTLE_S.
        """
        part = self._part
        if part is None or part.staged.is_set():
            return 0.0
        began = time.perf_counter()
        if not part.staged.wait(SETTLE_S):
            raise SnapshotError(f"copying the state of step {part.id.step} took more than {SETTLE_S:.0f} s")
        return time.perf_counter() - began

    def wait(self, timeout_s: float) -> None:
        """Give what is under way the time to arrive."""
        if self._part is not None:
            self._part.ended.wait(timeout_s)

    def cancel(self) -> None:
        """Call off what is under way; returns when it has ended.

        Raises:
            SnapshotError: it did not end.
        """
        part, self._part = self._part, None
        if part is None or part.ended.is_set():
            return
        self._cut.set()
        deadline = time.monotonic() + CLOSE_S
        while not part.ended.wait(0.05):
            if (vault := self._vault) is not None:
                vault.cut()
            if time.monotonic() > deadline:
                raise SnapshotError(f"sending the state of step {part.id.step} was called off and did not end")

    def close(self) -> None:
        """Call off what is under way, and give the memory back."""
        self.cancel()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(CLOSE_S)
        self._buffer.close()

    # ---- the sender's thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            part = work[0]
            try:
                self._carry_out(*work)
            except Exception as error:  # the run goes on without this snapshot, and its ledger says why
                known = isinstance(error, SnapshotError)
                part.error = str(error) if known else f"{type(error).__name__}: {error}"
                part.error = CALLED_OFF if self._cut.is_set() else part.error
            part.tensors = []  # a new world may have replaced them
            part.staged.set()
            self._on_end(part)
            part.ended.set()

    def _carry_out(self, part: Part, later: list[int], places: list[int]) -> None:
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for i in later:
                self._copy(part, i, places)
            if self._stream is not None:
                self._stream.synchronize()
        for i, version in part.versions.items():
            tensor = part.tensors[i]
            if version_of(tensor.tensor) != version:
                self._unsteady.add(tensor.name)
                raise SnapshotError(
                    f"{tensor.name} was written to while it was copied; from now on it is copied before the next step"
                )
        part.staged.set()
        fault.point("snapshot.staged", part.rank, part.id.step)
        head, body = part.head, memoryview(self._buffer.view())[: places[-1]] if places[-1] else memoryview(b"")
        digest = xxhash.xxh3_64(head)
        digest.update(body)
        for i, url in enumerate(part.urls):
            if self._cut.is_set():
                raise SnapshotError(CALLED_OFF)
            self._vault = VaultClient(url, self._token, SEND_S)
            try:
                self._vault.put(part.id, part.shard, part.shards, head, body, digest.hexdigest(), part.keep)
            finally:
                self._vault.close()
            fault.point("snapshot.sent" if i else "snapshot.kept", part.rank, part.id.step)

    def _copy(self, part: Part, i: int, places: Sequence[int]) -> None:
        source = part.tensors[i].tensor.detach()
        count = source.numel() * source.element_size()
        room = self._buffer.bytes(places[i], places[i] + count)
        room.view(source.dtype).view(source.shape).copy_(source, non_blocking=self._cuda is not None)
