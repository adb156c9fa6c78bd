"""Telling a job's callbacks what a run records, in its driver: each record once, in batches, on threads of theirs."""

from __future__ import annotations

import contextlib
import copy
import json
import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic.errors import one_line
from elastic.observe.callbacks import Callback
from elastic.observe.ledger import METRICS, read_tail
from elastic.storage import Storage

MARKS = "callbacks.json"
END_S = 60.0  # for callbacks that still have something to do when the run has ended
BATCH_LOCAL_S, BATCH_OBJECT_S = 0.5, 5.0  # between two writes of the marks
MOST_WAITING = 100_000  # records that a callback has not taken yet; then the oldest go
_TAIL = 1000  # rows of the ledger that are looked through for some that did not come
_CUT_SHORT = {"kind": "end", "status": "failed", "message": "the command ended before its run did"}
_COUNTED = ("row", "eval", "sample")


@dataclass(frozen=True)
class Marks:
    """The newest step that was told, of each kind of record that has steps; -1 where none was."""

    row: int = -1
    eval: int = -1
    sample: int = -1

    def of(self, kind: str) -> int:
        """Return the mark of a kind of record."""
        return int(getattr(self, kind))

    def after(self, kind: str, step: int) -> Marks:
        """When this one was told too."""
        return Marks(**{**vars(self), kind: max(step, self.of(kind))})


def kind_of(record: Mapping[str, Any]) -> str:
    """Which method of a callback hears of it."""
    if "kind" not in record:
        return "row" if "sample_hash" in record else "eval"
    return {"checkpoint_committed": "checkpoint", "sample": "sample", "end": "end"}.get(record["kind"], "event")


def is_told(marks: Marks, record: Mapping[str, Any]) -> bool:
    """Whether a record with a step is of one that was told: it is done again, or was heard before."""
    kind = kind_of(record)
    return kind in _COUNTED and record["step"] <= marks.of(kind)


