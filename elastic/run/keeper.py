"""The keeper of a run: what the membership server relays to. It alone writes the ledger and commits checkpoints.

The server's thread hands work to the keeper's own thread through a queue, so storage never delays a decision about
membership.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from elastic import fault
from elastic.checkpoint.patience import is_from_storage
from elastic.checkpoint.reader import Committed
from elastic.checkpoint.retention import Policy
from elastic.errors import ElasticError, FencedError, StorageError
from elastic.membership import protocol as wire
from elastic.membership.outbox import RowKey
from elastic.membership.server import MembershipServer
from elastic.membership.world import Generation, Member, World
from elastic.observe.ledger import EVENTS, METRICS, read_records, read_tail
from elastic.redact import clean, redact
from elastic.run.answering import AnsweringStorage
from elastic.run.checkpoints import Checkpoints, Keeping
from elastic.run.folder import LIVE_STATES, RunFolder
from elastic.run.record import STARTED, Record
from elastic.run.summary import result_values, status_values
from elastic.run.writing import RECENT_ROWS, LedgerWriter

HEARTBEAT_S = 5.0
FLUSH_LOCAL_S = 1.0
FLUSH_OBJECT_S = 10.0
END_S = 900.0  # for a run that ends because its ledger could not be written: workers try to save meanwhile
ENDING_PATIENCE_S = 5.0


@dataclass(frozen=True)
class KeeperOptions:
    """What the keeper needs to know of a run. `facts` go into every status (owner, host, git commit, ...).

    `save_every_s`: seconds between checkpoints, 0 for the interval that costs least, None where steps say when.
    `new_config`: replaces the run's configuration once it has trained with it.
    """

    epoch: int
    retention: Policy
    save_every_s: float | None
    total_steps: int
    tensorboard: bool
    price: float | None
    facts: dict[str, Any]
    new_config: dict[str, Any] | None = None


class RunKeeper:
    """Implements `membership.server.Keeper` for a run's folder. Call `attach`, then `start`."""

    def __init__(self, folder: RunFolder, options: KeeperOptions):
        self._options = options
        self._started = time.time()
        self._server: MembershipServer | None = None
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._storage = storage = AnsweringStorage(folder.storage, self._tell_hung)
        self._folder = folder = RunFolder(storage)
        self._thread = threading.Thread(target=self._work, name="run-keeper", daemon=True)
        self._world: World | None = None
        self._record = record = Record(options.epoch)
        self._ledger = LedgerWriter(
            storage, options.epoch, record, tensorboard=options.tensorboard, on_full=self._make_room
        )
        keeping = Keeping(self._note, self._send_all, self._owns, lambda: self._closed, self._ledger.flush_rows)
        self._checkpoints = Checkpoints(
            storage, options.epoch, options.retention, options.save_every_s, record, keeping
        )
        self._claim_step = self._checkpoints.step
        self._claimed_at = folder.claimed_at(options.epoch)
        self._config = folder.config()
        self._done: dict[str, wire.Done] = {}
        self._state, self._message = "running", ""
        self._closed, self._new_config = False, options.new_config
        self._end: dict[str, Any] | None = None
        self._ending: tuple[str, float] | None = None  # why the run is to end, and until when (monotonic)
        self._give_up_outcome: tuple[str, str] | None = None

    def attach(self, server: MembershipServer) -> None:
        self._server = server

    def recover(self) -> Record:
        """An earlier keeper of this claim died: go on where the ledger ends. To be called before `start`."""
        fault.point("host.recovering", -1, 0)
        record = self._record
        record.replay(read_records(self._storage, METRICS), read_records(self._storage, EVENTS))
        self._started = record.started or self._started
        self._checkpoints.recovered(record.started)
        self._claim_step = self._claim_step if record.claim_step is None else record.claim_step
        status, result = self._folder.status_if_whole(), self._folder.result()
        if status is None or result is None or status.get("epoch") != self._options.epoch:
            return record
        if status["status"] not in LIVE_STATES:
            self._state, self._message, self._closed = status["status"], status["message"], True
            self._end = {"status": self._state, "message": self._message}
        return record

    def start(self, detail: dict[str, Any]) -> None:
        """Write the first status and event, and start working."""
        self._thread.start()
        if self._end is not None:
            self._publish_end(self._folder.result() or {})
            return
        self._do(self._write_status)
        self.event(STARTED, step=self._claim_step, detail=detail)
        if self._checkpoints.restarted:
            self._do(self._checkpoints.note_commits_before)

    def stop(self) -> None:
        """Write out everything and end the thread."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(60)
        self._storage.close()

    # ---- called on the server's thread -------------------------------------------------------------------------

    def event(self, kind: str, **fields: Any) -> None:
        """Record an event. From any thread."""
        record = self._event(kind, fields)
        self._do(lambda: self._record_event(record))

    def _event(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        """One of no world belongs to the claim: its generation is `epoch-0`."""
        given = {k: clean(v) for k, v in fields.items() if v is not None}
        known = {"generation": f"{self._options.epoch}-0", **given}
        return {"time": time.time(), "kind": kind, **known}

    def world_formed(self, world: World) -> None:
        self._enter(world)
        self.event(
            "world_formed",
            generation=str(world.generation),
            detail={"size": world.size, "pids": [m.pid for m in world.members], "ids": [m.id for m in world.members]},
        )

    def world_resumed(self, world: World) -> None:
        """A restarted server found this world in the midst of training."""
        self._enter(world)
        self.event(
            "resumed",
            generation=str(world.generation),
            detail={"size": world.size, "ids": [m.id for m in world.members], "why": "the membership server was away"},
        )

    def _enter(self, world: World) -> None:
        self._world, now = world, time.time()

        def enter() -> None:
            self._record.world(world.size, now)
            self._checkpoints.world_formed(world.generation)

        self._do(enter)

    def world_broken(self, world: World, lost: Member | None, reason: str) -> None:
        now = time.time()
        self._do(lambda: self._record.broken(now, lost=lost is not None))
        who = {"member": lost.id, "node": lost.node, "pid": lost.pid} if lost is not None else {}
        self.event(
            "world_broken" if lost is None else "member_lost",
            generation=str(world.generation),
            step=self._last_step(),
            detail=reason,
            **who,
        )
        self._do(self._finish_if_done)

    def claim_step(self) -> int:
        return self._claim_step

    def save_stacks(self, member: Member, text: str) -> None:
        name = f"stacks/{int(time.time())}-{member.id}.txt"
        self._do(lambda: self._storage.replace(name, redact(text).encode()))

    def giving_up(self, status: str, message: str) -> None:
        """The run ends so as soon as the state is committed."""
        self._give_up_outcome = (status, message)

    def set_status(self, status: str) -> None:
        def write() -> None:
            if not self._closed:
                self._state = status
                self._write_status()

        self._do(write)

    def receive(self, member: Member, generation: Generation, message: wire.MemberMessage) -> None:
        match message:
            case wire.Rows():
                self._do(lambda: self._take_rows(message.rows))
            case wire.LedgerEvent():
                said = {"step": message.step, "seconds": message.seconds, "detail": message.detail}
                known = {name: value for name, value in said.items() if value is not None}
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
                self._do(self._saved_alone)
            case wire.Done():
                self._do(lambda: self._take_outcome(member, message))

    def found_damaged(self, step: int, attempt: str, problem: str) -> None:
        """A check found that a checkpoint has other bytes than were written."""
        self._distrust(Committed(step, attempt), problem, damaged=True, found_by="a check")

    def _distrust(self, checkpoint: Committed, problem: str, **how: Any) -> None:
        self._checkpoints.distrust(checkpoint)  # at once: a world may be formed before the storage has answered
        self._do(lambda: self._checkpoints.unloadable(checkpoint, problem, **how))

    def restore_point(self) -> wire.RestorePoint:
        return self._checkpoints.restore

    def close_run(self, status: str, message: str) -> None:
        self._do(lambda: self._close(status, message, {}))

    def status(self) -> dict[str, Any]:
        return self._status_values()

    def recent_rows(self) -> list[dict[str, Any]]:
        """The newest rows, which need not be in storage yet."""
        return self._ledger.recent()

    def ended(self) -> str | None:
        """How the run ended, for workers that did not hear of it."""
        return self._end["status"] if self._end is not None else None

    def admits(self, grant: str, secret: str) -> bool:
        """Whether somebody who may write into the run's folder left the hash of this secret there. It counts once."""
        return self._folder.redeem(grant, secret)

    def prune(self, policy: dict[str, Any], *, yes: bool) -> Future[list[dict[str, Any]]]:
        """Remove, between two commits, the checkpoints that the run's policy with these changes does not keep.

        Args:
            yes: else only say which.
        """
        answer: Future[list[dict[str, Any]]] = Future()

        def prune() -> None:
            if not answer.set_running_or_notify_cancel():
                return  # who asked went away
            try:
                answer.set_result(self._prune(replace(self._options.retention, **policy), yes=yes))
            except Exception as error:  # whatever storage raises: who asked is told, and the run goes on
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
            except Exception as error:  # without its keeper a run must not go on
                self._trouble(error)
            now = time.monotonic()
            try:
                if now >= next_flush:
                    next_flush = now + flush_s
                    self._flush()
                if now >= next_beat:
                    next_beat = now + HEARTBEAT_S
                    self._beat()
                if now >= self._checkpoints.due_at:
                    self._checkpoints.wish(self._world is not None)
            except Exception as error:  # without its keeper a run must not go on
                self._trouble(error)
        self._flush()
        self._ledger.close()

    def _flush(self) -> None:
        if not self._closed:
            self._ledger.flush(self._confirm)

    def _confirm(self, rows: list[RowKey]) -> None:
        self._send_all(wire.Recorded(rows))

    def _send_all(self, message: wire.HostMessage) -> None:
        assert self._server is not None
        self._server.send_all(message)

    def _beat(self) -> None:
        if self._owns():
            self._write_status()

    def _owns(self) -> bool:
        """Whether the run is still this claim's; if not, everyone is told."""
        if self._closed:
            return False
        newest, epoch = self._ledger.patiently(self._folder.newest_epoch), self._options.epoch
        if newest > epoch:
            self._give_up(f"claim {newest} took the run over from claim {epoch}")
        elif self._claimed_at is not None:
            at = self._ledger.patiently(self._folder.claimed_at, epoch)
            if at is None and newest < epoch:
                self._save_anew()
            elif at is not None and at != self._claimed_at:
                self._give_up_removed()
        return not self._closed

    def _give_up_removed(self) -> None:
        self._give_up(f"{self._storage.url} was removed while this run was live, and claimed by another command")

    def _save_anew(self) -> None:
        """Somebody removed the folder of this run: say so, and write anew all that is still known."""
        facts, at = self._options.facts, time.time()
        claim = {"owner": facts.get("owner"), "process": facts.get("owner_process"), "time": at}
        try:
            self._ledger.patiently(self._folder.write_anew, self._options.epoch, self._config, claim)
        except FileExistsError:
            return self._give_up_removed()
        self._claimed_at = at
        self._note(
            "folder_removed",
            step=self._last_step(),
            detail=f"{self._storage.url} was removed; the state is saved anew, and rows before this one are lost",
        )
        self._checkpoints.removed()

    def _why(self, error: Exception) -> str:
        """What ends the run: one sentence where it is the storage, and all there is to know where it is us."""
        if is_from_storage(error):
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return f"{self._storage.url} could not be written: {reason}"
        return "".join(traceback.format_exception(error)).rstrip()

    def _tell_hung(self, what: str) -> None:
        """The storage does not answer: say so at once. It is in the ledger when that can be written. From any
        thread."""
        record = self._event("storage_hung", {"detail": what})

        def write() -> None:
            if not self._closed:
                self._ledger.add_event(record)

        self._do(write)
        if self._server is not None and not self._closed:
            self._server.publish(record, keep=True)

    def _make_room(self) -> None:
        self._checkpoints.make_room(self._last_step())

    def _trouble(self, error: Exception) -> None:
        """Storage that could not be written for all the time that it was waited for: the workers save what they hold,
        if that can be, and the run ends. Anything else is a fault of ours, and ends it at once."""
        why = self._why(error)
        if not is_from_storage(error) or self._server is None or self._closed:
            self._give_up(why)
        elif self._ending is None:
            self._ending = why, time.monotonic() + END_S
            self._ledger.patience_s = ENDING_PATIENCE_S
            record = self._event("ledger_not_written", {"step": self._last_step(), "detail": why})
            self._do(lambda: self._ledger.add_event(record))
            self._server.publish(record, keep=True)
            self._server.ask_to_stop(why)
        elif time.monotonic() > self._ending[1]:
            self._give_up(why)

    def _give_up(self, reason: str) -> None:
        """Write nothing more, and tell everyone who works for this claim to end, and why."""
        self._closed, reason = True, redact(reason)
        assert self._server is not None
        self._send_all(wire.Fenced(reason))
        self._end = {"status": "fenced", "message": reason}
        self._server.publish({"kind": "end", **self._end}, keep=True)

    def _note(self, kind: str, **fields: Any) -> None:
        """Record an event at once: what is queued may be the end of the run."""
        self._record_event(self._event(kind, fields))

    def _record_event(self, record: dict[str, Any]) -> None:
        if self._closed:
            return
        try:
            self._ledger.add_event(record)
        except Exception as error:  # it is written with the next one; what it tells of is to be carried out
            self._trouble(error)
        assert self._server is not None
        self._server.publish(record, keep=True)

    def _take_rows(self, rows: list[dict[str, Any]]) -> None:
        if self._closed:
            return
        assert self._server is not None
        if self._new_config is not None and any("sample_hash" in row for row in rows):
            self._ledger.patiently(self._folder.write_config, self._new_config)
            self._config, self._new_config = self._new_config, None
        for row in self._ledger.add_rows(rows):
            self._server.publish(row, keep="sample_hash" not in row)

    def _take_share(self, member: Member, generation: Generation, share: wire.Share) -> None:
        ranks = {m.id: rank for rank, m in enumerate(self._world.members)} if self._world else {}
        self._checkpoints.take_share(member.id, generation, share, ranks)

    def _prune(self, policy: Policy, *, yes: bool) -> list[dict[str, Any]]:
        if not self._owns():
            raise FencedError("the run is ending, or another claim owns it")
        return self._checkpoints.prune(policy, yes=yes)

    # ---- the end -----------------------------------------------------------------------------------------------

    def _take_outcome(self, member: Member, message: wire.Done) -> None:
        self._done[member.id] = message
        self._finish_if_done()

    def _saved_alone(self) -> None:
        """The state of a parked run is saved, unless an event said why not: it is given up, or lets its workers go."""
        if self._give_up_outcome is not None:
            self._close(*self._give_up_outcome, {})
        elif not self._closed:
            assert self._server is not None
            self._server.saved_alone(self._checkpoints.restore.newest)

    def _finish_if_done(self) -> None:
        """The run is over when every member of the world that still lives has said so."""
        world = self._world
        assert self._server is not None
        gone = self._server.gone()
        if world is None or not self._done or any(m.id not in self._done and m.id not in gone for m in world.members):
            return
        first = min(self._done.values(), key=lambda done: done.rank)
        self._close(first.status, first.message, first.result)

    def _close(self, status: str, message: str, result: dict[str, Any]) -> None:
        """The one end of a run: result, event, status, compacted ledger."""
        if self._closed:
            return
        if self._ending is not None:
            status, message = "failed", f"{self._ending[0]}; saved is step {self._checkpoints.step}"
        now, message = time.time(), redact(message)
        self._state, self._message = status, message
        record = self._record
        record.world(0, now)
        values = result_values(
            status,
            message,
            record,
            now,
            step=self._last_step(),
            last=self._last_row(),
            started=self._started,
            price=self._options.price,
            result=result,
            facts=self._options.facts,
        )
        if not record.ended:  # else an earlier keeper died after it had said so
            kind = "run_failed" if status == "failed" else "run_finished"
            self._note(kind, step=values["steps"], seconds=values["seconds"], detail=message or status)
        fault.point("run.closing", -1, values["steps"])
        try:
            self._ledger.patiently(self._folder.write_result, values)
            self._ledger.compact()
            self._write_status()
        except Exception as error:  # whatever storage raises: nobody is left who could wait
            return self._give_up(self._why(error))
        fault.point("run.closed", -1, values["steps"])
        self._closed = True
        self._end = {"status": status, "message": message}
        self._publish_end(values)

    def _publish_end(self, result: dict[str, Any]) -> None:
        assert self._server is not None
        assert self._end is not None
        self._send_all(wire.Over(self._end["status"]))
        self._server.publish({"kind": "end", **self._end, "result": result}, keep=True)

    def _last_row(self) -> dict[str, Any]:
        """Of the newest step: where this claim did none, all were done before it."""
        if self._record.last_row is not None:
            return self._record.last_row
        try:
            rows = self._ledger.patiently(read_tail, self._storage, METRICS, RECENT_ROWS)
        except Exception as error:
            if not is_from_storage(error):
                raise
            return {}  # what is written next says that it does not answer
        return next((r for r in reversed(rows) if "sample_hash" in r and r["step"] == self._last_step()), {})

    def _last_step(self) -> int:
        row = self._record.last_row
        return row["step"] if row else self._checkpoints.step

    def _status_values(self) -> dict[str, Any]:
        live, kept = self._state in LIVE_STATES, self._checkpoints
        return status_values(
            self._state,
            self._message,
            time.time(),
            epoch=self._options.epoch,
            step=self._last_step(),
            total_steps=self._options.total_steps,
            world=self._world,
            server=self._server.url if self._server is not None and live else None,
            checkpoint=kept.restore.step,
            checkpoint_failed=kept.failed,
            facts=self._options.facts,
        )

    def _write_status(self) -> None:
        self._ledger.patiently(self._folder.write_status, self._status_values())
