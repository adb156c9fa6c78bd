"""The account of a run whose ledger is read from storage."""

from __future__ import annotations

import time
from typing import Any

from elastic.observe.account import Account, account
from elastic.observe.ledger import EVENTS, METRICS, read_records
from elastic.run.folder import LIVE_STATES, RunFolder, may_live
from elastic.storage import Storage


def account_of_run(
    folder: RunFolder, *, rows: list[dict[str, Any]] | None = None, events: list[dict[str, Any]] | None = None
) -> Account:
    """Compute the account of a run up to now; if its driver was killed, up to its last heartbeat.

    Args:
        rows, events: the run's ledger, if it was read already.

    Raises:
        ConfigError: the run's status or configuration is damaged.
    """
    rows = read_records(folder.storage, METRICS) if rows is None else rows
    events = read_records(folder.storage, EVENTS) if events is None else events
    status, config = folder.status(), folder.config()
    until, live = None, False
    if status is not None and status["status"] in LIVE_STATES:
        until, live = (
            float(status["heartbeat"]),
            may_live(status.get("owner_process"), time.time() - status["heartbeat"]),
        )
        until = time.time() if live else until
    return account(rows, events, until=until, live=live, microbatches=_microbatches(config))


def account_of_events(storage: Storage) -> Account:
    """Compute the account of a run without its rows: worker-seconds and cost are known, but not their causes."""
    return account((), read_records(storage, EVENTS))


def _microbatches(config: dict[str, Any] | None) -> int | None:
    """Return the number of microbatches in the run's configuration, for ledgers that do not record it."""
    batch: Any = ((config or {}).get("config") or {}).get("batch")
    found = batch.get("microbatches") if isinstance(batch, dict) else None
    return found if isinstance(found, int) and found > 0 else None


class Spending:
    """The cost of a run while it goes on.

    Args:
        most: the cost at which the run is to stop.
        events: the events of earlier claims.
    """

    def __init__(self, most: float, events: list[dict[str, Any]]):
        self.most, self._events = most, list(events)

    def add(self, event: dict[str, Any]) -> None:
        """Add an event of this claim."""
        self._events.append(event)

    def over(self, now: float) -> float | None:
        """Return the cost at `now` (unix seconds) if it has reached `most`, otherwise None."""
        cost = account((), self._events, until=now, live=True).cost
        return cost if cost is not None and cost >= self.most else None
