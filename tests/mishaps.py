"""What happens to a run from outside: processes stand still or are killed, files are damaged, strangers come, and
nobody reads what it prints."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from elastic.checkpoint.reader import newest_first
from elastic.observe.console import Console
from elastic.observe.streams import Sturdy
from elastic.storage import Storage
from elastic.worker.local import LocalRun
from tests import leaks
from tests.forked import Watch, fault, plan

LOOK_S = 0.01
STRANGERS = 60
FOREIGN = (
    "claims/notes.txt",
    "claims/.000001.json.swp",
    "drivers/.DS_Store",
    "checkpoints/.nfs000000000001",
    "checkpoints/step-old/readme",
    ".DS_Store",
)


@dataclass(frozen=True)
class Mishap:
    """`what` happens when a row of `step` has come; `number` chooses among several, `seconds` is how long it takes."""

    what: str
    step: int
    number: int
    seconds: float


def draw(r: random.Random) -> Mishap:
    return Mishap(r.choice(list(_MISHAPS)), r.randint(1, 11), r.randrange(8), r.choice([0.1, 0.6, 1.5]))


class Output:
    """What a command prints, into a pipe; whoever else follows the run hears of each record after it was printed."""

    def __init__(self, then: Callable[[dict[str, Any]], None]):
        self._then = then
        self._reading, writing = os.pipe()
        self._stream = os.fdopen(writing, "w")
        self._console = Console(10**6, 0.0, Sturdy(self._stream, patience_s=0.1))

    def __call__(self, record: dict[str, Any]) -> None:
        self._console.record(record)
        self._then(record)

    def breaks(self, how: int) -> None:
        """Its reader is gone, it is on a full disk, or the reader takes nothing more."""
        if how == 0:
            os.dup2(nowhere := os.open(os.devnull, os.O_RDONLY), self._reading)
            os.close(nowhere)
        elif how == 1:
            os.dup2(full := os.open("/dev/full", os.O_WRONLY), self._stream.fileno())
            os.close(full)
        else:
            os.set_blocking(self._stream.fileno(), False)
            with suppress(BlockingIOError):
                while True:
                    os.write(self._stream.fileno(), b"x" * 4096)
            os.set_blocking(self._stream.fileno(), True)

    def close(self) -> None:
        self._console.close()
        os.close(self._reading)
        self._stream.close()


class Happening:
    """Lets mishaps happen to a run, and replaces workers that are lost, as long as `replacements` last."""

    def __init__(
        self, local: LocalRun, watch: Watch, output: Output, folder: Path, mishaps: list[Mishap], replacements: int
    ):
        self.local, self.output, self.folder = local, output, folder
        self._watch, self._mishaps, self._replacements = watch, sorted(mishaps, key=lambda m: m.step), replacements
        self._over = threading.Event()
        self.failed: BaseException | None = None

    @contextmanager
    def going_on(self) -> Iterator[None]:
        thread = threading.Thread(target=self._look, name="mishaps")
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            if self.failed is not None:
                raise self.failed

    def _look(self) -> None:
        started, mishaps = 0, list(self._mishaps)
        try:
            while not self._over.wait(LOOK_S):
                records = list(self._watch.records)
                lost = sum(e.get("kind") == "member_lost" for e in records)
                for _ in range(started, min(lost, self._replacements)):
                    started += 1
                    self.local.add_worker(environment={})
                step = max((r["step"] for r in records if "sample_hash" in r), default=0)
                while mishaps and mishaps[0].step <= step:
                    mishap = mishaps.pop(0)
                    _MISHAPS[mishap.what](self, mishap)
        except BaseException as error:
            self.failed = error

    def wait(self, seconds: float) -> None:
        self._over.wait(seconds)


def _stand_still(happening: Happening, pids: list[int], seconds: float) -> None:
    stopped = []
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            stopped.append(pid)
    happening.wait(seconds)
    for pid in stopped:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _workers(happening: Happening) -> list[int]:
    return [p.pid for p in happening.local.processes if p.poll() is None]


def _helpers(happening: Happening, module: str) -> list[int]:
    """Processes of this module that workers have started."""
    return [pid for one in _workers(happening) for pid, line in leaks.descendants(one).items() if module in line]


def _one_stands_still(happening: Happening, mishap: Mishap) -> None:
    pids = _workers(happening)
    _stand_still(happening, pids[mishap.number % len(pids) :][:1] if pids else [], mishap.seconds)


def _all_stand_still(happening: Happening, mishap: Mishap) -> None:
    _stand_still(happening, [*_workers(happening), happening.local.hosting.process.pid], mishap.seconds)  # type: ignore[union-attr]


def _host_stands_still(happening: Happening, mishap: Mishap) -> None:
    _stand_still(happening, [happening.local.hosting.process.pid], mishap.seconds)  # type: ignore[union-attr]


def _kill(pids: list[int], number: int) -> None:
    if pids:
        with suppress(ProcessLookupError):
            os.kill(pids[number % len(pids)], signal.SIGKILL)


def _host_dies(happening: Happening, mishap: Mishap) -> None:
    _kill([happening.local.hosting.process.pid], 0)  # type: ignore[union-attr]


def _uploader_dies(happening: Happening, mishap: Mishap) -> None:
    _kill(_helpers(happening, "elastic.checkpoint.uploader"), mishap.number)


def _loader_dies(happening: Happening, mishap: Mishap) -> None:
    _kill(_helpers(happening, "multiprocessing.forkserver"), mishap.number)


def _output_breaks(happening: Happening, mishap: Mishap) -> None:
    happening.output.breaks(mishap.number % 3)


def _vault_dies(happening: Happening, mishap: Mishap) -> None:
    _kill([v.process.pid for v in happening.local.vaults.values()], mishap.number)


def _newest_is_damaged(happening: Happening, mishap: Mishap) -> None:
    """In its last byte, of what the optimizer keeps, which every save writes anew: nobody reads again what later saves
    only refer to, such as frozen weights, before the run is loaded."""
    storage = Storage(str(happening.folder))
    newest = next(iter(newest_first(storage)), None)
    if newest is None:
        return
    files = sorted(p for p in (happening.folder / newest.folder).iterdir() if p.suffix != ".json" and p.stat().st_size)
    if files:
        with suppress(FileNotFoundError), open(files[mishap.number % len(files)], "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))


def _foreign_files_come(happening: Happening, mishap: Mishap) -> None:
    for name in FOREIGN:
        path = happening.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("not of this run")


def _strangers_come(happening: Happening, mishap: Mishap) -> None:
    """Half-open connections, garbage, and requests without a token, all at once."""
    place = urlsplit(happening.local.url)
    said = [b"", b"\x00" * 512, b"POST /grant HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", b"GET / HTTP"]
    sockets = []
    try:
        for i in range(STRANGERS):
            with suppress(OSError):
                one = socket.create_connection((place.hostname, place.port), timeout=1.0)
                sockets.append(one)
                one.sendall(said[i % len(said)])
        happening.wait(mishap.seconds)
    finally:
        for one in sockets:
            one.close()


def _sick_one_comes(happening: Happening, mishap: Mishap) -> None:
    """A worker that fails in its first two tries."""
    sick = [fault("step.forward", do="raise"), fault("step.forward", do="raise")]
    happening.local.add_worker(environment=plan(*sick))


_MISHAPS: dict[str, Callable[[Happening, Mishap], None]] = {
    "a worker stands still": _one_stands_still,
    "everything stands still": _all_stand_still,
    "the host stands still": _host_stands_still,
    "the host dies": _host_dies,
    "an uploader dies": _uploader_dies,
    "a vault dies": _vault_dies,
    "a loader process dies": _loader_dies,
    "the output breaks": _output_breaks,
    "the newest checkpoint is damaged": _newest_is_damaged,
    "foreign files come": _foreign_files_come,
    "strangers come": _strangers_come,
    "a sick worker comes": _sick_one_comes,
}
