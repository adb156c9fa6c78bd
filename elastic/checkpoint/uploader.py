"""The uploader: a process beside a worker that hashes and uploads what the worker staged in shared memory.

A process of its own, so that uploading takes neither the worker's interpreter lock nor its life: it imports no torch,
knows no group, and the kernel ends it with the thread that started it. Both ends talk in lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any

from elastic import fault
from elastic.checkpoint.blocks import crc_blocks, hash_blocks
from elastic.checkpoint.transfer import Cancelled, Upload, open_upload, patiently
from elastic.storage import Storage

PART_BYTES = 16 << 20
LEAST_PART_BYTES = 5 << 20  # S3 takes no smaller ones
IN_FLIGHT = 16
_MOST_PARTS = 10_000  # S3's limit


@dataclass(frozen=True)
class UploadJob:
    """A pack to upload: the first `size` bytes of the shared memory, in which `chunks` are [start, end) each.

    Those from `tail` on need no upload if they have the `known` hashes, chunk by chunk.
    """

    name: str
    size: int
    chunks: list[tuple[int, int]]
    tail: int
    known: list[list[str]]
    rank: int
    step: int
    in_flight: int = IN_FLIGHT
    part_bytes: int = PART_BYTES


class Progress:
    """How far staging is, and whether the upload is called off. From any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ready, self._tail = 0, False
        self.cancelled = threading.Event()

    def advance(self, ready: int, tail: bool) -> None:
        """The tail comes first, then bytes from the front."""
        with self._changed:
            self._ready, self._tail = ready, tail
            self._changed.notify_all()

    def cancel(self) -> None:
        with self._changed:
            self.cancelled.set()
            self._changed.notify_all()

    def await_ready(self, upto: int, *, tail: bool = False) -> None:
        """Wait until bytes below `upto`, or the tail, are staged.

        Raises:
            Cancelled: they never will be.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.cancelled.is_set() or (self._tail if tail else self._ready >= upto)
            )  # staging ends or cancels; the worker's death ends this process
        if self.cancelled.is_set():
            raise Cancelled


def perform(storage: Storage, job: UploadJob, data: memoryview, progress: Progress) -> dict[str, Any]:
    """Hash and upload a pack while it is being staged.

    Returns:
        `hashes` and `crcs` of each chunk's blocks, `uploaded` (whether the tail was too), and what it took.

    Raises:
        Cancelled: the worker called it off; nothing is left of the object.
        Exception: what storage raised, after all patience.
    """
    began, cpu = time.monotonic(), time.process_time()
    fault.point("upload.begin", job.rank, job.step)
    hashes: dict[int, tuple[str, ...]] = {}
    tail = [i for i, (start, _) in enumerate(job.chunks) if start >= job.tail]
    if tail:
        progress.await_ready(0, tail=True)
        for i in tail:
            hashes[i] = hash_blocks(data[slice(*job.chunks[i])])
    uploaded = not tail or [list(hashes[i]) for i in tail] != job.known
    size = job.size if uploaded else job.tail
    counts = {"requests": 0, "retries": 0}
    crcs: dict[int, tuple[int, ...]] = {}

    def prove() -> None:
        for i, (start, end) in enumerate(job.chunks):
            progress.await_ready(min(end, job.tail))
            view = data[start:end]
            if i not in hashes:
                hashes[i] = hash_blocks(view)
            crcs[i] = crc_blocks(view)

    if size:
        _upload(storage, job, data[:size], progress, counts, prove)
    else:
        prove()
    fault.point("upload.end", job.rank, job.step)
    return {
        "hashes": [hashes[i] for i in range(len(job.chunks))], "crcs": [crcs[i] for i in range(len(job.chunks))],
        "uploaded": uploaded, "bytes": size, "seconds": round(time.monotonic() - began, 4),
        "cpu_s": round(time.process_time() - cpu, 4), **counts,
    }  # fmt: skip


def _upload(
    storage: Storage, job: UploadJob, data: memoryview, progress: Progress, counts: dict[str, int], prove: Any
) -> None:
    part = max(job.part_bytes, -(-len(data) // _MOST_PARTS))
    even = -(-len(data) // job.in_flight)  # a small pack in as many parts as can fly
    part = min(part, max(even, min(LEAST_PART_BYTES, part)))
    upload: Upload = open_upload(storage, job.name, len(data), part)

    def put(number: int) -> None:
        start = number * part
        piece = data[start : start + part]
        progress.await_ready(min(start + len(piece), job.tail))
        fault.point("upload.part", job.rank, job.step)
        patiently(
            upload.put, number, start, piece, cancelled=progress.cancelled,
            on_retry=lambda: counts.update(retries=counts["retries"] + 1), retry_s=120.0 if upload.parallel else 0.0,
        )  # fmt: skip
        counts["requests"] += 1

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
                progress.cancel()  # whoever still waits is freed, and the pool can end
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        fault.point("upload.before_complete", job.rank, job.step)
        patiently(upload.complete, cancelled=progress.cancelled)
    except BaseException:
        with contextlib.suppress(Exception):  # what is left of it is swept later; the first error is what counts
            upload.abort()
        raise


# ---- the worker's end ----------------------------------------------------------------------------------------------


class Uploader:
    """The process, as its worker sees it. It ends with the thread that made it."""

    def __init__(self, storage_url: str, memory: int):
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        command = [sys.executable, "-m", "elastic.checkpoint.uploader", storage_url, str(memory), str(os.getpid())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[memory], env=environment
        )
        self._lock = threading.Lock()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: dict[str, Any]) -> None:
        """Tell it something; if it is dead, `answer` says so."""
        with self._lock, contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def start(self, job: UploadJob, memory_size: int) -> None:
        self.send({"do": "upload", "job": asdict(job), "memory": memory_size})

    def answer(self) -> dict[str, Any]:
        """Wait for how the upload ended: the values of `perform`, or `error`. Its patience has an end, so this has."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return {"error": f"the uploader process ended with code {self._process.wait()}"}
        return json.loads(line)

    def kill(self) -> None:
        """End it, whatever it is doing; who waits for an answer gets one. From any thread."""
        self._process.kill()

    def close(self) -> None:
        """End it and give back what it took."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when the thread that started it ends. Linux."""
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(1)  # it died before we asked


def main() -> None:
    """The uploader's process: jobs on standard input, answers on standard output."""
    url, memory, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the worker, which saves
    os.nice(5)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
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
            answer = perform(storage, job, memoryview(shared), progress)
        except Cancelled:
            answer = {"error": "called off"}
        except Exception as error:  # whatever storage raises: the worker tells the run
            answer = {"error": f"{job.name} could not be uploaded: {type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


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
