"""A worker's link to the membership server.

A watcher thread holds the WebSocket and keeps beating while the training thread computes; it acts when the training
thread cannot: it acknowledges a broken world and frees whoever is blocked in it, shows the stacks, and connects again
when the server was restarted. While the lease is over nothing is applied; a server that is heard again says whether the
run went on without this worker, and if it did not, it goes on. After a reconnection it says where the worker stands,
and once the server knows, all that was not heard. Nothing the training thread calls here waits for the network, except
`join`, `close`, `next_commit` if it is to, and `check_lease` while the lease is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import aiohttp

from elastic.errors import FencedError, WorldBroken
from elastic.membership.failure import Failure
from elastic.membership.outbox import Outbox
from elastic.membership.protocol import (
    BEAT_S,
    MAX_MESSAGE_BYTES,
    REFUSED_CODE,
    VERSION,
    Acknowledge,
    Allowed,
    Assignment,
    Beat,
    BeatHeard,
    Broken,
    Commit,
    Dump,
    Fenced,
    Hello,
    HostMessage,
    Join,
    LedgerEvent,
    MemberMessage,
    Out,
    Over,
    Recorded,
    Resume,
    SaveAlone,
    Stacks,
    Unfit,
    Whereabouts,
    Wished,
    dumps,
    from_host,
)
from elastic.membership.stage import ENTERED, Position, Stage
from elastic.membership.wire import Refused
from elastic.membership.world import Generation, Member

RECONNECT_S = 0.2
ROWS_S = 0.1  # rows are reported that often
CLOSE_S = 1.0
KEPT = 3.0  # leases for which a worker keeps its state, and applies nothing, once its own is over
LEASE_POLL_S = 0.02
_CLOSING = aiohttp.ClientWSTimeout(ws_close=CLOSE_S)


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
        self.member = member
        self._url, self._token, self._lease_s = url, token, lease_s
        self._outbox = Outbox()
        self._inbox: queue.SimpleQueue[HostMessage] = queue.SimpleQueue()
        self._commits: queue.SimpleQueue[Commit] = queue.SimpleQueue()
        self._assignment: Assignment | None = None
        self._reporting = False
        self._joining: Join | None = None
        self._said_joining: Join | None = None
        self._known = True  # the server knows where this worker stands
        self._broken: set[Generation] = set()
        self._free: Callable[[], None] | None = None
        self._wishes: dict[str, str] = {}
        self._allowed = 0
        self._fenced: str | None = None
        self._over: str | None = None
        self._refusal = ""  # of the newest message from the host that was none
        self._leased = time.monotonic()  # when the newest beat that was answered was sent: the lease counts from there
        self._position = ENTERED
        self._next_beat = 0.0
        self._place: Callable[[], tuple[str, list[int]]] = lambda: ("", [])
        self._loop = asyncio.new_event_loop()
        self._posted = asyncio.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="membership-link", daemon=True)
        self._thread.start()

    # ---- the training thread -----------------------------------------------------------------------------------

    def join(
        self,
        warm_s: float,
        warm_parts: dict[str, Any],
        applied: int,
        failure: Failure | None,
        save_alone: Callable[[], None],
        *,
        why: str = "",
        broke: str = "",
    ) -> Assignment:
        """Ask for a world and wait for it.

        Args:
            warm_s: seconds that it took to get ready, and what they went into.
            applied: updates in the state this worker holds, -1 for none.
            failure: its own error that made it leave its world.
            why: it left its world to have another made, and nobody failed.
            broke: what of its world failed, if that made it leave.
            save_alone: commits the state; called if this worker holds the newest while the run is given up, or lets
                its workers go.

        Raises:
            FencedError: the run went on without this worker, or may have since its lease is over, or a newer claim
                owns it.
            RunOver: the run ended.
        """
        left, self._free = self._assignment, None
        self._wishes.pop("leave", None)
        newer = self._newer_world(left)
        if newer is not None and failure is None:
            return self._enter(newer)
        self._assignment = None
        self._joining = Join(self.member, applied, failure, why, broke, warm_s, warm_parts)
        self._wake()
        while True:
            self._check_over()
            try:
                answer = self._inbox.get(timeout=0.5)
            except queue.Empty:
                continue
            if isinstance(answer, SaveAlone):
                save_alone()
            elif isinstance(answer, Assignment):
                return self._enter(answer)

    def _newer_world(self, left: Assignment | None) -> Assignment | None:
        """A world that was formed while this worker still tried to connect to one of which nothing came."""
        found = None
        while not self._inbox.empty():
            answer = self._inbox.get()
            if left is None or not isinstance(answer, Assignment) or answer.generation in self._broken:
                continue
            if answer.generation > left.generation:
                found = answer
        return found

    def _enter(self, assignment: Assignment) -> Assignment:
        self._joining = None
        self._position = ENTERED
        self._assignment = assignment
        self._next_beat = 0.0  # at once: of who says nothing in a world nobody knows whether it ever came there
        self._wake()
        return assignment

    def free_with(self, free: Callable[[], None] | None) -> None:
        """What the watcher calls to free a training thread that is blocked in a broken world."""
        self._free = free
        if free is not None and self._assignment and self._assignment.generation in self._broken:
            free()

    def post(self, message: MemberMessage, generation: Generation | None = None) -> None:
        """Send a message under the present generation (or the given one), without waiting."""
        self._outbox.put(message, self._under(generation))
        self._wake()

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
        self._outbox.record(row, self._under(generation), report=report)
        self._reporting = report  # the watcher looks by itself: waking it costs the training thread a millisecond

    def report_rows(self, generation: Generation | None = None) -> None:
        """This member reports the rows that are not in the ledger yet, under the present generation or the given."""
        self._outbox.report(self._under(generation))
        self._reporting = True
        self._wake()

    def _under(self, generation: Generation | None) -> Generation:
        if generation is not None:
            return generation
        assert self._assignment is not None, "a worker outside a world has nothing to say"
        return self._assignment.generation

    def undone(self, step: int) -> None:
        """The steps after this one are done again: their rows, if not in the ledger yet, are nobody's."""
        self._outbox.undone(step)

    def unfit(self, message: str) -> None:
        """Tell the server why this worker cannot get ready."""
        self._outbox.put(Unfit(message))
        self._wake()

    def progress(self, position: Position) -> None:
        """How far this worker is; the next heartbeat says so. Costs an assignment."""
        self._position = position

    def tell_place(self, place: Callable[[], tuple[str, list[int]]]) -> None:
        """What heartbeats ask for where this worker is, for people, and for the samples that it waits for."""
        self._place = place

    def wish(self, name: str) -> str | None:
        """Whether `stop`, `save` or `leave` was asked for (and why), to be agreed on at the next step boundary."""
        return self._wishes.get(name)

    @property
    def allowed(self) -> int:
        """Up to which step a run that holds after evaluations may go."""
        return self._allowed

    def granted(self, name: str) -> None:
        """A wish was carried out."""
        self._wishes.pop(name, None)

    def check(self) -> None:
        """Raise where training must not go on.

        Raises:
            FencedError: as `check_lease`, or a newer claim owns the run, or the run went on without this worker.
            RunOver: the run ended.
            WorldBroken: the server said that this world is broken.
        """
        self.check_lease()
        self._check_over()
        if self._assignment is not None and self._assignment.generation in self._broken:
            raise WorldBroken(f"world {self._assignment.generation} was declared broken")

    def check_lease(self) -> None:
        """Raise where nothing may be applied any more; while it is not known, wait.

        Raises:
            FencedError: the server was silent for too long, or said that this worker is out.
        """
        while self._fenced is None and self._over is None and self._lease_left() <= 0:
            time.sleep(LEASE_POLL_S)  # the watcher ends it
        if self._fenced is not None:
            raise FencedError(self._fenced)

    def _lease_left(self) -> float:
        return self._leased + self._lease_s - time.monotonic()

    def _fence_by_lease(self) -> None:
        self._fenced = (
            f"the membership server at {self._url} was silent for {time.monotonic() - self._leased:.0f} s, much longer "
            f"than --recovery.lease {self._lease_s:g}s: others may have gone on with the run{self._refusal}"
        )

    def _check_over(self) -> None:
        if self._fenced is not None:
            raise FencedError(self._fenced)
        if self._over is not None:
            raise RunOver(self._over)

    def next_commit(self, timeout_s: float = 0.0) -> Commit | None:
        """What was last said of a checkpoint that this world saves, or None so far."""
        try:
            return self._commits.get(timeout=timeout_s) if timeout_s > 0 else self._commits.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """End the connection and its thread when all that was to be said has been heard, or nobody is there to hear."""
        self._closing = True
        self._wake()
        self._thread.join((1 + KEPT) * self._lease_s + 10)

    # ---- the watcher thread ------------------------------------------------------------------------------------

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._posted.set)
        except RuntimeError:  # the loop is closed: this worker's part is over
            return

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._hold_while_leased())
        finally:
            self._loop.close()

    async def _hold_while_leased(self) -> None:
        """Be connected until the lease is long over; then free a training thread that waits for others in vain.

        How long is counted in turns of this loop: a process that was stopped has yet to hear what it missed.
        """
        holding = asyncio.create_task(self._hold())
        alone_s = 0.0
        while not holding.done() and alone_s < KEPT * self._lease_s:
            left = self._lease_left()
            turn_s = left if left > 0 else min(BEAT_S, 0.1 * self._lease_s)
            alone_s = 0.0 if left > 0 else alone_s + turn_s
            await asyncio.wait({holding}, timeout=turn_s)
        if holding.done():
            return holding.result()
        if self._fenced is None:
            self._fence_by_lease()
        self._free_now()
        holding.cancel()
        await asyncio.wait({holding}, timeout=2 * CLOSE_S)

    async def _hold(self) -> None:
        """Be connected; connect again after the server was away."""
        headers = {"Authorization": f"Bearer {self._token}"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            while not self._is_over():
                try:
                    url = f"{self._url}/worker?id={self.member.id}&protocol={VERSION}"
                    async with session.ws_connect(url, max_msg_size=MAX_MESSAGE_BYTES, timeout=_CLOSING) as socket:
                        await self._converse(socket)
                except (TimeoutError, aiohttp.ClientError, OSError):
                    pass  # the server is away: the lease tells for how long that may be
                self._said_joining = None
                self._known = self._assignment is None
                if not self._is_over():
                    await asyncio.sleep(RECONNECT_S)

    def _is_over(self) -> bool:
        if self._fenced or self._over:
            return True
        return self._closing and not self._outbox.waiting

    async def _converse(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Send and receive, until the connection or the worker's part ends."""
        reader = asyncio.create_task(self._read(socket))
        assignment = self._assignment
        if not self._known and assignment is not None and self._joining is None:
            hello = Hello(self.member, assignment.rank, assignment.size, self._whereabouts(assignment))
            await socket.send_str(dumps(hello))
        self._next_beat = time.monotonic()  # at once: a connection is this worker's from its first message on
        try:
            while not reader.done():
                self._posted.clear()
                while self._known and (said := self._outbox.take()) is not None:
                    await socket.send_str(dumps(*said))
                joining = self._joining
                if joining is not None and joining is not self._said_joining:
                    await socket.send_str(dumps(joining))
                    self._said_joining, self._known = joining, True
                if self._is_over():
                    return
                now = time.monotonic()
                if now >= self._next_beat:
                    self._next_beat = now + BEAT_S
                    await socket.send_str(dumps(self._beat()))
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(
                        self._posted.wait(), min(self._next_beat - now, ROWS_S if self._reporting else BEAT_S)
                    )
        finally:
            reader.cancel()

    def _beat(self) -> Beat:
        assignment = self._assignment
        return Beat(time.monotonic(), None if assignment is None else self._whereabouts(assignment))

    def _whereabouts(self, assignment: Assignment) -> Whereabouts:
        """How far this worker is in its world."""
        where, samples = self._place()
        position = self._position
        waits_for = samples if position.stage is Stage.DATA else []
        return Whereabouts(assignment.generation, position, where, waits_for)

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for raw in socket:
            if raw.type == aiohttp.WSMsgType.TEXT:
                try:
                    message = from_host(raw.data)
                except Refused as refused:  # it is connected again; the lease says for how long that goes on
                    self._refusal = f"; it said what is no message of its: {refused}"
                    break
                await self._on_message(socket, message)
        if socket.close_code == REFUSED_CODE and self._over is None:
            self._fence("the host of the run refused what this worker said; use one version of elastic for both")
        self._posted.set()

    async def _on_message(self, socket: aiohttp.ClientWebSocketResponse, message: HostMessage) -> None:
        match message:
            case BeatHeard():  # nothing else renews the lease: on a line that was cut, old messages come late
                self._leased = message.sent
                return
            case Assignment():
                self._known = True
                self._allowed = max(self._allowed, message.allowed)
                self._outbox.left_world()
                self._inbox.put(message)
            case SaveAlone():
                self._known = True
                self._inbox.put(message)
            case Resume():
                self._known = True
                self._outbox.say_again(message.generation)
            case Broken():
                self._broken.add(message.generation)
                await socket.send_str(dumps(Acknowledge(message.generation)))
                if self._assignment is not None and self._assignment.generation == message.generation:
                    self._free_now()
            case Wished():
                self._wishes[message.wish] = message.detail
            case Allowed():
                self._allowed = max(self._allowed, message.step)
            case Recorded():
                self._outbox.recorded(message.rows)
            case Commit():
                self._outbox.decided(message.step, message.attempt)
                self._commits.put(message)
            case Fenced() | Out():
                if self._over is None:
                    self._fence(message.reason)
            case Over():
                self._over = message.status
                self._outbox.over()
                self._inbox.put(message)
            case Dump():
                await socket.send_str(dumps(Stacks(stacks())))
        self._posted.set()

    def _fence(self, reason: str) -> None:
        self._fenced = self._fenced or reason  # later ones only say that it is out
        self._outbox.over()
        self._inbox.put(Fenced(reason))
        self._free_now()

    def _free_now(self) -> None:
        free = self._free
        if free is not None:
            free()


def stacks() -> str:
    """The stacks of all threads of this process, for people."""
    names = {t.ident: t.name for t in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    ]
    return "\n".join(parts)
