"""Ends a run: all members are done, its storage cannot be written, another claim owns it, or it is given up."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

from elastic import fault
from elastic.checkpoint.patience import is_from_storage
from elastic.membership import protocol as wire
from elastic.membership.world import Member
from elastic.redact import redact
from elastic.run.accounts import account_of_events
from elastic.run.checkpoints import Checkpoints
from elastic.run.folder import RunFolder
from elastic.run.keeper_options import KeeperOptions
from elastic.run.ledger_writer import LedgerWriter, event_of
from elastic.run.outcome import Outcome
from elastic.run.record import Record
from elastic.run.server import Server
from elastic.run.status import Status
from elastic.run.summary import result_values

END_S = 900.0  # for a run that ends because its ledger cannot be written: workers try to save meanwhile
ENDING_PATIENCE_S = 5.0


class Ending:
    """Ends a run, once. All methods are for the keeper's thread, except `give_up_with`.

    Args:
        server: returns the run's server, which changes.
        note: records an event at once.
        later: queues work for the keeper's thread.
    """

    def __init__(
        self,
        folder: RunFolder,
        options: KeeperOptions,
        outcome: Outcome,
        record: Record,
        ledger: LedgerWriter,
        checkpoints: Checkpoints,
        status: Status,
        *,
        server: Callable[[], Server],
        note: Callable[..., None],
        later: Callable[[Callable[[], None]], None],
    ):
        self._folder, self._options, self._outcome, self._record = folder, options, outcome, record
        self._ledger, self._checkpoints, self._status = ledger, checkpoints, status
        self._server, self._note, self._later = server, note, later
        self._done: dict[str, wire.Done] = {}
        self._stopping: tuple[str, float] | None = None  # why the run is to end, and by when (monotonic seconds)
        self._given_up: tuple[str, str] | None = None  # status and message to end with once the state is committed

    # ---- as planned ------------------------------------------------------------------------------------------------

    def give_up_with(self, status: str, message: str) -> None:
        """End the run with this status and message as soon as the state is committed."""
        self._given_up = (status, message)

    def member_done(self, member: Member, message: wire.Done) -> None:
        """A member of the world reported that it is done."""
        self._done[member.id] = message
        self.finish_if_done()

    def saved_alone(self) -> None:
        """A worker of a parked run has saved its state, or an event says why not: end the run or let its workers go."""
        if self._given_up is not None:
            self.close(*self._given_up, {})
        elif not self._outcome.closed:
            self._server().saved_alone(self._checkpoints.restore.newest)

    def finish_if_done(self) -> None:
        """End the run if every living member of the world has reported that it is done."""
        world, gone = self._status.world, self._server().gone()
        if world is None or not self._done or any(m.id not in self._done and m.id not in gone for m in world.members):
            return
        first = min(self._done.values(), key=lambda done: done.rank)
        self.close(first.status, first.message, first.result)

    def close(self, status: str, message: str, result: dict[str, Any]) -> None:
        """The one end of a run: result, event, status, compacted ledger."""
        outcome, record = self._outcome, self._record
        if outcome.closed:
            return
        if self._stopping is not None:
            status, message = "failed", f"{self._stopping[0]}; saved is step {self._checkpoints.step}"
        now, message = time.time(), redact(message)
        outcome.status, outcome.message = status, message
        step, last, seconds = self._status.last_step(), self._status.last_row(), round(now - outcome.started, 3)
        if not record.ended:  # otherwise an earlier keeper recorded the end, and died afterwards
            kind = "run_failed" if status == "failed" else "run_finished"
            self._note(kind, step=step, seconds=seconds, detail=message or status)
        fault.point("run.closing", -1, step)
        try:
            values = result_values(
                status,
                message,
                record,
                self._ledger.patiently(account_of_events, self._folder.storage),
                step=step,
                last=last,
                seconds=seconds,
                result=result,
                facts=self._options.facts,
            )
            self._ledger.patiently(self._folder.write_result, values)
            self._ledger.compact()
            self._status.write()
        except Exception as error:  # any error of storage: no worker is left that could wait for it
            return self.abandon(self._why(error))
        fault.point("run.closed", -1, step)
        outcome.closed = True
        self.publish({"status": status, "message": message}, values)

    def publish(self, end: dict[str, Any], result: dict[str, Any]) -> None:
        """Send everyone how the run ended: its status, message and result."""
        self._outcome.end, server = end, self._server()
        server.send_all(wire.Over(end["status"]))
        server.publish({"kind": "end", **end, "result": result}, keep=True)

    # ---- in trouble ------------------------------------------------------------------------------------------------

    def trouble(self, error: Exception) -> None:
        """The keeper failed. If storage could not be written in spite of all patience, the workers save what they can
        and the run ends. Any other error is a bug of ours, and ends the run at once."""
        why = self._why(error)
        if not is_from_storage(error) or self._outcome.closed:
            self.abandon(why)
        elif self._stopping is None:
            self._stopping = why, time.monotonic() + END_S
            self._ledger.patience_s = ENDING_PATIENCE_S
            fields = {"step": self._status.last_step(), "detail": why}
            record = event_of(self._options.epoch, "ledger_not_written", fields)
            self._later(lambda: self._ledger.add_event(record))
            server = self._server()
            server.publish(record, keep=True)
            server.ask_to_stop(why)
        elif time.monotonic() > self._stopping[1]:
            self.abandon(why)

    def abandon(self, reason: str) -> None:
        """Write nothing more, and send all workers and followers of this claim the reason to end."""
        reason, server = redact(reason), self._server()
        self._outcome.closed = True
        server.send_all(wire.Fenced(reason))
        self._outcome.end = {"status": "fenced", "message": reason}
        server.publish({"kind": "end", **self._outcome.end}, keep=True)

    def _why(self, error: Exception) -> str:
        """Why the run ends: one sentence for storage errors, a traceback for bugs."""
        if is_from_storage(error):
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return f"{self._folder.storage.url} could not be written: {reason}"
        return "".join(traceback.format_exception(error)).rstrip()
