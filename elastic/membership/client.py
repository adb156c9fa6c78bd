"""A worker's link to the membership server, as its training thread uses it.

While the lease is over nothing is applied. When the server answers again, it says whether the run went on without this
worker; if it did not, this worker goes on. No method that the training thread calls waits for the network, except
`next_world`, `close`, `next_commit` with a time-out, and `check_lease` while the lease is over. The `watcher` thread
does all the sending and receiving.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Any

from elastic.errors import FencedError, WorldBroken
from elastic.membership.failure import Failure
from elastic.membership.protocol import Assignment, Commit, Join, LedgerEvent, MemberMessage, SaveAlone, Unfit
from elastic.membership.stage import ENTERED, Position
from elastic.membership.watcher import Watcher
from elastic.membership.world import Generation, Member

LEASE_POLL_S = 0.02


class RunOver(Exception):
    """The run ended, or this worker's task in it did: nothing is left to do. `status` says how it ended."""

    def __init__(self, status: str):
        super().__init__(status)
        self.status = status


class WorkerLink:
    """One worker's connection, from before its first world to its end.

    Args:
        url, token: of the membership server.
        lease_s: longest silence of the server, in seconds. After it nothing is applied, since the run may go on without
            this worker.
    """

    def __init__(self, url: str, token: str, member: Member, *, lease_s: float):
        self._watcher = Watcher(url, token, member, lease_s=lease_s)
        self._newer: Assignment | None = None  # a world that came before it was asked for

    @property
    def member(self) -> Member:
        """This worker's identity and description, as the server knows them; a restarted server gets them again."""
        return self._watcher.member

    @member.setter
    def member(self, member: Member) -> None:
        self._watcher.member = member

    def ask(
        self,
        warm_s: float,
        warm_parts: dict[str, Any],
        applied: int,
        failure: Failure | None,
        *,
        why: str = "",
        broke: str = "",
    ) -> None:
        """Ask for a world, and leave the present one: this worker sends no more messages under its generation.

        Args:
            warm_s: seconds that getting ready took.
            warm_parts: how those seconds divide, by name.
            applied: number of updates in the state that this worker holds, -1 if it holds none.
            failure: this worker's own error, if that made it leave its world.
            why: reason to have another world made, if no worker failed.
            broke: what failed in the world, if that made this worker leave it.
        """
        left = self._watcher.assignment
        self.free_with(None)
        self._watcher.wishes.pop("leave", None)
        newer = self._newer_world(left)
        self._newer = newer if failure is None else None
        if self._newer is None:
            self._watcher.assignment = None
            self._watcher.joining = Join(self.member, applied, failure, why, broke, warm_s, warm_parts)
            self._watcher.wake()

    def next_world(self, save_alone: Callable[[], None]) -> Assignment:
        """Wait for the world that `ask` asked for.

        Args:
            save_alone: commits the state; called if this worker holds the newest state while the run is given up or
                lets its workers go.

        Raises:
            FencedError: the run went on without this worker, or may have done so since this worker's lease is over, or
                a newer claim owns the run.
            RunOver: the run ended.
        """
        if self._newer is not None:
            newer, self._newer = self._newer, None
            return self._enter(newer)
        while True:
            self._check_over()
            try:
                answer = self._watcher.inbox.get(timeout=0.5)
            except queue.Empty:
                continue
            if isinstance(answer, SaveAlone):
                save_alone()
            elif isinstance(answer, Assignment):
                return self._enter(answer)

    def _newer_world(self, left: Assignment | None) -> Assignment | None:
        """A world that was formed while this worker still tried to connect to an older one, which never came about."""
        found = None
        while not self._watcher.inbox.empty():
            answer = self._watcher.inbox.get()
            if left is None or not isinstance(answer, Assignment) or answer.generation in self._watcher.broken:
                continue
            if answer.generation > left.generation:
                found = answer
        return found

    def _enter(self, assignment: Assignment) -> Assignment:
        self._watcher.joining = None
        self._watcher.position = ENTERED
        self._watcher.assignment = assignment
        self._watcher.next_beat = 0.0  # at once: without a heartbeat the server cannot know that it got this world
        self._watcher.wake()
        return assignment

    def free_with(self, free: Callable[[], None] | None, report: Callable[[], str] = str) -> None:
        """Set what the watcher calls when the world breaks (`free` unblocks the training thread) and when the server
        asks for the state of the world's connections during a hang (`report`)."""
        self._watcher.free, self._watcher.report = free, report
        assignment = self._watcher.assignment
        if free is not None and assignment is not None and assignment.generation in self._watcher.broken:
            free()

    def post(self, message: MemberMessage, generation: Generation | None = None) -> None:
        """Send a message under the present generation, or the given one. Returns at once."""
        self._watcher.outbox.put(message, self._under(generation))
        self._watcher.wake()

    def event(
        self,
        kind: str,
        step: int,
        detail: Any,
        *,
        seconds: float | None = None,
        generation: Generation | None = None,
    ) -> None:
        """Record an event in the ledger, under the present generation or the given one. `seconds`: its duration."""
        self.post(LedgerEvent(kind, step, seconds, detail), generation)

    def record(self, row: dict[str, Any], *, report: bool, generation: Generation | None = None) -> None:
        """Keep a step's row until the ledger has it. If `report`, this member is the one that sends rows to the ledger,
        under the present generation or the given one."""
        self._watcher.outbox.record(row, self._under(generation), report=report)
        self._watcher.reporting = report  # the watcher polls this: waking it costs the training thread a millisecond

    def report_rows(self, generation: Generation | None = None) -> None:
        """Send all rows that the ledger does not have yet, under the present generation or the given one."""
        self._watcher.outbox.report(self._under(generation))
        self._watcher.reporting = True
        self._watcher.wake()

    def _under(self, generation: Generation | None) -> Generation:
        if generation is not None:
            return generation
        if self._watcher.assignment is None:
            raise RuntimeError("this worker is in no world, so it has no generation to send a message under")
        return self._watcher.assignment.generation

    def undone(self, step: int) -> None:
        """The steps after `step` will be done again: drop their rows that the ledger does not have yet."""
        self._watcher.outbox.undone(step)

    def unfit(self, message: str) -> None:
        """Tell the server why this worker cannot get ready."""
        self._watcher.outbox.put(Unfit(message))
        self._watcher.wake()

    def progress(self, position: Position) -> None:
        """Set this worker's position for the next heartbeat. Costs one assignment, no message."""
        self._watcher.position = position

    def show_device_memory(self, share: float | None) -> None:
        """Set the share of the device's memory for the next heartbeat. Costs one assignment, no message."""
        self._watcher.device_memory = share

    def show_place(self, place: Callable[[], tuple[str, list[int]]]) -> None:
        """Set what heartbeats call for a description of where this worker is and the sample ids that it waits for."""
        self._watcher.place = place

    def wish(self, name: str) -> str | None:
        """The reason if `stop`, `save` or `leave` was asked for, else None. Members agree on it at a step boundary."""
        return self._watcher.wishes.get(name)

    @property
    def allowed(self) -> int:
        """The step up to which a run that pauses after evaluations may go."""
        return self._watcher.allowed

    def granted(self, name: str) -> None:
        """Forget the wish `name`: it was carried out."""
        self._watcher.wishes.pop(name, None)

    def check(self) -> None:
        """Raise if training must not go on.

        Raises:
            FencedError: as in `check_lease`, or a newer claim owns the run, or the run went on without this worker.
            RunOver: the run ended.
            WorldBroken: the server said that this world is broken.
        """
        self.check_lease()
        self._check_over()
        assignment = self._watcher.assignment
        if assignment is not None and assignment.generation in self._watcher.broken:
            raise WorldBroken(f"world {assignment.generation} was declared broken")

    def check_lease(self) -> None:
        """Raise if nothing may be applied any more; wait while the lease is over and the server has not answered.

        Raises:
            FencedError: the server was silent for too long, or said that the run goes on without this worker.
        """
        while self._watcher.fenced is None and self._watcher.over is None and self._watcher.lease_left() <= 0:
            time.sleep(LEASE_POLL_S)  # the watcher ends this: it hears from the server, or fences this worker
        if self._watcher.fenced is not None:
            raise FencedError(self._watcher.fenced)

    def _check_over(self) -> None:
        if self._watcher.fenced is not None:
            raise FencedError(self._watcher.fenced)
        if self._watcher.over is not None:
            raise RunOver(self._watcher.over)

    def next_commit(self, timeout_s: float = 0.0) -> Commit | None:
        """The newest message about a checkpoint that this world saves, or None if none came within `timeout_s`."""
        try:
            return self._watcher.commits.get(timeout=timeout_s) if timeout_s > 0 else self._watcher.commits.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """Close the connection once the server has acknowledged every message, or cannot be reached."""
        self._watcher.close()
