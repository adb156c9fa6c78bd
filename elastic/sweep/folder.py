"""The folder of a sweep, written by one driver at a time."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

from elastic.errors import ConfigError
from elastic.observe.ledger import LedgerFile, finite, read_records
from elastic.redact import clean
from elastic.run.folder import claim_name, claim_values, may_live, newest_claim, owner, storage_age_s
from elastic.run.process import identity
from elastic.storage import Storage
from elastic.tools.sweeps import DRIVERS, FORMAT, SWEEP, TRIALS, TrialRecord, collect, read_sweep


class SweepFolder:
    """Typed access to `<storage>/<sweep>`."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self._values: dict[str, Any] = {}
        self._ledger: LedgerFile | None = None

    def stored(self) -> dict[str, Any] | None:
        """The sweep.json of an earlier driver, None if there is none."""
        return read_sweep(self.storage)

    def claim(self, values: dict[str, Any], *, take_over: bool) -> None:
        """Begin to drive the sweep, and write its sweep.json.

        Raises:
            ConfigError: another driver seems alive, or claimed it at the same moment.
        """
        self.storage.probe()
        before = newest_claim(self.storage.names(DRIVERS))  # read first: of two drivers, the create refuses one
        stored = self.stored()
        driver = None if take_over else self._driver(before, stored)
        if driver is not None:
            raise ConfigError(
                f"sweep {self.storage.url} is being driven by {driver}; stop that one, choose another "
                "--sweep.name, or give --take-over"
            )
        epoch = before + 1
        line = json.dumps({"format": FORMAT, **claim_values()})
        try:
            self.storage.create(claim_name(DRIVERS, epoch), line.encode())
        except FileExistsError:
            raise ConfigError(
                f"sweep {self.storage.url} was claimed by another driver at this moment; stop one of the two"
            ) from None
        self._ledger = LedgerFile(self.storage, TRIALS, epoch)
        began = stored["began"] if stored is not None else time.time()
        self._values = {"began": began, **values, "owner": owner(), "owner_process": identity(), "epoch": epoch}
        self._values["seconds_before"] = stored.get("seconds", 0.0) if stored is not None else 0.0
        self._since = time.monotonic()
        best = stored.get("best") if stored is not None else None
        self.update(status="running", message="", best=best)

    def _driver(self, epoch: int, stored: dict[str, Any] | None) -> str | None:
        """The driver that seems to drive the sweep, or is starting to; None if there is none."""
        runs = stored is not None and stored["status"] == "running"
        if stored and runs and may_live(stored.get("owner_process"), storage_age_s(self.storage, SWEEP)):
            return str(stored["owner"])
        if epoch and (stored is None or stored.get("epoch") != epoch):
            name = claim_name(DRIVERS, epoch)
            with contextlib.suppress(FileNotFoundError, ValueError):  # a damaged claim does not name its driver
                claim = json.loads(self.storage.read(name))
                if may_live(claim["process"], storage_age_s(self.storage, name)):
                    return str(claim["owner"])
        return None

    @property
    def best(self) -> dict[str, Any] | None:
        """The best trial so far, whose checkpoint is pinned."""
        return self._values.get("best")

    @property
    def seconds(self) -> float:
        """Seconds for which the sweep was driven, by this command and earlier ones."""
        return float(self._values["seconds_before"]) + time.monotonic() - self._since

    def update(self, **values: Any) -> None:
        """Write sweep.json with these values changed and a new heartbeat."""
        self._values |= {**values, "heartbeat": time.time(), "seconds": round(self.seconds, 3)}
        text = json.dumps(clean(finite({"format": FORMAT, **self._values})), indent=1)
        self.storage.replace(SWEEP, (text + "\n").encode())

    def lines(self) -> list[dict[str, Any]]:
        """All lines of trials.jsonl."""
        return read_records(self.storage, TRIALS)

    def trials(self, metric: str, mode: str) -> list[TrialRecord]:
        """The record of each trial."""
        return collect(self.lines(), metric, mode)

    def note(self, trial: int, kind: str, **values: Any) -> None:
        """Add a line about a trial; it is in storage when this returns."""
        assert self._ledger is not None, "claim it first"
        self._ledger.add({"time": time.time(), "trial": trial, "kind": kind, **clean(values)})
        self._ledger.flush()

    def close(self) -> None:
        """Join the segments that object storage has of the file."""
        if self._ledger is not None:
            self._ledger.compact()
