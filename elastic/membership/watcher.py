"""The watcher of a worker: the thread that holds its connection to the membership server.

It keeps beating while the training thread computes, and acts when that cannot: it acknowledges a broken world and frees
whoever is blocked in it, shows the stacks, and connects again when the server was restarted. After a reconnection it
says where the worker stands, and once the server knows, all that was not heard.
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

import aiohttp

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
    Out,
    Over,
    Recorded,
    Report,
    Resume,
    SaveAlone,
    Stacks,
    Whereabouts,
    Wished,
    dumps,
    from_host,
)
from elastic.membership.stage import ENTERED, Stage
from elastic.membership.wire import Refused
from elastic.membership.world import Generation, Member

RECONNECT_S = 0.2
ROWS_S = 0.1  # rows are reported that often
CLOSE_S = 1.0
KEPT = 3.0  # leases for which a worker keeps its state, and applies nothing, once its own is over
_CLOSING = aiohttp.ClientWSTimeout(ws_close=CLOSE_S)


class Watcher:
    """One worker's connection. What is public here the training thread sets and reads, through its `WorkerLink`.

    Attributes:
        member: who this worker is.
        outbox: what is to be said.
        inbox: worlds, and what ends the wait for one.
        commits: what was said of checkpoints.
        assignment: the world that this worker is in.
        joining: how it asks for another.
        reporting: whether it is this worker's task to report rows.
        broken: worlds that the server said are broken.
        free: frees a training thread that is blocked in a broken world; returns at once.
        report: says what the world's connections know of a hang; may take seconds.
        wishes: what was asked for, to be agreed on at the next step boundary, and why.
        allowed: up to which step a run that holds after evaluations may go.
        fenced: why this worker must not go on.
        over: how the run ended.
        position: how far this worker is.
        place: says where it is, for people, and the samples that it waits for.
        closing: nothing more will be said.
    """

    def __init__(self, url: str, token: str, member: Member, *, lease_s: float):
        self.member = member
        self._url, self._token, self._lease_s = url, token, lease_s
        self.outbox = Outbox()
        self.inbox: queue.SimpleQueue[HostMessage] = queue.SimpleQueue()
        self.commits: queue.SimpleQueue[Commit] = queue.SimpleQueue()
        self.assignment: Assignment | None = None
        self.reporting = False
        self.joining: Join | None = None
        self._said_joining: Join | None = None
        self._known = True  # the server knows where this worker stands
        self.broken: set[Generation] = set()
        self.free: Callable[[], None] | None = None
        self.report: Callable[[], str] = str
        self._report_task: asyncio.Task[None] | None = None
        self.wishes: dict[str, str] = {}
        self.allowed = 0
        self.fenced: str | None = None
        self.over: str | None = None
        self._refusal = ""  # of the newest message from the host that was none
        self._leased = time.monotonic()  # when the newest beat that was answered was sent: the lease counts from there
        self.position = ENTERED
        self.next_beat = 0.0
        self.place: Callable[[], tuple[str, list[int]]] = lambda: ("", [])
        self._loop = asyncio.new_event_loop()
        self._posted = asyncio.Event()
        self.closing = False
        self._thread = threading.Thread(target=self._run, name="membership-link", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Have the watcher look at once at what is to be said. From any thread."""
        try:
            self._loop.call_soon_threadsafe(self._posted.set)
        except RuntimeError:  # the loop is closed: this worker's part is over
            return

    def lease_left(self) -> float:
        """Seconds for which updates may be applied without hearing the server; not above 0 once it is over."""
        return self._leased + self._lease_s - time.monotonic()

    def close(self) -> None:
        """End the connection and its thread when all that was to be said has been heard, or nobody is there to hear."""
        self.closing = True
        self.wake()
        self._thread.join((1 + KEPT) * self._lease_s + 10)

    # ---- the thread --------------------------------------------------------------------------------------------

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
            left = self.lease_left()
            turn_s = left if left > 0 else min(BEAT_S, 0.1 * self._lease_s)
            alone_s = 0.0 if left > 0 else alone_s + turn_s
            await asyncio.wait({holding}, timeout=turn_s)
        if holding.done():
            return holding.result()
        if self.fenced is None:
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
                self._known = self.assignment is None
                if not self._is_over():
                    await asyncio.sleep(RECONNECT_S)

    def _is_over(self) -> bool:
        if self.fenced or self.over:
            return True
        return self.closing and not self.outbox.waiting

    async def _converse(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Send and receive, until the connection or the worker's part ends."""
        reader = asyncio.create_task(self._read(socket))
        assignment = self.assignment
        if not self._known and assignment is not None and self.joining is None:
            hello = Hello(self.member, assignment.rank, assignment.size, self._whereabouts(assignment))
            await socket.send_str(dumps(hello))
        self.next_beat = time.monotonic()  # at once: a connection is this worker's from its first message on
        try:
            while not reader.done():
                self._posted.clear()
                while self._known and (said := self.outbox.take()) is not None:
                    await socket.send_str(dumps(*said))
                joining = self.joining
                if joining is not None and joining is not self._said_joining:
                    await socket.send_str(dumps(joining))
                    self._said_joining, self._known = joining, True
                if self._is_over():
                    return
                now = time.monotonic()
                if now >= self.next_beat:
                    self.next_beat = now + BEAT_S
                    await socket.send_str(dumps(self._beat()))
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(
                        self._posted.wait(), min(self.next_beat - now, ROWS_S if self.reporting else BEAT_S)
                    )
        finally:
            reader.cancel()

    def _beat(self) -> Beat:
        assignment = self.assignment
        return Beat(time.monotonic(), None if assignment is None else self._whereabouts(assignment))

    def _whereabouts(self, assignment: Assignment) -> Whereabouts:
        """How far this worker is in its world."""
        where, samples = self.place()
        position = self.position
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
        if socket.close_code == REFUSED_CODE and self.over is None:
            self._fence("the host of the run refused what this worker said; use one version of elastic for both")
        self._posted.set()

    async def _on_message(self, socket: aiohttp.ClientWebSocketResponse, message: HostMessage) -> None:
        match message:
            case BeatHeard():  # nothing else renews the lease: on a line that was cut, old messages come late
                self._leased = message.sent
                return
            case Assignment():
                self._known = True
                self.allowed = max(self.allowed, message.allowed)
                self.outbox.left_world()
                self.inbox.put(message)
            case SaveAlone():
                self._known = True
                self.inbox.put(message)
            case Resume():
                self._known = True
                self.outbox.say_again(message.generation)
            case Broken():
                self.broken.add(message.generation)
                await socket.send_str(dumps(Acknowledge(message.generation)))
                if self.assignment is not None and self.assignment.generation == message.generation:
                    self._free_now()
            case Wished():
                self.wishes[message.wish] = message.detail
            case Allowed():
                self.allowed = max(self.allowed, message.step)
            case Recorded():
                self.outbox.recorded(message.rows)
            case Commit():
                self.outbox.decided(message.step, message.attempt)
                self.commits.put(message)
            case Fenced() | Out():
                if self.over is None:
                    self._fence(message.reason)
            case Over():
                self.over = message.status
                self.outbox.over()
                self.inbox.put(message)
            case Dump():
                await socket.send_str(dumps(Stacks(stacks())))
                self._report_task = asyncio.create_task(self._send_report(socket))
        self._posted.set()

    async def _send_report(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        text = await asyncio.to_thread(self.report)
        if text and not socket.closed:
            with contextlib.suppress(ConnectionError):  # the server is away: it asks again, or nobody wants to know
                await socket.send_str(dumps(Report(text)))

    def _fence(self, reason: str) -> None:
        self.fenced = self.fenced or reason  # later ones only say that it is out
        self.outbox.over()
        self.inbox.put(Fenced(reason))
        self._free_now()

    def _free_now(self) -> None:
        free = self.free
        if free is not None:
            free()

    def _fence_by_lease(self) -> None:
        self.fenced = (
            f"the membership server at {self._url} was silent for {time.monotonic() - self._leased:.0f} s, much longer "
            f"than --recovery.lease {self._lease_s:g}s: others may have gone on with the run{self._refusal}"
        )


def stacks() -> str:
    """The stacks of all threads of this process, for people."""
    names = {t.ident: t.name for t in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    ]
    return "\n".join(parts)
