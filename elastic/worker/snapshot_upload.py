"""The upload of a worker's part of a snapshot: a thread copies it during the next forward and backward pass and then
sends it to the vaults."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash

from elastic import fault
from elastic.checkpoint.tensors import Shard
from elastic.compat.torch import version_of
from elastic.errors import SnapshotError
from elastic.placement import Part, TensorSpec
from elastic.snapshot.client import VaultClient
from elastic.snapshot.holdings import SnapshotId
from elastic.worker.snapshot_buffers import Buffer, Buffers
from elastic.worker.snapshot_layout import starts

SETTLE_S = 600.0
SEND_S = 20.0  # the upload fails when a vault accepts no bytes for so long
CLOSE_S = 60.0
CALLED_OFF = "called off"


@dataclass
class Upload:
    """One worker's part of a snapshot under way. Once `ended` is set, `error` gives the reason if the part is not in
    every vault. By index, `copies` has the tensors that a forward pass may change, as they were when it began, and
    `versions` the version counters of the others."""

    id: SnapshotId
    part: Part
    rank: int
    urls: tuple[str, ...]
    keep: SnapshotId | None
    values: dict[str, Any]
    specs: list[TensorSpec]
    tensors: list[Shard]
    error: str | None = None
    staged: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    versions: dict[int, int] = field(default_factory=dict)
    copies: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def head(self) -> bytes:
        """The description that the vault keeps beside the bytes, as JSON. That of the first part tells how to read all
        parts; the others are empty."""
        if self.part.first(()) != self.part:
            return b"{}"
        return json.dumps({"values": self.values, "tensors": [spec.to_json() for spec in self.specs]}).encode()


class Sender:
    """Sends one upload at a time. All methods are called from the training thread; `on_end` is called from another.

    Args:
        own: the URL of the vault on this worker's node. This vault maps the memory to which the worker copied; the
            bytes are sent to other vaults.
    """

    def __init__(self, own: str, token: str, device: torch.device, on_end: Callable[[Upload], None]):
        self._own, self._token, self._on_end = own, token, on_end
        self.maps = True  # whether the vault of this node can map memory
        self._cuda = device if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._buffers = Buffers(own, token, pinned=self._cuda is not None)
        self._queue: queue.SimpleQueue[Upload | SnapshotId | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._unsteady: set[str] = set()  # declared stable, but written to in a forward pass
        self._vaults: dict[str, VaultClient] = {}  # by their URLs, as of the last upload
        self._upload: Upload | None = None
        self._cut = threading.Event()

    def start(self, upload: Upload) -> None:
        """Begin to upload the state as it is now. Tensors that a forward pass may change are copied before this
        returns."""
        assert self._upload is None or self._upload.ended.is_set(), "one upload at a time"
        fault.point("snapshot.begin", upload.rank, upload.id.step)
        places = starts(upload.specs, upload.part)
        self._cut.clear()
        for i, tensor in enumerate(upload.tensors):
            if places[i] == places[i + 1]:  # another part holds it, or it is empty
                continue
            if tensor.stable and tensor.name not in self._unsteady:
                upload.versions[i] = version_of(tensor.tensor)
            else:
                upload.copies[i] = tensor.tensor.detach().clone()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._cuda))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="snapshot-sender", daemon=True)
            self._thread.start()
        self._upload = upload
        self._queue.put(upload)

    def complete(self, id: SnapshotId) -> None:
        """Note that a snapshot is complete: the memory of earlier snapshots can be used again."""
        if self._thread is not None:
            self._queue.put(id)

    def settle(self) -> float:
        """Wait until the state is copied; call this before the state is written to. Returns the seconds that it waited.

        Raises:
            SnapshotError: copying took longer than SETTLE_S.
        """
        upload = self._upload
        if upload is None or upload.staged.is_set():
            return 0.0
        began = time.perf_counter()
        if not upload.staged.wait(SETTLE_S):
            raise SnapshotError(f"copying the state of step {upload.id.step} took more than {SETTLE_S:.0f} s")
        return time.perf_counter() - began

    def wait(self, timeout_s: float) -> None:
        """Wait until the upload under way has ended, for `timeout_s` at most."""
        if self._upload is not None:
            self._upload.ended.wait(timeout_s)

    def cancel(self) -> None:
        """Call off the upload under way and wait until it has ended.

        Raises:
            SnapshotError: it did not end within CLOSE_S.
        """
        upload, self._upload = self._upload, None
        if upload is None or upload.ended.is_set():
            return
        self._cut.set()
        deadline = time.monotonic() + CLOSE_S
        while not upload.ended.wait(0.05):
            for vault in list(self._vaults.values()):
                vault.cut()
            if time.monotonic() > deadline:
                raise SnapshotError(f"sending the state of step {upload.id.step} was called off and did not end")

    def close(self) -> None:
        """Call off the upload under way and free the memory."""
        self.cancel()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(CLOSE_S)
        self._buffers.close()

    # ---- the sender's thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            if isinstance(work, SnapshotId):
                self._buffers.reclaim({work})
                continue
            try:
                self._carry_out(work)
            except Exception as error:  # the run goes on without this snapshot; the ledger gets the reason
                known = isinstance(error, SnapshotError)
                work.error = str(error) if known else f"{type(error).__name__}: {error}"
                work.error = CALLED_OFF if self._cut.is_set() else work.error
                self._forget_vaults()
            self._buffers.end(work.id)
            work.tensors, work.copies = [], {}  # a new world may have replaced them
            work.staged.set()
            self._on_end(work)
            work.ended.set()
        self._forget_vaults()

    def _forget_vaults(self, but: Collection[str] = ()) -> None:
        for url, vault in list(self._vaults.items()):
            if url not in but or vault.is_cut:
                self._vaults.pop(url).close()

    def _carry_out(self, upload: Upload) -> None:
        places = starts(upload.specs, upload.part)
        size, buffer = places[-1], self._buffer_for(upload, places[-1])
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for i in upload.versions.keys() | upload.copies.keys():
                source = upload.copies.get(i, upload.tensors[i].tensor.detach())
                target = buffer.staging.bytes(places[i], places[i] + source.numel() * source.element_size())
                target.view(source.dtype).view(source.shape).copy_(source, non_blocking=self._cuda is not None)
            if self._stream is not None:
                self._stream.synchronize()
        for i, version in upload.versions.items():
            tensor = upload.tensors[i]
            if version_of(tensor.tensor) != version:
                self._unsteady.add(tensor.name)
                raise SnapshotError(
                    f"{tensor.name} was written to while it was copied; from now on it is copied before the next step"
                )
        upload.staged.set()
        fault.point("snapshot.staged", upload.rank, upload.id.step)
        head, body = upload.head, memoryview(buffer.staging.view())[:size]
        digest = ""
        self._forget_vaults(upload.urls)
        for i, url in enumerate(upload.urls):
            vault = self._vaults.setdefault(url, VaultClient(url, self._token, SEND_S))
            if self._cut.is_set():
                raise SnapshotError(CALLED_OFF)
            if url == self._own and self.maps:
                vault.adopt(upload.id, upload.part, head, self._buffers.lend(buffer, size), upload.keep)
            else:
                digest = digest or _digest(head, body)
                vault.put(upload.id, upload.part, head, body, digest, upload.keep)
            fault.point("snapshot.sent" if i else "snapshot.kept", upload.rank, upload.id.step)

    def _buffer_for(self, upload: Upload, size: int) -> Buffer:
        """Return memory for an upload. It is taken only here, on this thread: by then what earlier snapshots held is
        free again, and new memory, whose pages the kernel would have to clear, is needed in a world's first two
        snapshots only."""
        try:
            self._buffers.reclaim(set() if upload.keep is None else {upload.keep})
            return self._buffers.take(upload.id, size)
        except (MemoryError, OSError) as error:
            raise SnapshotError(f"no memory to copy the state of step {upload.id.step}: {error}") from error


def _digest(head: bytes, body: memoryview) -> str:
    digest = xxhash.xxh3_64(head)
    digest.update(body)
    return digest.hexdigest()
