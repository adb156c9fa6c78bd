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
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from elastic import fault
from elastic.checkpoint.cadence import auto_interval, save_cost
from elastic.checkpoint.format import MANIFEST, Manifest, attempt_folder
from elastic.checkpoint.reader import newest_first
from elastic.checkpoint.retention import Policy, Retention, removals
from elastic.checkpoint.transfer import patiently
from elastic.checkpoint.writer import commit
from elastic.errors import ElasticError, FencedError, StorageError
from elastic.membership.outbox import RowKey, row_key
from elastic.membership.server import MembershipServer
from elastic.membership.world import Generation, Member, World
from elastic.observe.ledger import EVENTS, METRICS, LedgerFile, read_records
from elastic.observe.tensorboard import TensorBoard
from elastic.redact import clean, redact
from elastic.run.folder import LIVE_STATES, RunFolder
from elastic.run.record import STARTED, Record

HEARTBEAT_S = 5.0
FLUSH_LOCAL_S = 1.0
FLUSH_OBJECT_S = 10.0
RECENT_ROWS = 100


@dataclass(frozen=True)
class KeeperOptions:
    """What the keeper needs to know of a run. `facts` go into every status (owner, host, git commit, ...).

    `save_every_s`: seconds between checkpoints, 0 for the interval that costs least, None where steps say when.
    """

    epoch: int
    retention: Policy
    save_every_s: float | None
    total_steps: int
    tensorboard: bool
    price: float | None
    facts: dict[str, Any]


@dataclass
class _Attempt:
    """A checkpoint whose packs are coming in."""

    size: int
    generation: Generation
    indexes: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    header: dict[str, Any] | None = None
    over: bool = False
    error: str | None = None


