"""The append-only record of a run: rows (`metrics.jsonl`) and events (`events.jsonl`).

A local file is appended to. Object storage cannot append: there, records are written as segments
`metrics.jsonl.d/<claim>-<start>-<first>.jsonl`, each created if absent, and compacted into the one file at the end.
Segments also hold the records of a local file that cannot be appended to, and those after an append that hung: if that
append is done later, its lines are there twice. The readers here hide the difference and tolerate a torn last line.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson

from elastic.errors import StorageHung
from elastic.phases import NO_PHASES, Cycle
from elastic.storage import Storage

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
FORMAT = 1
#: Columns that rows of a ledger have by themselves. `eval/...` are evaluations; a record with a kind is an event.
COLUMNS = frozenset(
    (
        "format",
        "step",
        "phase",
        "time",
        "loss",
        "lr",
        "grad_norm",
        "world_size",
        "generation",
        "samples",
        "tokens",
        "device_memory",
        "first_position",
        "count",
        "sample_hash",
        "skipped",
        "step_s",
        "data_s",
        "compute_s",
        "sync_s",
        "checkpoint_s",
        "snapshot_s",
        "other_s",
        "connect_s",
        "restore_s",
        "held_s",
        "idle",
        "gradient_bytes",
        "eval_s",
        "snapshot",
        "kind",
        "eval",
    )
)
_TAIL_BYTES = 64 << 10
_AT_ONCE = 32
_AT_A_TIME = 1000  # lines
_SEGMENT = re.compile(r"\d+-\d+-\d+\.jsonl\Z")


def to_line(record: dict[str, Any]) -> str:
    """Return a record as one line of strict JSON: NaN and infinities become null."""
    try:
        return json.dumps(record, allow_nan=False) + "\n"
    except ValueError:
        return json.dumps(finite(record), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Return a JSON value with None for each number in it that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value


class LedgerFile:
    """The writer of one of the two files. Only the keeper of a run has one."""

    def __init__(self, storage: Storage, name: str, epoch: int):
        self._storage, self._name, self._epoch = storage, name, epoch
        self._pending: list[str] = []
        self._written = 0
        self._appends = storage.can_append
        self._whole = False  # the last line of the local file is whole
        # milliseconds; a restarted keeper of the same claim sorts behind the first
        self._began_ms = int(time.time() * 1000)

    def add(self, record: dict[str, Any]) -> None:
        """Queue a record for the next flush."""
        self._pending.append(to_line({"format": FORMAT, **record}))

    def flush(self) -> None:
        """Write the queued records."""
        if not self._pending:
            return
        data = "".join(self._pending).encode()
        if self._appends:
            try:
                self._append(data)
            except OSError as error:
                self._appends = not isinstance(error, StorageHung)
                try:
                    self._create_segment(data)
                except OSError:
                    raise error from None
        else:
            self._create_segment(data)
        self._written += len(self._pending)
        self._pending.clear()

    def _append(self, data: bytes) -> None:
        torn = b"\n" if not self._whole and _ends_torn(self._storage, self._name) else b""
        self._whole = False
        self._storage.append(self._name, torn + data)
        self._whole = True

    def _create_segment(self, data: bytes) -> None:
        name = f"{self._epoch:06d}-{self._began_ms:015d}-{self._written:012d}.jsonl"
        try:
            self._storage.create(f"{self._name}.d/{name}", data)
        except StorageHung:
            self._began_ms += 1  # the next segment gets another name: it may have more lines
            raise

    def compact(self) -> None:
        """Join the segments into the one file. A crash in between may leave records twice, but never loses any."""
        self.flush()
        if not _segments(self._storage, self._name):
            return
        whole = b"".join(line + b"\n" for line in _lines(self._storage, self._name))
        self._storage.replace(self._name, whole)
        self._storage.remove(f"{self._name}.d")


def _segments(storage: Storage, name: str) -> list[str]:
    return [segment for segment in storage.names(f"{name}.d") if _SEGMENT.match(segment)]


def _ends_torn(storage: Storage, name: str) -> bool:
    """Whether the last writer of a local file died in the middle of a line."""
    size = storage.size(name) if storage.exists(name) else 0
    return size > 0 and storage.read(name, size - 1, size) != b"\n"


def _lines(storage: Storage, name: str) -> Iterator[bytes]:
    """Yield all lines of the file and its segments, without those that a broken compaction left twice."""
    segments = _segments(storage, name)
    seen: set[bytes] = set()
    for part in (name, *(f"{name}.d/{segment}" for segment in segments)):
        try:
            lines = storage.read(part).split(b"\n")
        except FileNotFoundError:
            continue  # the file was never compacted yet
        if not segments:
            yield from lines
            continue
        for line in lines:
            if line not in seen:
                yield line
            seen.add(line)


def read_records(storage: Storage, name: str) -> list[dict[str, Any]]:
    """Read all records of `metrics.jsonl` or `events.jsonl`, in the order written, each once."""
    return _parse(_lines(storage, name))


def read_tail(storage: Storage, name: str, count: int) -> list[dict[str, Any]]:
    """Read the newest `count` records, oldest first; all if there are fewer.

    It reads from the end, and no more than it needs. Segments are read in parallel and in growing numbers, since a
    segment may hold one record, and each costs a round trip.
    """

    def read(segment: str) -> list[dict[str, Any]]:
        return _parse(storage.read(f"{name}.d/{segment}").split(b"\n"))

    found: list[dict[str, Any]] = []
    with (
        contextlib.suppress(FileNotFoundError),  # compacted at this moment: the one file has its records
        ThreadPoolExecutor(_AT_ONCE, "ledger") as pool,
    ):
        segments, batch = _segments(storage, name), 1
        while segments and len(found) < count:
            segments, newest = segments[:-batch], segments[-batch:]
            found = [record for part in pool.map(read, newest) for record in part] + found
            batch = min(2 * batch, _AT_ONCE)
    if len(found) >= count:
        return found[len(found) - count :]
    older = [r for r in _tail_of(storage, name, count) if r not in found]  # a broken compaction left these twice
    return (older + found)[max(0, len(older) + len(found) - count) :]


def _tail_of(storage: Storage, name: str, count: int) -> list[dict[str, Any]]:
    try:
        size = storage.size(name)
    except FileNotFoundError:
        return []  # the file was never compacted yet
    block = _TAIL_BYTES
    while True:
        start = max(0, size - block)
        lines = storage.read(name, start, size).split(b"\n")
        found = _parse(lines[1:] if start else lines)  # the first line may have begun before `start`
        if not start or len(found) >= count:
            return found
        block *= 4


def _parse(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    waiting = list(filter(None, lines))
    records: list[Any] = []
    for first in range(0, len(waiting), _AT_A_TIME):  # there may be a hundred thousand
        part = waiting[first : first + _AT_A_TIME]
        try:
            records += list(map(orjson.loads, part))
        except ValueError:
            records += map(_parse_line, part)
    return [record for record in records if isinstance(record, dict)]


def _parse_line(line: bytes) -> Any:
    """Return the record; None for a torn tail: the writer died, or is, in the middle of a line."""
    try:
        # What others wrote may have NaN, which Python's own reader takes.
        return json.loads(line) if b"NaN" in line or b"Infinity" in line else orjson.loads(line)
    except (ValueError, RecursionError):
        return None


class Follower:
    """Reads a ledger that is being written: each call of `new` returns what came since the last one."""

    def __init__(self, storage: Storage, name: str):
        self._storage, self._name = storage, name
        self._read_to = 0
        self._segments: set[str] = set()
        self._seen: set[int] = set()  # hashes of lines: a compaction writes all of them again, elsewhere

    def new(self) -> list[dict[str, Any]]:
        """Return the new records, in the order written. A line without an end is returned once it has one."""
        # list the segments first: what is compacted meanwhile is then read from the one file
        segments = _segments(self._storage, self._name)
        lines = self._lines_of_the_file(compacted=bool(self._segments - set(segments)))
        for segment in segments:
            if segment not in self._segments:
                try:
                    lines += self._storage.read(f"{self._name}.d/{segment}").split(b"\n")
                except FileNotFoundError:
                    continue  # compacted at this moment: the next call finds its lines in the one file
                self._segments.add(segment)
        fresh = []
        for line in lines:
            if line and (key := hash(line)) not in self._seen:
                self._seen.add(key)
                fresh.append(line)
        return _parse(fresh)

    def _lines_of_the_file(self, *, compacted: bool) -> list[bytes]:
        try:
            size = self._storage.size(self._name)
        except FileNotFoundError:
            return []
        if size < self._read_to or compacted:
            self._read_to = 0
        if size == self._read_to:
            return []
        whole, end, _ = self._storage.read(self._name, self._read_to, size).rpartition(b"\n")
        self._read_to += len(whole) + len(end)
        return whole.split(b"\n")


def _generation(row: dict[str, Any]) -> tuple[int, int]:
    epoch, _, n = str(row["generation"]).partition("-")
    return int(epoch), int(n)


def kept_history(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the steps of which the final weights are made: for each step the row of the newest world."""
    kept: dict[int, dict[str, Any]] = {}
    for row in rows:
        if "sample_hash" in row and (row["step"] not in kept or _generation(row) >= _generation(kept[row["step"]])):
            kept[row["step"]] = row
    return [kept[s] for s in sorted(kept)]


def gaps_and_doubles(rows: Iterable[dict[str, Any]], global_size: int, cycle: Cycle = NO_PHASES) -> list[str]:
    """Return what is wrong with a history: samples that were lost or applied twice. Empty if each counted exactly
    once, in each phase."""
    problems = []
    for expected, row in enumerate(kept_history(rows), start=1):
        if row["step"] != expected:
            problems.append(f"step {expected} is missing before step {row['step']}")
            break
        if (row["first_position"], row["count"]) != (cycle.batch(expected - 1) * global_size, global_size):
            problems.append(f"step {expected} took {row['count']} positions from {row['first_position']}")
    return problems
