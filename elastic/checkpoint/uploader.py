"""The uploader: a process beside a worker that hashes and uploads what the worker staged in shared memory.

It is a process of its own so that uploading takes neither the worker's interpreter lock nor, if it crashes, the
worker's life. It imports no torch, knows no group, and the kernel ends it with the thread that started it. Both ends
exchange lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from elastic import fault
from elastic.checkpoint.blocks import crc_blocks, hash_blocks
from elastic.checkpoint.pack_index import PackIndex, Place, put_index
from elastic.checkpoint.patience import Cancelled, is_no_room, patiently
from elastic.checkpoint.uploads import Upload, discard_partial, open_upload
from elastic.child import die_with_starter, ignore_terminal, show_stack_at_death
from elastic.storage import Storage

PART_BYTES = 16 << 20
LEAST_PART_BYTES = 5 << 20  # S3 takes no smaller parts
IN_FLIGHT = 16
_MOST_PARTS = 10_000  # S3 takes no more parts of one object
TELL_S = 0.2  # seconds between lines that tell the worker that bytes moved


@dataclass(frozen=True)
class UploadJob:
    """A pack to upload: the first `size` bytes of the shared memory.

    Args:
        folder, name: the path of the object.
        size: bytes.
        chunks: bytes [start, end) of each box of a tensor.
        numbers: the tensor of each chunk, as the pack's index counts them.
        tail: the chunks from this byte on need no upload if they have the hashes in `known`.
        known: where an earlier checkpoint has the chunks of the tail: (pack, start, end, hashes, crcs).
        rank, step: for messages and faults.
        in_flight: parts that are uploaded at a time.
        again: an earlier uploader may have left a part of the object.
    """

    folder: str
    name: str
    size: int
    chunks: list[tuple[int, int]]
    numbers: list[int]
    tail: int
    known: list[tuple[str, int, int, list[str], list[int]]]
    rank: int
    step: int
    in_flight: int = IN_FLIGHT
    part_bytes: int = PART_BYTES
    again: bool = False

    @property
    def path(self) -> str:
        """The path of the object, from the root of the storage."""
        return f"{self.folder}/{self.name}"


class Progress:
    """How far staging is, whether the upload is called off, and how often something moved. Safe from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.moved = 0
        self._ready, self._tail = 0, False
        self.cancelled = threading.Event()

    def advance(self, ready: int, tail: bool) -> None:
        """Note that the tail, or the bytes below `ready`, are staged."""
        with self._changed:
            self._ready, self._tail = ready, tail
            self._changed.notify_all()

    def move(self) -> None:
        """Note that bytes were hashed or sent, or that a request was retried: the uploader does not stand still."""
        self.moved += 1

    def cancel(self) -> None:
        """Call the upload off; all that wait are freed."""
        with self._changed:
            self.cancelled.set()
            self._changed.notify_all()

    def await_ready(self, upto: int, *, tail: bool = False) -> None:
        """Wait until the bytes below `upto`, or those of the tail, are staged.

        Raises:
            Cancelled: the upload was called off.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.cancelled.is_set() or (self._tail if tail else self._ready >= upto)
            )  # staging ends or is cancelled; if the worker dies, so does this process
        if self.cancelled.is_set():
            raise Cancelled


def perform(storage: Storage, job: UploadJob, data: memoryview, progress: Progress) -> dict[str, Any]:
    """Hash a pack and upload it while it is being staged, then upload its index.

    Args:
        data: the shared memory.

    Returns:
        `hashes` and `crcs` of each chunk's blocks; `uploaded`: whether the tail was uploaded too; `index`: size and
        hash of the index; `used`: bytes and end of each pack that the index names; and `bytes`, `seconds`, `cpu_s`,
        `requests` and `retries`.

    Raises:
        Cancelled: the worker called the upload off; nothing is left of the object.
        Exception: what storage raised after all retries.
    """
    began, cpu = time.monotonic(), time.process_time()
    fault.point("upload.begin", job.rank, job.step)
    hashes: dict[int, tuple[str, ...]] = {}
    tail = [i for i, (start, _) in enumerate(job.chunks) if start >= job.tail]
    if tail:
        progress.await_ready(0, tail=True)
        for i in tail:
            hashes[i] = hash_blocks(data[slice(*job.chunks[i])])
    uploaded = not tail or [list(hashes[i]) for i in tail] != [list(known[3]) for known in job.known]
    size = job.size if uploaded else job.tail
    counts = {"requests": 0, "retries": 0}
    crcs: dict[int, tuple[int, ...]] = {}
    said: dict[str, Any] = {}

    def prove() -> None:
        for i, (start, end) in enumerate(job.chunks):
            progress.await_ready(min(end, job.tail))
            view = data[start:end]
            if i not in hashes:
                hashes[i] = hash_blocks(view)
            crcs[i] = crc_blocks(view)
            progress.move()
        places = {}
        for i, number in enumerate(job.numbers):
            places[number] = Place(job.name, *job.chunks[i], hashes[i], crcs[i])
            if i >= len(job.chunks) - len(tail) and not uploaded:
                pack, start, end, known, known_crcs = job.known[i - len(job.chunks) + len(tail)]
                places[number] = Place(pack, start, end, tuple(known), tuple(known_crcs))
        said.update(put_index(storage, job.folder, PackIndex.of(job.name, places), progress.cancelled))

    if size:
        _upload(storage, job, data[:size], progress, counts, prove)
    else:
        prove()
    fault.point("upload.end", job.rank, job.step)
    return {
        "hashes": [hashes[i] for i in range(len(job.chunks))],
        "crcs": [crcs[i] for i in range(len(job.chunks))],
        **said,
        "uploaded": uploaded,
        "bytes": size,
        "seconds": round(time.monotonic() - began, 4),
        "cpu_s": round(time.process_time() - cpu, 4),
        **counts,
    }


def _upload(
    storage: Storage, job: UploadJob, data: memoryview, progress: Progress, counts: dict[str, int], prove: Any
) -> None:
    part = max(job.part_bytes, -(-len(data) // _MOST_PARTS))
    even = -(-len(data) // job.in_flight)  # a small pack is cut into as many parts as can be in flight
    part = min(part, max(even, min(LEAST_PART_BYTES, part)))
    if job.again:
        discard_partial(storage, job.path)
    upload: Upload = open_upload(storage, job.path, len(data), part, progress.move)

    def retried() -> None:
        counts["retries"] += 1
        progress.move()

    def put(number: int) -> None:
        start = number * part
        piece = data[start : start + part]
        progress.await_ready(min(start + len(piece), job.tail))
        fault.point("upload.part", job.rank, job.step)
        patiently(
            upload.put,
            number,
            start,
            piece,
            cancelled=progress.cancelled,
            on_retry=retried,
            retry_s=120.0 if upload.parallel else 0.0,
        )
        counts["requests"] += 1
        progress.move()

    parts = range(-(-len(data) // part))
    try:
        with ThreadPoolExecutor(job.in_flight if upload.parallel else 1, "upload-part") as pool:
            waiting = [pool.submit(prove)] if not upload.parallel else []
            waiting += [pool.submit(put, number) for number in parts]
            try:
                if upload.parallel:
                    prove()
                wait(waiting, return_when=FIRST_EXCEPTION)
                for done in waiting:
                    if done.done():
                        done.result()
            except BaseException:
                progress.cancel()  # frees the threads that still wait for staging, so that the pool can end
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        fault.point("upload.before_complete", job.rank, job.step)
        patiently(upload.complete, cancelled=progress.cancelled, on_retry=progress.move)
    except BaseException:
        with contextlib.suppress(Exception):  # what is left is swept later; the first error is the one to report
            upload.abort()
        raise


def main() -> None:
    """Run the uploader's process: it reads jobs from standard input and writes answers to standard output."""
    url, memory, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    die_with_starter()
    if os.getppid() != parent:
        sys.exit(1)  # the worker died before the kernel was asked to tell us
    ignore_terminal()
    show_stack_at_death()
    os.nice(5)
    answers = _Answers(os.dup(1))
    os.dup2(2, 1)  # what libraries print must not mix with answers
    answers.write({"moved": 0})
    jobs: queue.SimpleQueue[tuple[UploadJob, int, Progress]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    storage: Storage | None = None
    shared = mmap.mmap(memory, 0) if os.fstat(memory).st_size else None
    while True:
        job, size, progress = jobs.get()
        try:
            storage = storage or Storage(url)
            if shared is None or len(shared) < size:
                shared = mmap.mmap(memory, size)
            with answers.telling(progress):
                answer = perform(storage, job, memoryview(shared), progress)
        except Cancelled:
            answer = {"error": "called off"}
        except Exception as error:  # any error of storage: the worker reports it
            what = f"{job.path} could not be uploaded: {type(error).__name__}: {error}"
            answer = {"error": what, "no_room": is_no_room(error)}
        answers.write(answer)


class _Answers:
    """Writes lines of JSON to the worker: an answer to each job, and before it, now and then, that something moved."""

    def __init__(self, fd: int):
        self._file, self._lock = os.fdopen(fd, "w", buffering=1), threading.Lock()

    def write(self, message: dict[str, Any]) -> None:
        """Write one message."""
        with self._lock:
            self._file.write(json.dumps(message) + "\n")

    @contextlib.contextmanager
    def telling(self, progress: Progress) -> Iterator[None]:
        """While this context is open, tell the worker every TELL_S whether something moved."""
        ended = threading.Event()

        def report() -> None:
            before = -1
            while not ended.wait(TELL_S):
                if progress.moved != before:
                    before = progress.moved
                    self.write({"moved": before})

        thread = threading.Thread(target=report, name="tell-moves", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _listen(jobs: queue.SimpleQueue[tuple[UploadJob, int, Progress]]) -> None:
    progress = Progress()
    for line in sys.stdin.buffer:
        message = json.loads(line)
        if message["do"] == "upload":
            progress = Progress()
            jobs.put((UploadJob(**message["job"]), message["memory"], progress))
        elif message["do"] == "staged":
            progress.advance(message["ready"], message["tail"])
        elif message["do"] == "cancel":
            progress.cancel()
    os._exit(0)  # the worker closed its end


if __name__ == "__main__":
    main()