class RunKeeper:
    """Implements `membership.server.Keeper` for a run's folder. Call `attach`, then `start`."""

    def __init__(self, folder: RunFolder, options: KeeperOptions):
        self._folder, self._options = folder, options
        self._started = time.time()
        self._storage = folder.storage
        self._rows = LedgerFile(self._storage, METRICS, options.epoch)
        self._events = LedgerFile(self._storage, EVENTS, options.epoch)
        self._tensorboard: TensorBoard | None = None
        self._server: MembershipServer | None = None
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="run-keeper", daemon=True)
        self._world: World | None = None
        self._record = Record(options.epoch)
        self._to_confirm: list[RowKey] = []
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT_ROWS)
        self._done: dict[str, dict[str, Any]] = {}
        self._attempts: dict[tuple[int, str], _Attempt] = {}
        self._state, self._message = "running", ""
        self._retention = Retention(self._storage, options.retention)
        self._save_at = time.monotonic() + self._save_interval()
        self._closed = False
        self._restarted = False
        self._end: dict[str, Any] | None = None
        self._give_up_outcome: tuple[str, str] | None = None
        self._save_failed: dict[str, Any] | None = None
        newest = next(newest_first(self._storage), None)
        self._claim_step = newest.step if newest else 0
        self._restore: dict[str, Any] = (
            {"rung": "checkpoint", "step": newest.step, "attempt": newest.attempt} if newest else {"rung": "fresh"}
        )

    def attach(self, server: MembershipServer) -> None:
        self._server = server

    def recover(self) -> Record:
        """An earlier keeper of this claim died: go on where the ledger ends. To be called before `start`."""
        fault.point("host.recovering", -1, 0)
        self._restarted = True
        record = self._record
        record.replay(read_records(self._storage, METRICS), read_records(self._storage, EVENTS))
        self._started = record.started or self._started
        self._claim_step = self._claim_step if record.claim_step is None else record.claim_step
        status, result = self._folder.status(), self._folder.result()
        if status is None or result is None or status["epoch"] != self._options.epoch:
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
        if self._restarted:
            self._do(self._note_commits_before)

    def stop(self) -> None:
        """Write out everything and end the thread."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(60)

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
            "world_formed", generation=str(world.generation),
            detail={"size": world.size, "pids": [m.pid for m in world.members], "ids": [m.id for m in world.members]},
        )  # fmt: skip

    def world_resumed(self, world: World) -> None:
        """A restarted server found this world in the midst of training."""
        self._enter(world)
        self.event(
            "resumed", generation=str(world.generation),
            detail={"size": world.size, "ids": [m.id for m in world.members], "why": "the membership server was away"},
        )  # fmt: skip

    def _enter(self, world: World) -> None:
        self._world, now = world, time.time()

        def enter() -> None:
            self._record.world(world.size, now)
            self._attempts.clear()
            self._save_at = time.monotonic() + self._save_interval()

        self._do(enter)

    def world_broken(self, world: World, lost: Member | None, reason: str) -> None:
        now = time.time()
        self._do(lambda: self._record.broken(now, lost=lost is not None))
        self.event(
            "member_lost", generation=str(world.generation), step=self._last_step(), detail=reason,
            **({"member": lost.id, "node": lost.node, "pid": lost.pid} if lost else {}),
        )  # fmt: skip
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

    def receive(self, member: Member, generation: Generation, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "rows":
            self._do(lambda: self._take_rows(message["rows"]))
        elif kind == "event":
            self.event(
                message["event"], generation=str(generation), member=member.id,
                **{k: message[k] for k in ("step", "seconds", "detail") if k in message},
            )  # fmt: skip
        elif kind == "pack":
            self._do(lambda: self._take_pack(member, generation, message))
        elif kind == "saved alone":
            self._do(self._saved_alone)
        elif kind in ("done", "failed"):
            self._do(lambda: self._take_outcome(member, generation, message))

    def restore_point(self) -> dict[str, Any]:
        return self._restore

    def close_run(self, status: str, message: str) -> None:
        self._do(lambda: self._close(status, message, {}))

    def status(self) -> dict[str, Any]:
        return self._status_values()

    def recent_rows(self) -> list[dict[str, Any]]:
        """The newest rows, which need not be in storage yet."""
        return list(self._recent)

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
            wait = max(0.0, min(next_flush, next_beat, self._save_at) - time.monotonic())
            work: Callable[[], None] | None = lambda: None  # noqa: E731
            with contextlib.suppress(queue.Empty):
                work = self._queue.get(timeout=wait)
            if work is None:
                break
            try:
                work()
            except Exception as error:  # without its keeper a run must not go on
                self._give_up("".join(traceback.format_exception(error)).rstrip())
            now = time.monotonic()
            try:
                if now >= next_flush:
                    next_flush = now + flush_s
                    self._flush()
                if now >= next_beat:
                    next_beat = now + HEARTBEAT_S
                    self._beat()
                if now >= self._save_at:
                    self._wish_for_save()
            except Exception as error:  # without its keeper a run must not go on
                self._give_up("".join(traceback.format_exception(error)).rstrip())
        self._flush()
        if self._tensorboard:
            self._tensorboard.close()

    def _flush(self) -> None:
        if self._closed:
            return
        self._rows.flush()
        self._events.flush()
        if self._tensorboard:
            self._tensorboard.flush()
        if self._to_confirm:
            assert self._server is not None
            fault.point("ledger.recorded", -1, self._to_confirm[-1][1])
            self._server.send_all({"kind": "recorded", "rows": self._to_confirm})
            self._to_confirm = []

    def _beat(self) -> None:
        if self._closed or not self._still_ours():
            return
        self._write_status()

    def _still_ours(self) -> bool:
        newest = self._folder.newest_epoch()
        if newest <= self._options.epoch:
            return True
        self._give_up(f"claim {newest} took the run over from claim {self._options.epoch}")
        return False

    def _give_up(self, reason: str) -> None:
        """Write nothing more, and tell everyone who works for this claim to end, and why."""
        self._closed, reason = True, redact(reason)
        assert self._server is not None
        self._server.send_all({"kind": "fenced", "reason": reason})
        self._end = {"status": "fenced", "message": reason}
        self._server.publish({"kind": "end", **self._end}, keep=True)

    def _note(self, kind: str, **fields: Any) -> None:
        """Record an event at once: what is queued may be the end of the run."""
        self._record_event(self._event(kind, fields))

    def _record_event(self, record: dict[str, Any]) -> None:
        if self._closed:
            return
        self._events.add(record)
        if record["kind"] not in ("worker_warm", "restored"):
            self._events.flush()  # first, so that nobody hears of what the ledger does not know
        assert self._server is not None
        self._server.publish(record, keep=True)

    def _take_rows(self, rows: list[dict[str, Any]]) -> None:
        if self._closed:
            return
        assert self._server is not None
        fault.point("ledger.rows", -1, rows[0]["step"])
        for row in rows:
            self._to_confirm.append(row_key(row))
            if not self._record.take_row(row):
                continue  # sent again by who could not know that it had arrived
            self._rows.add(row)
            self._recent.append(row)
            if self._options.tensorboard:
                if self._tensorboard is None:
                    self._tensorboard = TensorBoard(self._storage, self._options.epoch)
                self._tensorboard.row(row)
            self._server.publish(row, keep="sample_hash" not in row)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def _save_interval(self) -> float:
        every = self._options.save_every_s
        if every is None:
            return float("inf")
        return every or auto_interval(self._record.save_costs, time.time() - self._started, self._record.faults)

    def _wish_for_save(self) -> None:
        """Once; the next is due an interval after this one was decided on, or after the world changed meanwhile."""
        self._save_at = float("inf")
        if self._world is not None and not self._closed:
            assert self._server is not None
            self._server.send_all({"kind": "wish", "wish": "save", "detail": "it is time"})

    def _take_pack(self, member: Member, generation: Generation, message: dict[str, Any]) -> None:
        step, name = key = (message["step"], message["attempt"])
        if key not in self._attempts:
            attempt = self._attempts[key] = _Attempt(message["shares"], generation)
            if self._restarted and patiently(self._storage.exists, f"{attempt_folder(step, name)}/{MANIFEST}"):
                self._note_committed(step, name)  # by the keeper before, which could not tell everyone
                self._decided(step, name, attempt, None)
                return
        attempt = self._attempts[key]
        if attempt.over:  # sent again by who could not know what became of it
            self._tell(step, name, attempt.error)
            return
        if message["error"]:
            self._decided(step, name, attempt, message["error"])
            return
        attempt.indexes[member.id], attempt.facts[member.id] = message["index"], message["facts"]
        attempt.header = message["header"] or attempt.header
        if len(attempt.indexes) == attempt.size and attempt.header is not None:
            self._decided(step, name, attempt, self._commit(step, name, attempt))

    def _note_commits_before(self) -> None:
        """The keeper before may have died between a commit and its event, and nobody may be left who waits for it."""
        for checkpoint in reversed(list(newest_first(self._storage))):
            if checkpoint.attempt.startswith(f"{self._options.epoch}-"):
                self._note_committed(checkpoint.step, checkpoint.attempt)

    def _note_committed(self, step: int, name: str) -> None:
        self._restore = {"rung": "checkpoint", "step": step, "attempt": name}
        if (step, name) not in self._record.committed:
            self._record.committed.add((step, name))
            self._note("checkpoint_committed", generation=name.rpartition("-")[0], step=step, detail={"attempt": name})

    def _decided(self, step: int, name: str, attempt: _Attempt, error: str | None) -> None:
        """Tell the ledger and the workers what became of an attempt; then there is time to tidy up."""
        attempt.over, attempt.error = True, error
        attempt.indexes.clear()
        self._save_at = time.monotonic() + self._save_interval()
        if error:
            self._save_failed = {"step": step, "error": error}
            self._note("checkpoint_failed", generation=str(attempt.generation), step=step, detail=error)
        self._tell(step, name, error)
        if error or self._closed:
            return
        try:
            self._retention.prune()
        except Exception as problem:  # whatever storage raises: the run does not depend on it, and the next tries again
            self._note("checkpoint_failed", step=step, detail=f"old checkpoints could not be removed: {problem}")

    def _prune(self, policy: Policy, *, yes: bool) -> list[dict[str, Any]]:
        if self._closed or not self._still_ours():
            raise FencedError("the run is ending, or another claim owns it")
        retention = Retention(self._storage, policy)
        gone, needed = retention.plan()
        found = removals(self._storage, gone, set(newest_first(self._storage)), needed)
        if yes:
            retention.prune()
        return [asdict(removal) for removal in found]

    def _tell(self, step: int, name: str, error: str | None) -> None:
        assert self._server is not None
        self._server.send_all({"kind": "commit", "step": step, "attempt": name, "error": error})

    def _commit(self, step: int, name: str, attempt: _Attempt) -> str | None:
        """Commit an attempt; returns why it could not be."""
        if self._closed or not self._still_ours():
            return "a newer claim owns the run"
        began = time.monotonic()
        assert attempt.header is not None
        metrics = self._record.last_eval if self._record.evaluated_step == step else {}
        manifest = Manifest(
            step, attempt.header["seed"], attempt.header["config_digest"],
            {"size": attempt.size, "generation": str(attempt.generation)}, attempt.header["values"],
            metrics={k: float(v) for k, v in metrics.items()},
        )  # fmt: skip
        ranks = {m.id: rank for rank, m in enumerate(self._world.members)} if self._world else {}
        indexes = [attempt.indexes[i] for i in sorted(attempt.indexes, key=lambda i: (ranks.get(i, 0), i))]
        self._rows.flush()
        try:
            whole = commit(self._storage, name, manifest, indexes)
        except Exception as error:  # whatever storage raises: the checkpoint before stays the newest, the run goes on
            return f"the checkpoint of step {step} could not be committed: {type(error).__name__}: {error}"
        self._restore = {"rung": "checkpoint", "step": step, "attempt": name}
        facts = attempt.facts.values()
        stall, upload = max(f["stall_s"] for f in facts), max(f["seconds"] for f in facts)
        self._record.saved(step, name, save_cost(stall, upload))
        self._note(
            "checkpoint_committed", generation=str(attempt.generation), step=step,
            seconds=round(upload + time.monotonic() - began, 4),
            detail={
                "attempt": name, "bytes": whole.nbytes, "stall_s": stall,
                **{k: round(sum(f[k] for f in facts), 4) for k in ("cpu_s", "requests", "retries")},
                "written": sum(f["bytes"] for f in facts),
            },
        )  # fmt: skip
        return None

    def _take_outcome(self, member: Member, generation: Generation, message: dict[str, Any]) -> None:
        if message["kind"] == "failed":
            self._close("failed", message["message"], {})
            return
        self._done[member.id] = message
        self._finish_if_done()

    def _saved_alone(self) -> None:
        """The state of a parked run is saved, unless an event said why not: it is given up, or lets its workers go."""
        if self._give_up_outcome is not None:
            self._close(*self._give_up_outcome, {})
        elif not self._closed:
            assert self._server is not None
            self._server.saved_alone(self._restore.get("step", -1))

    def _finish_if_done(self) -> None:
        """The run is over when every member of the world that still lives has said so."""
        world = self._world
        assert self._server is not None
        gone = self._server.gone()
        if world is None or not self._done or any(m.id not in self._done and m.id not in gone for m in world.members):
            return
        first = min(self._done.values(), key=lambda message: message["rank"])
        self._close(first["status"], first.get("message", ""), first["result"])

    def _close(self, status: str, message: str, result: dict[str, Any]) -> None:
        """The one end of a run: result, event, status, compacted ledger."""
        if self._closed:
            return
        now, message = time.time(), redact(message)
        self._state, self._message = status, message
        record, last = self._record, self._record.last_row or {}
        record.world(0, now)
        values = {
            "status": status, "message": message, "steps": self._last_step(),
            "samples_seen": last.get("samples"), "loss": last.get("loss"), "metrics": record.last_eval,
            **result, "stalls": record.stalls, "worker_hours": round(record.worker_seconds(now) / 3600, 6),
            "cost": self._cost(), "seconds": round(now - self._started, 3), **self._options.facts,
        }  # fmt: skip
        if not record.ended:  # else an earlier keeper died after it had said so
            kind = "run_failed" if status == "failed" else "run_finished"
            self._note(kind, step=values["steps"], seconds=values["seconds"], detail=message or status)
        fault.point("run.closing", -1, values["steps"])
        self._folder.write_result(values)
        self._rows.compact()
        self._events.compact()
        if self._tensorboard:
            self._tensorboard.flush()
        self._write_status()
        fault.point("run.closed", -1, values["steps"])
        self._closed = True
        self._end = {"status": status, "message": message}
        self._publish_end(values)

    def _publish_end(self, result: dict[str, Any]) -> None:
        assert self._server is not None
        assert self._end is not None
        self._server.send_all({"kind": "over", "status": self._end["status"]})
        self._server.publish({"kind": "end", **self._end, "result": result}, keep=True)

    def _cost(self) -> float | None:
        price = self._options.price
        return None if price is None else round(price * self._record.worker_seconds(time.time()) / 3600, 6)

    def _last_step(self) -> int:
        row = self._record.last_row
        return row["step"] if row else self._restore.get("step", 0)

    def _status_values(self) -> dict[str, Any]:
        world = self._world
        return {
            "status": self._state, "message": self._message, "heartbeat": time.time(), "epoch": self._options.epoch,
            "step": self._last_step(),
            "total_steps": self._options.total_steps,
            "world": None if world is None else {"generation": str(world.generation), "size": world.size},
            "members": [{"id": m.id, "node": m.node, "pid": m.pid} for m in (world.members if world else ())],
            "server": self._server.url if self._server is not None and self._state in LIVE_STATES else None,
            "checkpoint": self._restore.get("step"), "checkpoint_failed": self._save_failed,
            **self._options.facts,
        }  # fmt: skip

    def _write_status(self) -> None:
        self._folder.write_status(self._status_values())