class Telling:
    """Tells callbacks. `hear` costs nothing; all else is done on threads.

    What was told is noted in the run's folder before it is: a driver that is killed may leave a second's records
    untold, and tells none twice.

    Args:
        facts: what `on_start` is given.
        warn: called with the name of a callback and what went wrong, once for each.
        say: called with a line for the console.
    """

    def __init__(
        self,
        callbacks: Sequence[Callback],
        storage: Storage,
        facts: dict[str, Any],
        warn: Callable[[str, str], None],
        say: Callable[[str], None],
    ):
        self._storage, self._facts, self._say = storage, facts, say
        self._tellers = [_Teller(one, warn) for one in callbacks]
        self._waiting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._heard: set[str] = set()  # events: who follows anew hears the old ones again
        self._marks, self._ended = Marks(), False
        self._batch_s = BATCH_LOCAL_S if storage.can_append else BATCH_OBJECT_S
        self._thread = threading.Thread(target=self._work, name="callbacks", daemon=True)
        if callbacks:
            self._thread.start()

    def hear(self, record: dict[str, Any]) -> None:
        """A row or an event has come."""
        if self._tellers:
            self._waiting.put(record)

    def close(self, timeout_s: float = END_S) -> None:
        """Tell the rest, and wait for the callbacks; who takes longer is left alone."""
        if not self._tellers:
            return
        deadline = time.monotonic() + timeout_s
        self._waiting.put(dict(_CUT_SHORT))
        self._waiting.put(None)
        self._thread.join(timeout_s)
        for teller in self._tellers:
            if not teller.end(max(0.0, deadline - time.monotonic())):
                self._say(f"warning: callback {teller.name} was waited for {timeout_s:g} s and is left alone")

    def _work(self) -> None:
        with contextlib.suppress(Exception):  # none yet, or not readable: then what comes is new
            known = json.loads(self._storage.read(MARKS))
            self._marks = Marks(**{kind: int(known[kind]) for kind in _COUNTED})
        self._tell("start", self._facts)
        over = False
        while not over:
            batch = [self._waiting.get()]
            until = time.monotonic() + self._batch_s
            while batch[-1] is not None and batch[-1].get("kind") != "end":
                try:
                    batch.append(self._waiting.get(timeout=max(0.0, until - time.monotonic())))
                except queue.Empty:
                    break
            over = batch[-1] is None
            self._take([record for record in batch if record is not None])

    def _take(self, records: list[dict[str, Any]]) -> None:
        new = []
        for record in records:
            kind = kind_of(record)
            if kind in ("event", "checkpoint"):
                text = json.dumps(record, sort_keys=True, default=str)
                if text not in self._heard:
                    self._heard.add(text)
                    new.append((kind, record))
            elif kind == "end":
                new += [] if self._ended else [(kind, record)]
                self._ended = True
            elif not is_told(self._marks, record):
                new += self._missed(record) if kind == "row" else []
                new.append((kind, record))
                self._marks = self._marks.after(kind, record["step"]) if kind in _COUNTED else self._marks
        if any(kind in _COUNTED for kind, _ in new):
            with contextlib.suppress(Exception):  # the run's own writes say that storage is away, and wait for it
                self._storage.replace(MARKS, json.dumps(vars(self._marks)).encode())
        for kind, record in new:
            if kind == "sample":
                self._tell("sample", {"step": record["step"], "sample": self._sample(record)})
            else:
                self._tell(kind, {key: value for key, value in record.items() if key != "format"})

    def _missed(self, row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Rows between the newest that was told and this one, of a host that was started again: as the ledger has."""
        newest = self._marks.row
        if newest < 0 or row["step"] == newest + 1:
            return []
        try:
            tail = read_tail(self._storage, METRICS, _TAIL)
        except Exception:  # whatever storage raises: they are in the ledger when it is back
            return []
        between = {r["step"]: r for r in tail if kind_of(r) == "row" and newest < r["step"] < row["step"]}
        return [("row", between[step]) for step in sorted(between)]

    def _sample(self, event: dict[str, Any]) -> dict[str, str | bytes]:
        found: dict[str, str | bytes] = dict(event["detail"].get("texts", {}))
        for name, path in event["detail"].get("pictures", {}).items():
            try:
                found[name] = self._storage.read(path)
            except Exception as error:  # whatever storage raises
                found[name] = f"{path} could not be read: {one_line(error)}"
        return found

    def _tell(self, kind: str, values: dict[str, Any]) -> None:
        for teller in self._tellers:
            teller.put(kind, values)


class _Teller:
    """One callback, and what it has not heard yet."""

    def __init__(self, callback: Callback, warn: Callable[[str, str], None]):
        self.name = type(callback).__qualname__
        self._callback, self._warn, self._warned = callback, warn, False
        self._waiting: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name=f"callback {self.name}", daemon=True)
        self._thread.start()

    def put(self, kind: str, values: dict[str, Any]) -> None:
        if self._waiting.qsize() >= MOST_WAITING:
            with contextlib.suppress(queue.Empty):
                self._waiting.get_nowait()
            self._tell_of(f"is {MOST_WAITING} records behind, so the oldest are left out")
        self._waiting.put((kind, copy.deepcopy(values)))

    def end(self, timeout_s: float) -> bool:
        """Returns whether it has heard all."""
        self._waiting.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (one := self._waiting.get()) is not None:
            kind, values = one
            try:
                method = getattr(self._callback, f"on_{kind}")
                if kind == "sample":
                    method(values["step"], values["sample"])
                else:
                    method(values)
            except BaseException as error:  # whatever it raises, even an exit, ends neither the run nor its hearing
                place = traceback.extract_tb(error.__traceback__)[-1]
                self._tell_of(f"on_{kind}() failed, {one_line(error)} ({place.filename}, line {place.lineno})")

    def _tell_of(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            with contextlib.suppress(Exception):  # it is only told
                self._warn(self.name, what)
