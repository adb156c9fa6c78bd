"""The status of a run, for its folder and for those who ask its server."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from elastic.checkpoint.patience import is_from_storage
from elastic.membership.world import World
from elastic.observe.ledger import METRICS, read_tail
from elastic.run.checkpoints import Checkpoints
from elastic.run.folder import LIVE_STATES, RunFolder
from elastic.run.keeper_options import KeeperOptions
from elastic.run.ledger_writer import RECENT_ROWS, LedgerWriter
from elastic.run.outcome import Outcome
from elastic.run.record import Record
from elastic.run.server import Server
from elastic.run.summary import status_values


class Status:
    """A run's status. `values` and `last_step` may be called from any thread.

    Args:
        server: returns the run's present server.
    """

    def __init__(
        self,
        folder: RunFolder,
        options: KeeperOptions,
        outcome: Outcome,
        record: Record,
        ledger: LedgerWriter,
        checkpoints: Checkpoints,
        server: Callable[[], Server],
    ):
        self._folder, self._options, self._outcome, self._record = folder, options, outcome, record
        self._ledger, self._checkpoints, self._server = ledger, checkpoints, server
        self.world: World | None = None  # the present world

    def last_row(self) -> dict[str, Any]:
        """Return the row of the newest step. If this claim has done no step yet, the row is read from the ledger; empty
        if there is none or the storage does not answer."""
        if self._record.last_row is not None:
            return self._record.last_row
        try:
            rows = self._ledger.patiently(read_tail, self._folder.storage, METRICS, RECENT_ROWS)
        except Exception as error:
            if not is_from_storage(error):
                raise
            return {}  # the next write reports that the storage does not answer
        return next((r for r in reversed(rows) if "sample_hash" in r and r["step"] == self.last_step()), {})

    def last_step(self) -> int:
        """Return the newest recorded step; if this claim has done none yet, the step of the newest checkpoint."""
        row = self._record.last_row
        return row["step"] if row else self._checkpoints.step

    def values(self) -> dict[str, Any]:
        """Return the status as JSON values."""
        outcome, kept = self._outcome, self._checkpoints
        url = self._server().url if outcome.status in LIVE_STATES else None
        return status_values(
            outcome.status,
            outcome.message,
            time.time(),
            epoch=self._options.epoch,
            step=self.last_step(),
            total_steps=self._options.total_steps,
            world=self.world,
            server=url or None,
            checkpoint=kept.restore.step,
            checkpoint_failed=kept.failed,
            facts=self._options.facts,
        )

    def write(self) -> None:
        """Write the status into the run's folder."""
        self._ledger.patiently(self._folder.write_status, self.values())
