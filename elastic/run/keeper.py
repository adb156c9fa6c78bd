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
from dataclasses import dataclass, field
from typing import Any

from elastic.checkpoint.cadence import auto_interval, save_cost
from elastic.checkpoint.format import Manifest
from elastic.checkpoint.reader import newest_first
from elastic.checkpoint.retention import Policy, Retention
from elastic.checkpoint.writer import commit
from elastic.membership.server import MembershipServer
from elastic.membership.state import Generation, Member, World
from elastic.observe.ledger import EVENTS, METRICS, LedgerFile, read_records
from elastic.observe.tensorboard import TensorBoard
from elastic.run.folder import RunFolder

HEARTBEAT_S = 5.0
FLUSH_LOCAL_S = 1.0
FLUSH_OBJECT_S = 10.0


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
    indexes: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: list[dict[str, float]] = field(default_factory=list)
    header: dict[str, Any] | None = None
    over: bool = False


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
        self._world_size_seconds = 0.0
        self._world_since = 0.0
        self._done: dict[str, dict[str, Any]] = {}
        self._attempts: dict[tuple[int, str], _Attempt] = {}
        self._state, self._message = "running", ""
        self._last_row: dict[str, Any] | None = None
        self._last_eval: dict[str, Any] = {}
        self._evaluated_step = -1
        self._retention = Retention(self._storage, options.retention)
        self._costs: list[float] = []
        self._faults = 0
        self._save_at = time.monotonic() + self._save_interval()
        self._stalls: list[dict[str, Any]] = []
        self._broken_at: float | None = None
        self._closed = False
        self._give_up_message = ""
        newest = next(newest_first(self._storage), None)
        self._claim_step = newest.step if newest else 0
        self._restore: dict[str, Any] = (
            {"rung": "checkpoint", "step": newest.step, "attempt": newest.attempt} if newest else {"rung": "fresh"}
        )

    def attach(self, server: MembershipServer) -> None:
        self._server = server

    def start(self, detail: dict[str, Any]) -> None:
        """Write the first status and event, and start working."""
        self._thread.start()
        self._do(self._write_status)
        self.event("run_started", detail=detail)

    def stop(self) -> None:
        """Write out everything and end the thread."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join(60)

    # ---- called on the server's thread -------------------------------------------------------------------------

    def event(self, kind: str, **fields: Any) -> None:
        """Record an event. From any thread."""
        record = {"time": time.time(), "kind": kind, **{k: v for k, v in fields.items() if v is not None}}
        self._do(lambda: self._record_event(record))

    def world_formed(self, world: World) -> None:
        self._count_world(world)
        self._attempts.clear()
        self._save_at = time.monotonic() + self._save_interval()
        self.event(
            "world_formed", generation=str(world.generation),
            detail={"size": world.size, "pids": [m.pid for m in world.members], "ids": [m.id for m in world.members]},
        )  # fmt: skip

    def world_broken(self, world: World, lost: Member | None, reason: str) -> None:
        self._count_world(None)
        self._faults += lost is not None
        if self._broken_at is None:
            self._broken_at = time.time()
        self.event(
            "member_lost", generation=str(world.generation), step=self.last_step() or None, detail=reason,
            **({"member": lost.id, "node": lost.node, "pid": lost.pid} if lost else {}),
        )  # fmt: skip
        self._do(self._finish_if_done)

    def last_step(self) -> int:
        return self._last_row["step"] if self._last_row else 0

    def worlds_so_far(self) -> int:
        """The highest number of a world of this claim in the ledger."""
        generations = [
            Generation.parse(e["generation"])
            for e in read_records(self._storage, EVENTS)
            if e["kind"] == "world_formed"
        ]
        return max((g.n for g in generations if g.epoch == self._options.epoch), default=0)

    def claim_step(self) -> int:
        return self._claim_step

    def save_stacks(self, member: Member, text: str) -> None:
        name = f"stacks/{int(time.time())}-{member.id}.txt"
        self._do(lambda: self._storage.replace(name, text.encode()))

    def giving_up(self, message: str) -> None:
        """The run ends with this message as soon as the state is committed."""
        self._give_up_message = message

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
            world = self._world
            assert world is not None
            self._do(lambda: self._take_pack(member, world, message))
        elif kind == "saved alone":
            self._do(lambda: self._close("failed", self._give_up_message, {}))
        elif kind in ("done", "failed"):
            self._do(lambda: self._take_outcome(member, generation, message))

    def restore_point(self) -> dict[str, Any]:
        return self._restore

    def close_run(self, status: str, message: str) -> None:
        self._do(lambda: self._close(status, message, {}))

    def status(self) -> dict[str, Any]:
        return self._status_values()

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
        self._closed = True
        assert self._server is not None
        self._server.send_all({"kind": "fenced", "reason": reason})
        self._server.publish({"kind": "end", "status": "fenced", "message": reason}, keep=True)

    def _record_event(self, record: dict[str, Any]) -> None:
        if self._closed:
            return
        self._events.add(record)
        assert self._server is not None
        self._server.publish(record, keep=True)
        if record["kind"] not in ("worker_warm", "restored"):
            self._events.flush()

    def _take_rows(self, rows: list[dict[str, Any]]) -> None:
        if self._closed:
            return
        assert self._server is not None
        for row in rows:
            self._rows.add(row)
            if "sample_hash" in row:
                if self._broken_at is not None and self._last_row is not None:
                    stall = max(0.0, row["time"] - self._last_row["time"] - self._last_row["step_s"])
                    self._stalls.append({"step": row["step"], "seconds": round(stall, 4)})
                    self._broken_at = None
                self._last_row = row
            else:
                self._last_eval = {k: v for k, v in row.items() if k.startswith("eval/")}
                self._evaluated_step = row["step"]
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
        return every or auto_interval(self._costs, time.time() - self._started, self._faults)

    def _wish_for_save(self) -> None:
        """Once; the next is due an interval after this one was decided on, or after the world changed meanwhile."""
        self._save_at = float("inf")
        if self._world is not None and not self._closed:
            assert self._server is not None
            self._server.send_all({"kind": "wish", "wish": "save", "detail": "it is time"})

    def _take_pack(self, member: Member, world: World, message: dict[str, Any]) -> None:
        step, name = message["step"], message["attempt"]
        attempt = self._attempts.setdefault((step, name), _Attempt(message["shares"]))
        if attempt.over:
            return
        if message["error"]:
            self._decided(world, step, name, attempt, message["error"])
            return
        attempt.indexes[member.id] = message["index"]
        attempt.facts.append(message["facts"])
        attempt.header = message["header"] or attempt.header
        if len(attempt.indexes) == attempt.size and attempt.header is not None:
            self._decided(world, step, name, attempt, self._commit(world, step, name, attempt))

    def _decided(self, world: World, step: int, name: str, attempt: _Attempt, error: str | None) -> None:
        """Tell the ledger and the workers what became of an attempt; then there is time to tidy up."""
        attempt.over = True
        attempt.indexes.clear()
        self._save_at = time.monotonic() + self._save_interval()
        if error:
            self.event("checkpoint_failed", generation=str(world.generation), step=step, detail=error)
        assert self._server is not None
        self._server.send_all({"kind": "commit", "step": step, "attempt": name, "error": error})
        if error or self._closed:
            return
        try:
            self._retention.prune()
        except Exception as problem:  # whatever storage raises: the run does not depend on it, and the next tries again
            self.event("checkpoint_failed", step=step, detail=f"old checkpoints could not be removed: {problem}")

    def _commit(self, world: World, step: int, name: str, attempt: _Attempt) -> str | None:
        """Commit an attempt; returns why it could not be."""
        if self._closed or not self._still_ours():
            return "a newer claim owns the run"
        began = time.monotonic()
        assert attempt.header is not None
        metrics = self._last_eval if self._evaluated_step == step else {}
        manifest = Manifest(
            step, attempt.header["seed"], attempt.header["config_digest"],
            {"size": world.size, "generation": str(world.generation)}, attempt.header["values"],
            metrics={k: float(v) for k, v in metrics.items()},
        )  # fmt: skip
        indexes = [attempt.indexes[m.id] for m in world.members if m.id in attempt.indexes]
        self._rows.flush()
        try:
            whole = commit(self._storage, name, manifest, indexes)
        except Exception as error:  # whatever storage raises: the checkpoint before stays the newest, the run goes on
            return f"the checkpoint of step {step} could not be committed: {type(error).__name__}: {error}"
        self._restore = {"rung": "checkpoint", "step": step, "attempt": name}
        facts = attempt.facts
        stall, upload = max(f["stall_s"] for f in facts), max(f["seconds"] for f in facts)
        self._costs.append(save_cost(stall, upload))
        self.event(
            "checkpoint_committed", generation=str(world.generation), step=step,
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
        self._count_world(None)
        self._state, self._message = status, message
        last = self._last_row or {}
        values = {
            "status": status, "message": message, "steps": last.get("step", self._restore.get("step", 0)),
            "samples_seen": last.get("samples"), "loss": last.get("loss"), "metrics": self._last_eval,
            **result, "stalls": self._stalls, "worker_hours": round(self._world_size_seconds / 3600, 6),
            "cost": self._cost(), "seconds": round(time.time() - self._started, 3), **self._options.facts,
        }  # fmt: skip
        kind = "run_failed" if status == "failed" else "run_finished"
        record = {"time": time.time(), "kind": kind, "step": values["steps"], "seconds": values["seconds"],
                  "detail": message or status}  # fmt: skip
        self._record_event(record)
        self._folder.write_result(values)
        self._rows.compact()
        self._events.compact()
        if self._tensorboard:
            self._tensorboard.flush()
        self._write_status()
        self._closed = True
        assert self._server is not None
        self._server.send_all({"kind": "over", "status": status})
        self._server.publish({"kind": "end", "status": status, "message": message, "result": values}, keep=True)

    def _count_world(self, world: World | None) -> None:
        if self._world is not None and self._world_since:
            self._world_size_seconds += self._world.size * (time.time() - self._world_since)
        self._world_since = time.time() if world is not None else 0.0
        if world is not None:
            self._world = world

    def _cost(self) -> float | None:
        price = self._options.price
        return None if price is None else round(price * self._world_size_seconds / 3600, 6)

    def _status_values(self) -> dict[str, Any]:
        world = self._world
        return {
            "status": self._state, "message": self._message, "heartbeat": time.time(), "epoch": self._options.epoch,
            "step": self._last_row["step"] if self._last_row else self._restore.get("step", 0),
            "total_steps": self._options.total_steps,
            "world": None if world is None else {"generation": str(world.generation), "size": world.size},
            **self._options.facts,
        }  # fmt: skip

    def _write_status(self) -> None:
        self._folder.write_status(self._status_values())
