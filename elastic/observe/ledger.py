"""The append-only record of a run: rows (`metrics.jsonl`) and events (`events.jsonl`).

Local disk is appended to. Object storage cannot append: there, records go as segments
`metrics.jsonl.d/<generation>-<first>.jsonl`, created if absent, and are compacted into the one file at the end. One
reader hides the difference; it tolerates a torn tail.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from elastic.storage import Storage

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
FORMAT = 1


def to_line(record: dict[str, Any]) -> str:
    """One record as a line of strict JSON: NaN and infinities become null."""
    try:
        return json.dumps(record, allow_nan=False) + "\n"
    except ValueError:
        finite = {
            k: None if isinstance(v, float) and (v != v or abs(v) == float("inf")) else v for k, v in record.items()
        }
        return json.dumps(finite, allow_nan=False) + "\n"


class LedgerFile:
    """One of the two files, being written. Only the keeper of a run has one."""

    def __init__(self, storage: Storage, name: str, epoch: int):
        self._storage, self._name, self._epoch = storage, name, epoch
        self._pending: list[str] = []
        self._written = 0

    def add(self, record: dict[str, Any]) -> None:
        """Queue a record for the next flush."""
        self._pending.append(to_line({"format": FORMAT, **record}))

    def flush(self) -> None:
        """Write what is queued."""
        if not self._pending:
            return
        data = "".join(self._pending).encode()
        if self._storage.can_append:
            self._storage.append(self._name, data)
        else:
            self._storage.create(f"{self._name}.d/{self._epoch:06d}-{self._written:012d}.jsonl", data)
        self._written += len(self._pending)
        self._pending.clear()

    def compact(self) -> None:
        """Join segments into the one file; a crash in between leaves records twice at worst, never lost."""
        self.flush()
        segments = self._storage.names(f"{self._name}.d")
        if not segments:
            return
        whole = b"".join(_parts(self._storage, self._name, segments))
        self._storage.replace(self._name, whole)
        self._storage.remove(f"{self._name}.d")


def _parts(storage: Storage, name: str, segments: Iterable[str]) -> Iterable[bytes]:
    try:
        yield storage.read(name)
    except FileNotFoundError:
        yield b""
    for segment in segments:
        yield storage.read(f"{name}.d/{segment}")


def read_records(storage: Storage, name: str) -> list[dict[str, Any]]:
    """All records of `metrics.jsonl` or `events.jsonl`, in the order written, without doubles of a compaction."""
    records: list[dict[str, Any]] = []
    seen: set[str] = set()
    segments = storage.names(f"{name}.d")
    for part in _parts(storage, name, segments):
        lines = part.decode(errors="replace").split("\n")
        for line in lines:
            if not line or (segments and line in seen):
                continue
            try:
                records.append(json.loads(line))
            except ValueError:
                continue  # a torn tail: the writer died in the middle of a line
            if segments:
                seen.add(line)
    return records


def _generation(row: dict[str, Any]) -> tuple[int, int]:
    epoch, _, n = str(row["generation"]).partition("-")
    return int(epoch), int(n)


def kept_history(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps that the final weights are made of: for each step the row of the highest generation."""
    kept: dict[int, dict[str, Any]] = {}
    for row in rows:
        if "sample_hash" in row and (row["step"] not in kept or _generation(row) >= _generation(kept[row["step"]])):
            kept[row["step"]] = row
    return [kept[s] for s in sorted(kept)]


def gaps_and_doubles(rows: Iterable[dict[str, Any]], global_size: int) -> list[str]:
    """What is wrong with a history: positions lost or applied twice. Empty for a run that counted each sample once."""
    problems = []
    for expected, row in enumerate(kept_history(rows), start=1):
        if row["step"] != expected:
            problems.append(f"step {expected} is missing before step {row['step']}")
            break
        if (row["first_position"], row["count"]) != ((expected - 1) * global_size, global_size):
            problems.append(f"step {expected} took {row['count']} positions from {row['first_position']}")
    return problems
