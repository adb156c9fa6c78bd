"""What the processes of a run print, as files in its folder: `logs/<worker>.txt`.

The driver has it all, on Ray from Ray, in plain processes from files that the workers write: it outlives a worker that
dies. Each line says when it came, and of which rank on which node. A file keeps the first and the newest of what was
printed, so it is replaced as a whole wherever it lies, and its size has a bound.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from elastic.checkpoint.patience import is_from_storage
from elastic.errors import RunFailed
from elastic.redact import redact
from elastic.storage import Storage

FOLDER = "logs"
FIRST_BYTES, NEWEST_BYTES = 32 << 10, 224 << 10  # of each process
MOST_FILES = 500
LINES = 20  # that the event of a death tells
STACK_LINES = 60
LAST_S = 15.0  # for the last lines
SOON_S = 60.0  # from a death to the end of a run that it may have caused
MOST_LINE = 4000  # characters of a line; more is cut off
FLUSH_LOCAL_S, FLUSH_OBJECT_S = 1.0, 10.0
_STACK = re.compile(r"Fatal Python error|Traceback \(most recent call last\)|Current thread 0x|Thread 0x")
_NAME = re.compile(r"[^\w.-]+")


@dataclass
class Printed:
    """What one process printed: its first lines, its newest, and how many bytes lie between."""

    first: list[str] = field(default_factory=list)
    newest: deque[str] = field(default_factory=deque)
    left_out: int = 0
    dirty: bool = False
    _first_bytes: int = 0
    _newest_bytes: int = 0

    def add(self, line: str) -> None:
        size = len(line) + 1
        self.dirty = True
        if not self.newest and self._first_bytes + size <= FIRST_BYTES:
            self.first.append(line)
            self._first_bytes += size
            return
        self.newest.append(line)
        self._newest_bytes += size
        while self._newest_bytes > NEWEST_BYTES:
            gone = len(self.newest.popleft()) + 1
            self._newest_bytes -= gone
            self.left_out += gone

    def text(self) -> str:
        between = [f"... {self.left_out} bytes left out ..."] if self.left_out else []
        return "".join(f"{line}\n" for line in (*self.first, *between, *self.newest))


def last_words(lines: Sequence[str]) -> str:
    """Return the last lines that a process printed before it died, and its stack if it printed one."""
    last = len(lines)
    stack: Sequence[str] = ()
    starts = [i for i, line in enumerate(lines) if _STACK.match(line)]
    if starts:
        begin = next((i for i in starts if i >= last - STACK_LINES), starts[-1])
        stack, last = lines[begin : begin + STACK_LINES], begin
    said = lines[max(0, last - LINES) : last]
    parts = [f"its last lines:\n{_indented(said)}"] if said else []
    return "\n".join([*parts, f"its stack:\n{_indented(stack)}"] if stack else parts)


def _indented(lines: Iterable[str]) -> str:
    return "\n".join(f"  | {line}" for line in lines)


class RunLogs:
    """Collects what processes print. All methods from any thread. Use as a context manager; leaving it writes the rest.

    Storage that cannot be written is not waited for: logs are worth no run.
    """

    def __init__(self, storage: Storage):
        self._storage = storage
        self._every_s = FLUSH_LOCAL_S if storage.can_append else FLUSH_OBJECT_S
        self._lock = threading.Lock()
        self._printed: dict[str, Printed] = {}
        self._plain: dict[str, deque[str]] = {}
        self._ranks: dict[str, int] = {}
        self._nodes: dict[str, str] = {}
        self._newest_death: tuple[str, float] | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="run-logs", daemon=True)

    def __enter__(self) -> RunLogs:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(LAST_S)  # storage may hang: then the thread is left behind

    def on_record(self, record: dict[str, Any]) -> None:
        """Hear which rank each worker has, and where it is."""
        kind, detail = record.get("kind"), record.get("detail")
        if kind == "worker_warm":
            self._nodes[record["member"]] = str(record.get("node", ""))
        elif kind == "process_ended" and isinstance(record.get("member"), str):
            self._newest_death = record["member"], time.monotonic()
        elif kind == "world_formed" and isinstance(detail, dict):
            self._ranks.update({member: rank for rank, member in enumerate(detail.get("ids") or ())})

    def add(self, worker: str, lines: Sequence[str]) -> list[str]:
        """A process has printed these lines; returns them without secrets."""
        if not lines:
            return []
        clean = redact("\n".join(line[:MOST_LINE].replace("\r", "") for line in lines)).split("\n")
        before = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self._who(worker)}"
        with self._lock:
            printed = self._printed.setdefault(worker, Printed())
            plain = self._plain.setdefault(worker, deque(maxlen=LINES + STACK_LINES))
            for line in clean:
                printed.add(f"{before}{line}")
                plain.append(line)
        return clean

    def _who(self, worker: str) -> str:
        rank, node = self._ranks.get(worker), self._nodes.get(worker, "")
        known = ([] if rank is None else [f"rank {rank}"]) + ([node[:24]] if node else [])
        return f"[{', '.join(known)}] " if known else ""

    def last_words(self, worker: str) -> str:
        """The last that a process printed, for people; empty where it printed nothing."""
        with self._lock:
            return last_words(list(self._plain.get(worker, ())))

    @contextmanager
    def telling_of_deaths(self) -> Iterator[None]:
        """A run that fails inside, soon after a worker died, says what that one said last."""
        try:
            yield
        except RunFailed as error:
            worker, at = self._newest_death or ("", -SOON_S)
            words = self.last_words(worker) if time.monotonic() - at < SOON_S else ""
            if not words or words in str(error):
                raise
            raise RunFailed(f"{error}\nworker {worker}: {words}") from error

    def _work(self) -> None:
        while not self._over.wait(self._every_s):
            self._flush()
        self._flush()
        if self._printed:
            with suppress(Exception):  # whatever storage raises: more logs than there should be do no harm
                remove_oldest(self._storage)

    def _flush(self) -> None:
        with self._lock:
            waiting = {name: printed.text() for name, printed in self._printed.items() if printed.dirty}
            for name in waiting:
                self._printed[name].dirty = False
        for name, text in waiting.items():
            try:
                self._storage.replace(f"{FOLDER}/{file_name(name)}", text.encode())
            except Exception as error:
                if not is_from_storage(error):
                    raise
                with self._lock:
                    self._printed[name].dirty = True  # it is tried again with the next flush
                return


def file_name(worker: str) -> str:
    """Return the name of a process's log."""
    return f"{_NAME.sub('_', worker)[:100]}.txt"


def remove_oldest(storage: Storage, most: int = MOST_FILES) -> None:
    """Remove the oldest logs beyond `most`; a run may have replaced many workers."""
    names = [name for name in storage.names(FOLDER) if name.endswith(".txt")]
    if len(names) > most:
        for name in sorted(names, key=lambda n: storage.modified(f"{FOLDER}/{n}"))[: len(names) - most]:
            storage.remove(f"{FOLDER}/{name}")
