"""A worker's link to the membership server, as its training thread uses it.

While the lease is over nothing is applied; a server that is heard again says whether the run went on without this
worker, and if it did not, it goes on. Nothing the training thread calls here waits for the network, except
`next_world`, `close`, `next_commit` if it is to, and `check_lease` while the lease is over. All talking is done by the
`watcher`.
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
    """The run ended, or this worker's part in it: nothing more to do. `status` says how."""

    def __init__(self, status: str):
        super().__init__(status)
        self.status = status


class WorkerLink:
    """One worker's connection, from before its first world to its end.

    Args:
        url, token: of the membership server.
        lease_s: longest silence of the server; then nothing is applied, since the run may go on without this worker.
    """

    def __init__(self, url: str, token: str, member: Member, *, lease_s: float):
        self._watcher = Watcher(url, token, member, lease_s=lease_s)
        self._newer: Assignment | None = None  # a world that came before it was asked for

    @property
    def member(self) -> Member:
        """Who this worker is and what it has said of itself: to a server that is started again, too."""
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
        """Ask for a world, and leave the one that this worker is in. It says nothing in that any more.

        Args:
            warm_s: seconds that it took to get ready, and what they went into.
            applied: updates in the state this worker holds, -1 for none.
            failure: its own error that made it leave its world.
            why: it left its world to have another made, and nobody failed.
            broke: what of its world failed, if that made it leave.
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
        """Wait for the world that was asked for.

        Args:
            save_alone: commits the state; called if this worker holds the newest while the run is given up, or lets
                its workers go.

        Raises:
            FencedError: the run went on without this worker, or may have since its lease is over, or a newer claim
                owns it.
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
        """A world that was formed while this worker still tried to connect to one of which nothing came."""
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
        self._watcher.next_beat = 0.0  # at once: of who says nothing in a world nobody knows whether it ever came there
        self._watcher.wake()
        return assignment

    def free_with(self, free: Callable[[], None] | None, report: Callable[[], str] = str) -> None:
        """What the watcher calls to free a training thread that is blocked in a broken world, and what it asks for
        what the world's connections know of a hang."""
        self._watcher.free, self._watcher.report = free, report
        assignment = self._watcher.assignment
        if free is not None and assignment is not None and assignment.generation in self._watcher.broken:
            free()

    def post(self, message: MemberMessage, generation: Generation | None = None) -> None:
        """Send a message under the present generation (or the given one), without waiting."""
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
        """Have an event recorded in the ledger, under the present generation or the given one."""
        self.post(LedgerEvent(kind, step, seconds, detail), generation)

    def record(self, row: dict[str, Any], *, report: bool, generation: Generation | None = None) -> None:
        """Keep a row until the ledger has it; `report` it, under the present generation or the given, if that is this
        member's task."""
        self._watcher.outbox.record(row, self._under(generation), report=report)
        self._watcher.reporting = report  # it looks by itself: waking it costs the training thread a millisecond

    def report_rows(self, generation: Generation | None = None) -> None:
        """This member reports the rows that are not in the ledger yet, under the present generation or the given."""
        self._watcher.outbox.report(self._under(generation))
        self._watcher.reporting = True
        self._watcher.wake()

    def _under(self, generation: Generation | None) -> Generation:
        if generation is not None:
            return generation
        if self._watcher.assignment is None:
            raise RuntimeError("a worker outside of a world has nothing to say")
        return self._watcher.assignment.generation

    def undone(self, step: int) -> None:
        """The steps after this one are done again: their rows, if not in the ledger yet, are nobody's."""
        self._watcher.outbox.undone(step)

    def unfit(self, message: str) -> None:
        """Tell the server why this worker cannot get ready."""
        self._watcher.outbox.put(Unfit(message))
        self._watcher.wake()

    def progress(self, position: Position) -> None:
        """How far this worker is; the next heartbeat says so. Costs an assignment."""
        self._watcher.position = position

    def show_place(self, place: Callable[[], tuple[str, list[int]]]) -> None:
        """What heartbeats ask for where this worker is, for people, and for the samples that it waits for."""
        self._watcher.place = place

    def wish(self, name: str) -> str | None:
        """Whether `stop`, `save` or `leave` was asked for (and why), to be agreed on at the next step boundary."""
        return self._watcher.wishes.get(name)

    @property
    def allowed(self) -> int:
        """Up to which step a run that holds after evaluations may go."""
        return self._watcher.allowed

    def granted(self, name: str) -> None:
        """A wish was carried out."""
        self._watcher.wishes.pop(name, None)

    def check(self) -> None:
        """Raise where training must not go on.

        Raises:
            FencedError: as `check_lease`, or a newer claim owns the run, or the run went on without this worker.
            RunOver: the run ended.
            WorldBroken: the server said that this world is broken.
        """
        self.check_lease()
        self._check_over()
        assignment = self._watcher.assignment
        if assignment is not None and assignment.generation in self._watcher.broken:
            raise WorldBroken(f"world {assignment.generation} was declared broken")

    def check_lease(self) -> None:
        """Raise where nothing may be applied any more; while it is not known, wait.

        Raises:
            FencedError: the server was silent for too long, or said that this worker is out.
        """
        while self._watcher.fenced is None and self._watcher.over is None and self._watcher.lease_left() <= 0:
            time.sleep(LEASE_POLL_S)  # the watcher ends it
        if self._watcher.fenced is not None:
            raise FencedError(self._watcher.fenced)

    def _check_over(self) -> None:
        if self._watcher.fenced is not None:
            raise FencedError(self._watcher.fenced)
        if self._watcher.over is not None:
            raise RunOver(self._watcher.over)

    def next_commit(self, timeout_s: float = 0.0) -> Commit | None:
        """What was last said of a checkpoint that this world saves, or None so far."""
        try:
            return self._watcher.commits.get(timeout=timeout_s) if timeout_s > 0 else self._watcher.commits.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """End the connection when all that was to be said has been heard, or nobody is there to hear."""
        self._watcher.close()
