"""The keeper of a run, to which the membership server relays messages. It alone writes the ledger and commits
checkpoints.

The server's thread passes work to the keeper's own thread through a queue, so that storage never delays a decision
about membership.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from elastic import fault
from elastic.checkpoint.reader import Committed
from elastic.checkpoint.retention import Policy
from elastic.errors import ElasticError, FencedError, StorageError
from elastic.membership import protocol as wire
from elastic.membership.outbox import RowKey
from elastic.membership.world import Generation, Member, World
from elastic.observe.figures import Figures, exposition
from elastic.observe.ledger import EVENTS, METRICS, read_records
from elastic.redact import redact
from elastic.run.accounts import Spending
from elastic.run.answering import AnsweringStorage
from elastic.run.checkpoints import Checkpoints, Keeping
from elastic.run.ending import Ending
from elastic.run.folder import LIVE_STATES, RunFolder
from elastic.run.keeper_options import KeeperOptions
from elastic.run.ledger_writer import LedgerWriter, event_of
from elastic.run.outcome import Outcome
from elastic.run.ownership import Ownership
from elastic.run.record import STARTED, Record
from elastic.run.server import NoServer, Server
from elastic.run.status import Status

HEARTBEAT_S = 5.0
FLUSH_LOCAL_S = 1.0
FLUSH_OBJECT_S = 10.0


class RunKeeper:
    """Implements `membership.keeper.Keeper` for a run's folder. Call `attach`, then `start`."""

    def __init__(self, folder: RunFolder, options: KeeperOptions):
        self._options, self._outcome = options, Outcome(time.time())
        self._server: Server = NoServer()
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._storage = storage = AnsweringStorage(folder.storage, self._report_hung)
        self._folder = folder = RunFolder(storage)
        self._thread = threading.Thread(target=self._work, name="run-keeper", daemon=True)
        self._record = record = Record(options.epoch)
        self._ledger = ledger = LedgerWriter(
            storage, options.epoch, record, tensorboard=options.tensorboard, on_full=self._make_room
        )
        outcome = self._outcome
        keeping = Keeping(
            self._note, self._send_all, lambda: self._ownership.lasts(), lambda: outcome.closed, ledger.flush_rows
        )
        self._checkpoints = checkpoints = Checkpoints(
            storage, options.epoch, options.retention, options.save_every_s, record, keeping
        )
        self._claim_step = checkpoints.step
        self._figures = Figures(options.total_steps)
        self._spending: Spending | None = None
        self._status = Status(folder, options, outcome, record, ledger, checkpoints, lambda: self._server)
        self._ending = Ending(
            folder,
            options,
            outcome,
            record,
            ledger,
            checkpoints,
            self._status,
            server=lambda: self._server,
            note=self._note,
            later=self._do,
        )
        self._ownership = Ownership(folder, options, outcome, ledger, self._ending.abandon, self._folder_removed)

    def attach(self, server: Server) -> None:
        """Relay to this server from now on."""
        self._server = server

    def recover(self) -> Record:
        """Go on where the ledger of an earlier keeper of this claim ends. To be called before `start`."""
        fault.point("host.recovering", -1, 0)
        record = self._record
        record.replay(read_records(self._storage, METRICS), read_records(self._storage, EVENTS))
        self._outcome.started = record.started or self._outcome.started
        self._checkpoints.recovered(record.started)
        self._claim_step = self._claim_step if record.claim_step is None else record.claim_step
        status, result = self._folder.status_if_whole(), self._folder.result()
        if status is None or result is None or status.get("epoch") != self._options.epoch:
            return record
        if status["status"] not in LIVE_STATES:
            outcome = self._outcome
            outcome.status, outcome.message, outcome.closed = status["status"], status["message"], True
            outcome.end = {"status": outcome.status, "message": outcome.message}
        return record

    def start(self, detail: dict[str, Any]) -> None:
        """Write the first status and event, and begin to work."""
        self._thread.start()
        if self._outcome.end is not None:
            self._ending.publish(self._outcome.end, self._folder.result() or {})
            return
        self._do(lambda: self._begin(detail))
        if self._checkpoints.restarted:
            self._do(self._checkpoints.note_commits_before)

    def _begin(self, detail: dict[str, Any]) -> None:
        before = self._ledger.patiently(self._folder.status_if_whole)
        if before is not None and before["status"] in LIVE_STATES and before.get("epoch") != self._options.epoch:
            detail = {**detail, "heartbeat_before": before["heartbeat"]}  # its driver was killed
        if self._options.max_cost is not None:
            earlier = self._ledger.patiently(read_records, self._storage, EVENTS)
            self._spending = Spending(self._options.max_cost, earlier)
        self._status.write()
        self._note(STARTED, step=self._claim_step, detail=detail)

    def stop(self) -> None:
        """Write everything to storage, and end the thread."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(60)
        self._storage.close()

    # ---- called on the server's thread -------------------------------------------------------------------------

    def event(self, kind: str, **fields: Any) -> None:
        """Record an event. From any thread."""
        record = event_of(self._options.epoch, kind, fields)
        self._do(lambda: self._record_event(record))

    def world_formed(self, world: World) -> None:
        self._enter(world)
        self.event(
            "world_formed",
            generation=str(world.generation),
            detail={"size": world.size, "pids": [m.pid for m in world.members], "ids": [m.id for m in world.members]},
        )

    def world_resumed(self, world: World) -> None:
        """A restarted server found that this world is training."""
        self._enter(world)
        self.event(
            "resumed",
            generation=str(world.generation),
            detail={"size": world.size, "ids": [m.id for m in world.members], "why": "the membership server was away"},
        )

    def _enter(self, world: World) -> None:
        self._status.world = world
        self._do(lambda: self._checkpoints.world_formed(world.generation))

    def world_broken(self, world: World, lost: Member | None, reason: str) -> None:
        self._do(lambda: self._record.broken(lost=lost is not None))
        who = {"member": lost.id, "node": lost.node, "pid": lost.pid} if lost is not None else {}
        self.event(
            "world_broken" if lost is None else "member_lost",
            generation=str(world.generation),
            step=self._status.last_step(),
            detail=reason,
            **who,
        )
        self._do(self._ending.finish_if_done)

    def claim_step(self) -> int:
        return self._claim_step

    def save_stacks(self, member: Member, text: str, *, of: str = "") -> None:
        name = f"stacks/{int(time.time())}-{member.id}{of and '-' + of}.txt"
        self._do(lambda: self._storage.replace(name, redact(text).encode()))

    def giving_up(self, status: str, message: str) -> None:
        """End the run with this status and message as soon as the state is committed."""
        self._ending.give_up_with(status, message)

    def set_status(self, status: str) -> None:
        def write() -> None:
            if not self._outcome.closed:
                self._outcome.status = status
                self._status.write()

        self._do(write)

    def receive(self, member: Member, generation: Generation, message: wire.MemberMessage) -> None:
        match message:
            case wire.Rows():
                self._do(lambda: self._take_rows(message.rows))
            case wire.LedgerEvent():
                fields = {"step": message.step, "seconds": message.seconds, "detail": message.detail}
                known = {name: value for name, value in fields.items() if value is not None}
                self.event(message.event, generation=str(generation), member=member.id, **known)
                if message.event == "restored" and message.step is not None:
                    self._claim_step = min(self._claim_step, message.step)
            case wire.Unloadable():
                self._distrust(
                    Committed(message.step, message.attempt),
                    message.problem,
                    damaged=message.damaged,
                    found_by=member.id,
                    generation=str(generation),
                )
            case wire.Share():
                self._do(lambda: self._take_share(member, generation, message))
            case wire.SavedAlone():
                self._do(self._ending.saved_alone)
            case wire.Done():
                self._do(lambda: self._ending.member_done(member, message))

    def found_damaged(self, step: int, attempt: str, problem: str) -> None:
        """A check found a checkpoint whose bytes differ from those that were written."""
        self._distrust(Committed(step, attempt), problem, damaged=True, found_by="a check")

    def _distrust(self, checkpoint: Committed, problem: str, **how: Any) -> None:
        self._checkpoints.distrust(checkpoint)  # at once: a world may be formed before storage answers
        self._do(lambda: self._checkpoints.unloadable(checkpoint, problem, **how))

    def restore_point(self) -> wire.RestorePoint:
        return self._checkpoints.restore

    def close_run(self, status: str, message: str) -> None:
        self._do(lambda: self._ending.close(status, message, {}))

    def status(self) -> dict[str, Any]:
        return self._status.values()

    def recent_rows(self) -> list[dict[str, Any]]:
        """The newest rows, including those that are not in storage yet."""
        return self._ledger.recent()

    def metrics(self) -> str:
        """The run's figures, for Prometheus."""
        return exposition(str(self._options.facts.get("run", "")), self._figures.values())

    def ended(self) -> str | None:
        """How the run ended, for workers that missed it; None if it goes on."""
        end = self._outcome.end
        return end["status"] if end is not None else None

    def admits(self, grant: str, secret: str) -> bool:
        """Whether a process that may write into the run's folder left the hash of this secret there. It counts once."""
        return self._folder.redeem(grant, secret)

    def prune(self, policy: dict[str, Any], *, yes: bool) -> Future[list[dict[str, Any]]]:
        """Remove, between two commits, the checkpoints that the run's policy with these changes does not keep.

        Args:
            yes: if False, they are only returned.
        """
        answer: Future[list[dict[str, Any]]] = Future()

        def prune() -> None:
            if not answer.set_running_or_notify_cancel():
                return  # the client went away
            try:
                answer.set_result(self._prune(replace(self._options.retention, **policy), yes=yes))
            except Exception as error:  # any error of storage goes to the client, and the run goes on
                known = error if isinstance(error, ElasticError) else StorageError(f"{type(error).__name__}: {error}")
                answer.set_exception(known)

        self._do(prune)
        return answer

    # ---- the keeper's thread -----------------------------------------------------------------------------------

    def _do(self, work: Callable[[], None]) -> None:
        self._queue.put(work)

    def _work(self) -> None:
        flush_s = FLUSH_LOCAL_S if self._storage.can_append else FLUSH_OBJECT_S
        next_flush, next_beat = time.monotonic() + flush_s, time.monotonic() + HEARTBEAT_S
        while True:
            due = min(next_flush, next_beat, self._checkpoints.due_at)
            wait = max(0.0, due - time.monotonic())
            work: Callable[[], None] | None = lambda: None  # noqa: E731
            with contextlib.suppress(queue.Empty):
                work = self._queue.get(timeout=wait)
            if work is None:
                break
            try:
                work()
            except Exception as error:  # a run must not go on without its keeper
                self._ending.trouble(error)
            now = time.monotonic()
            try:
                if now >= next_flush:
                    next_flush = now + flush_s
                    self._flush()
                if now >= next_beat:
                    next_beat = now + HEARTBEAT_S
                    self._beat()
                if now >= self._checkpoints.due_at:
                    self._checkpoints.wish(self._status.world is not None)
            except Exception as error:  # a run must not go on without its keeper
                self._ending.trouble(error)
        self._flush()
        self._ledger.close()

    def _flush(self) -> None:
        if not self._outcome.closed:
            self._ledger.flush(self._confirm)

    def _confirm(self, rows: list[RowKey]) -> None:
        self._send_all(wire.Recorded(rows))

    def _send_all(self, message: wire.HostMessage) -> None:
        self._server.send_all(message)

    def _beat(self) -> None:
        if self._ownership.lasts():
            self._status.write()
        cost = self._spending.over(time.time()) if self._spending is not None else None
        if cost is not None and self._spending is not None:
            most, self._spending = self._spending.most, None
            self._server.ask_to_stop(f"paused by --run.max-cost {most:g}: the run has cost {cost:.6g}")

    def _report_hung(self, what: str) -> None:
        """The storage does not answer: publish it at once, and record it when the ledger can be written. From any
        thread."""
        record = event_of(self._options.epoch, "storage_hung", {"detail": what})

        def write() -> None:
            if not self._outcome.closed:
                self._ledger.add_event(record)

        self._do(write)
        if not self._outcome.closed:
            self._server.publish(record, keep=True)

    def _folder_removed(self) -> None:
        self._note(
            "folder_removed",
            step=self._status.last_step(),
            detail=f"{self._storage.url} was removed; the state is saved anew, and rows before this one are lost",
        )
        self._checkpoints.removed()

    def _make_room(self) -> None:
        self._checkpoints.make_room(self._status.last_step())

    def _note(self, kind: str, **fields: Any) -> None:
        """Record an event at once, before queued work: that may be the end of the run."""
        self._record_event(event_of(self._options.epoch, kind, fields))

    def _record_event(self, record: dict[str, Any]) -> None:
        if self._outcome.closed:
            return
        self._figures.hear(record)
        if self._spending is not None:
            self._spending.add(record)
        try:
            self._ledger.add_event(record)
        except Exception as error:  # the event is written with the next one; its consequences must not wait for that
            self._ending.trouble(error)
        self._server.publish(record, keep=True)

    def _take_rows(self, rows: list[dict[str, Any]]) -> None:
        if self._outcome.closed:
            return
        if any("sample_hash" in row for row in rows):
            self._ownership.trained()
        for row in self._ledger.add_rows(rows):
            self._figures.hear(row)
            self._server.publish(row, keep="sample_hash" not in row)

    def _take_share(self, member: Member, generation: Generation, share: wire.Share) -> None:
        world = self._status.world
        ranks = {m.id: rank for rank, m in enumerate(world.members)} if world else {}
        self._checkpoints.take_share(member.id, generation, share, ranks)

    def _prune(self, policy: Policy, *, yes: bool) -> list[dict[str, Any]]:
        if not self._ownership.lasts():
            raise FencedError("the run is ending, or another claim owns it")
        return self._checkpoints.prune(policy, yes=yes)
