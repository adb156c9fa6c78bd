"""Saving beside the training: the state is copied behind the next forward and backward pass, then uploaded.

save = saver.start(step, attempt, shards, on_end)    the state as it is now ...
forward and backward passes run saver.settle()                                       before anything writes to what is
saved ...                                                  `on_end(save)` is called when its bytes are durable, or
failed
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from elastic import fault
from elastic.checkpoint.format import Chunk, attempt_folder
from elastic.checkpoint.patience import Cancelled, is_no_room
from elastic.checkpoint.plan import Write, numbers_of, plan_lines, plan_save, statement
from elastic.checkpoint.save import Key, Save
from elastic.checkpoint.staging import StagingBuffer
from elastic.checkpoint.tensors import Shard
from elastic.checkpoint.uploader import IN_FLIGHT, PART_BYTES, Progress, UploadJob, perform
from elastic.checkpoint.uploader_client import HANG_TIMEOUT_S, Uploader, UploaderLost
from elastic.compat.torch import version_of
from elastic.errors import CheckpointError
from elastic.placement import Box, narrowed
from elastic.storage import Storage

SETTLE_S = 600.0
CLOSE_S = 5.0
UPLOADERS = 3  # attempts of a save, each with a fresh process, if uploaders die or stand still
_NOTIFY_BYTES = 32 << 20


class Saver:
    """A rank's saves, one at a time. All methods are called from one thread; `on_end` is called from another.

    Args:
        device: where the state lies.
        in_flight: the parts that are uploaded at a time.
        part_bytes: the size of a part.
        hang_timeout_s: an uploader that moves no bytes for so many seconds is replaced.
        on_restart: called from another thread when an uploader was replaced, with the save and why.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        device: torch.device | None = None,
        in_flight: int = IN_FLIGHT,
        part_bytes: int = PART_BYTES,
        hang_timeout_s: float = HANG_TIMEOUT_S,
        on_restart: Callable[[Save, str], None] = lambda save, why: None,
    ):
        self._hang_timeout_s, self._on_restart = hang_timeout_s, on_restart
        self._storage, self._in_flight, self._part_bytes = storage, in_flight, part_bytes
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if self._cuda else None
        self._buffer = StagingBuffer(pinned=self._cuda is not None)
        self._uploader: Uploader | None = None
        self._queue: queue.SimpleQueue[tuple[Save, list[Write], Callable[[Save], None] | None] | None]
        self._queue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._save: Save | None = None
        self._progress = Progress()
        self._unsteady: set[str] = set()  # shards that were said to be stable, but a forward pass wrote to
        # the boxes of frozen tensors that the newest committed checkpoint has, and where
        self._frozen: dict[Key, Chunk] = {}
        self._written: dict[tuple[int, str], dict[Key, Chunk]] = {}

    def reserve(self, size: int) -> None:
        """Take staging memory for saves of `size` bytes; a larger save takes more.

        Call it before the first save: with CUDA the memory is pinned, which takes a quarter of a second per GiB, and no
        step is to wait for that.
        """
        self._buffer.reserve(size)

    @property
    def busy(self) -> bool:
        """Whether a save is under way: its bytes are not durable yet, and its memory is in use."""
        return self._save is not None and not self._save.ended.is_set()

    def start(
        self,
        step: int,
        attempt: str,
        shards: Sequence[Shard],
        *,
        rank: int = 0,
        refer: bool = True,
        on_end: Callable[[Save], None] | None = None,
    ) -> Save:
        """Begin to save the state as it is now. Shards that are not stable are copied before this returns.

        Args:
            rank: names the pack.
            refer: the checkpoint that was last `committed` is the newest one, so this save may refer to its packs.
            on_end: called from another thread when the save has ended.

        Raises:
            CheckpointError: a name or dtype that checkpoints cannot have.
        """
        assert not self.busy, "one save at a time"
        began = time.perf_counter()
        fault.point("checkpoint.before_stage", rank, step)
        held = [shard.held for shard in shards]
        if not refer:
            self._frozen = {}

        def is_known(source: int, box: Box) -> bool:
            return shards[source].frozen and (shards[source].name, box.offsets, box.sizes) in self._frozen

        lines = plan_lines(held)
        writes = plan_save(held, is_known, lines)
        tail = next((w.start for w in writes if is_known(w.source, w.box)), writes[-1].end if writes else 0)
        save = Save(step, attempt, rank, list(shards), lines, writes, tail)
        self._buffer.reserve(save.size)
        self._save = save  # only now: no save is under way if memory ran out
        self._progress = Progress()
        later = []
        for write in writes:
            shard = shards[write.source]
            if shard.stable and shard.name not in self._unsteady:
                save.versions[write.source] = version_of(shard.tensor)
                later.append(write)
            else:
                self._copy(save, write)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._cuda))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint-saver", daemon=True)
            self._thread.start()
        self._queue.put((save, later, on_end))
        save.stall_s += time.perf_counter() - began
        return save

    def settle(self) -> float:
        """Wait until the whole state is copied, and return the seconds that took.

        Raises:
            CheckpointError: it took longer than SETTLE_S.
        """
        save = self._save
        if save is None or save.staged.is_set():
            return 0.0
        began = time.perf_counter()
        if not save.staged.wait(SETTLE_S):
            raise CheckpointError(f"copying the state of step {save.step} took more than {SETTLE_S:.0f} s")
        waited = time.perf_counter() - began
        save.stall_s += waited
        return waited

    def wait(self, timeout_s: float) -> Save:
        """Wait until the save that is under way has ended, and return it.

        Raises:
            CheckpointError: it did not end within `timeout_s`.
        """
        assert self._save is not None, "nothing was saved"
        if not self._save.ended.wait(timeout_s):
            raise CheckpointError(f"the upload of step {self._save.step} took more than {timeout_s:.0f} s")
        return self._save

    def cancel(self) -> None:
        """Call off the save that is under way. It ends soon, with an error; the state may be written to at once."""
        if self.busy:
            self.settle()
            self._progress.cancel()
            if self._uploader is not None:
                with contextlib.suppress(UploaderLost):
                    self._uploader.send({"do": "cancel"})

    def committed(self, step: int, attempt: str) -> None:
        """Note that a save of this rank is the newest committed one: later saves may refer to its frozen tensors."""
        self._frozen = self._written.pop((step, attempt), {})
        self._written = {key: chunks for key, chunks in self._written.items() if key[0] > step}

    def refer_to_nothing(self) -> None:
        """Forget what was written before: the next save writes all its bytes."""
        self._frozen, self._written = {}, {}

    def close(self) -> None:
        """Call off the save that is under way, end the uploader and free the memory."""
        self.cancel()
        if self._thread is not None:
            if self._save is not None and not self._save.ended.wait(CLOSE_S) and self._uploader is not None:
                self._uploader.kill()
            self._queue.put(None)
            self._thread.join(30)
        self._buffer.close()

    # ---- the saver's thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (work := self._queue.get()) is not None:
                save, later, on_end = work
                try:
                    self._carry_out(save, later)
                except Cancelled:
                    save.error = "called off"
                except Exception as error:  # the run goes on without this checkpoint, and its ledger says why
                    save.error = f"the state of step {save.step} could not be saved: {type(error).__name__}: {error}"
                    save.no_room = is_no_room(error)
                save.staged.set()
                if on_end is not None:
                    on_end(save)
                save.ended.set()
        finally:
            if self._uploader is not None:
                self._uploader.close()

    def _carry_out(self, save: Save, later: list[Write]) -> None:
        known = [self._frozen[save.key(w)] for w in save.writes if w.start >= save.tail]
        job = UploadJob(
            attempt_folder(save.step, save.attempt),
            save.pack,
            save.size,
            [(w.start, w.end) for w in save.writes],
            numbers_of(save.lines, save.writes),
            save.tail,
            [(c.pack, c.start, c.end, list(c.hashes), list(c.crcs)) for c in known],
            save.rank,
            save.step,
            self._in_flight,
            self._part_bytes,
        )
        if self._storage.in_process:
            self._stage(save, later, lambda ready, tail: None)
            self._progress.advance(save.tail, True)
            answer = perform(self._storage, job, self._buffer.view() if save.size else memoryview(b""), self._progress)
        else:
            answer = self._upload(save, job, later)
        if "error" in answer:
            save.error, save.no_room = answer["error"], answer.get("no_room", False)
            self._drop_uploader()  # the next one starts afresh, and with the credentials of that time
            return
        self._finish(save, answer)

    def _upload(self, save: Save, job: UploadJob, later: list[Write]) -> dict[str, Any]:
        """Stage and upload. An uploader that dies or stands still is replaced by one that begins anew."""
        for left in reversed(range(UPLOADERS)):
            try:
                return self._through_uploader(save, job, later)
            except UploaderLost as lost:
                self._drop_uploader()
                if self._progress.cancelled.is_set():
                    raise Cancelled from lost
                if not save.staged.is_set():
                    self._stage(save, later, lambda ready, tail: None)
                if not left:
                    return {"error": f"{job.path} could not be uploaded: {lost}, as those before"}
                self._on_restart(save, str(lost))
                job = replace(job, again=True)
        raise AssertionError("one of them returns")

    def _through_uploader(self, save: Save, job: UploadJob, later: list[Write]) -> dict[str, Any]:
        if self._uploader is None or not self._uploader.alive:
            self._drop_uploader()
            self._uploader = Uploader(self._storage.url, self._buffer.fd, self._hang_timeout_s)
        uploader = self._uploader
        uploader.start(job, self._buffer.size)
        try:
            if save.staged.is_set():
                self._announce(save.tail, True)
            else:
                self._stage(save, later, self._announce)
        except UploaderLost:
            raise
        except BaseException:
            self._progress.cancel()
            with contextlib.suppress(UploaderLost):
                uploader.send({"do": "cancel"})
                uploader.answer(self._progress.cancelled)
            raise
        if self._progress.cancelled.is_set():
            uploader.send({"do": "cancel"})
        return uploader.answer(self._progress.cancelled)

    def _drop_uploader(self) -> None:
        if self._uploader is not None:
            self._uploader.close()
            self._uploader = None

    def _announce(self, ready: int, tail: bool) -> None:
        assert self._uploader is not None
        self._uploader.send({"do": "staged", "ready": ready, "tail": tail})

    def _stage(self, save: Save, later: list[Write], announce: Callable[[int, bool], None]) -> None:
        """Copy what was left for later: the tail first, since its hashes decide what is uploaded, then from the
        front."""
        done = 0
        with torch.no_grad(), torch.cuda.stream(self._stream):
            for write in (w for w in later if w.start >= save.tail):
                self._copy(save, write)
            self._synchronise()
            announce(0, True)
            for write in (w for w in later if w.start < save.tail):
                self._copy(save, write)
                if write.end - done >= _NOTIFY_BYTES:
                    self._synchronise()
                    done = write.end
                    announce(done, True)
            self._synchronise()
        fault.point("checkpoint.staged", save.rank, save.step)
        for source, version in save.versions.items():
            shard = save.shards[source]
            if version_of(shard.tensor) != version:
                self._unsteady.add(shard.name)
                raise CheckpointError(
                    f"{shard.name} was written to while it was copied; from now on it is copied before the next step"
                )
        save.staged.set()
        announce(save.tail, True)

    def _synchronise(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _copy(self, save: Save, write: Write) -> None:
        shard = save.shards[write.source]
        source = narrowed(shard.tensor.detach(), write.box, shard.box)
        room = self._buffer.bytes(write.start, write.end)
        if write.start % source.element_size() == 0:
            room.view(source.dtype).view(source.shape).copy_(source, non_blocking=self._cuda is not None)
        else:  # only frozen tensors, at the end of the pack, are not aligned
            room.copy_(source.contiguous().view(-1).view(torch.uint8))

    def _finish(self, save: Save, answer: dict[str, Any]) -> None:
        written: dict[Key, Chunk] = {}
        home = f"{attempt_folder(save.step, save.attempt)}/{save.pack}".partition("/")[2]
        for i, write in enumerate(save.writes):
            key = save.key(write)
            if write.start >= save.tail and not answer["uploaded"]:
                written[key] = self._frozen[key]
            elif save.shards[write.source].frozen:
                proofs = tuple(answer["hashes"][i]), tuple(answer["crcs"][i])
                written[key] = Chunk(write.box.offsets, write.box.sizes, home, write.start, write.end, *proofs)
        self._written[save.step, save.attempt] = written
        held = [shard.held for shard in save.shards]
        save.index = statement(save.pack, answer["index"], answer["used"], save.lines, held)
        save.facts = {k: answer[k] for k in ("bytes", "seconds", "cpu_s", "requests", "retries")}
        save.facts["stall_s"] = round(save.stall_s, 6)
