"""The watcher of a worker: the thread that holds its connection to the membership server.

It keeps sending heartbeats while the training thread computes, and acts when that thread cannot: it acknowledges a
broken world and frees the training thread that is blocked in it, sends the stacks, and connects again when the server
was restarted. After a reconnection it reports where the worker is, and once the server knows, sends again everything
that the server may have lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

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
from elastic.membership.witness import Witness
from elastic.membership.world import Generation, Member

RECONNECT_S = 0.2
ROWS_S = 0.1  # interval at which rows are reported
CLOSE_S = 1.0
WITNESSED_BYTES = 1 << 30  # of resident memory, which the kernel frees in a tenth of a second
KEPT = 3.0  # leases for which a worker keeps its state, applying nothing, after its own lease is over
_CLOSING = aiohttp.ClientWSTimeout(ws_close=CLOSE_S)


class Watcher:
    """One worker's connection. The training thread sets and reads the public attributes, through its `WorkerLink`.

    Attributes:
        member: this worker's identity and description.
        outbox: messages to send.
        inbox: new worlds, and messages that end the wait for one.
        commits: outcomes of checkpoints.
        assignment: the world that this worker is in.
        joining: its request for another world.
        reporting: whether this worker is the one that reports rows.
        broken: worlds that the server declared broken.
        free: frees the training thread if it is blocked in a broken world; returns at once.
        report: returns what the world's connections know about a hang; may take seconds.
        wishes: wishes to be agreed on at the next step boundary, with their reasons.
        allowed: the step up to which a run that pauses after evaluations may go.
        fenced: why this worker must not go on.
        over: how the run ended.
        position: how far this worker is.
        device_memory: see `Beat`; asked of the device by the training thread, since it may wait.
        place: returns where it is in words, and the ids of the samples that it waits for.
        closing: no further message will be sent.
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
        self._sent_joining: Join | None = None
        self._known = True  # the server knows which world this worker is in
        self.broken: set[Generation] = set()
        self.free: Callable[[], None] | None = None
        self.report: Callable[[], str] = str
        self._report_task: asyncio.Task[None] | None = None
        self._witness: Witness | None = None
        self._may_have_witness = sys.platform == "linux"
        self.wishes: dict[str, str] = {}
        self.allowed = 0
        self.fenced: str | None = None
        self.over: str | None = None
        self._refusal = ""  # why the newest message from the host was invalid
        self._leased = time.monotonic()  # when the newest answered beat was sent: the lease counts from there
        self.position = ENTERED
        self.next_beat, self._beat_s = 0.0, BEAT_S
        self.device_memory: float | None = None
        self.place: Callable[[], tuple[str, list[int]]] = lambda: ("", [])
        self._loop = asyncio.new_event_loop()
        self._posted = asyncio.Event()
        self.closing = False
        self._thread = threading.Thread(target=self._run, name="membership-link", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Have the watcher send new messages at once. From any thread."""
        try:
            self._loop.call_soon_threadsafe(self._posted.set)
        except RuntimeError:  # the loop is closed: this worker has ended
            return

    def lease_left(self) -> float:
        """Seconds for which updates may be applied without an answer of the server; 0 or less once the lease is
        over."""
        return self._leased + self._lease_s - time.monotonic()

    def close(self) -> None:
        """End the connection and its thread once every message has taken effect, or the server is gone."""
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
            if self._witness is not None:
                self._witness.end()

    async def _hold_while_leased(self) -> None:
        """Stay connected until the lease is long over; then free a training thread that waits in vain.

        Time is counted in turns of this loop: a process that was stopped has yet to read what it missed.
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
        """Stay connected; connect again after the server was away."""
        headers = {"Authorization": f"Bearer {self._token}"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            while not self._is_over():
                try:
                    url = f"{self._url}/worker?id={self.member.id}&protocol={VERSION}"
                    async with session.ws_connect(url, max_msg_size=MAX_MESSAGE_BYTES, timeout=_CLOSING) as socket:
                        await self._converse(socket)
                except (TimeoutError, aiohttp.ClientError, OSError):
                    pass  # the server is away: the lease limits for how long
                self._sent_joining = None
                self._known = self.assignment is None
                if not self._is_over():
                    await asyncio.sleep(RECONNECT_S)

    def _is_over(self) -> bool:
        if self.fenced or self.over:
            return True
        return self.closing and not self.outbox.waiting

    async def _converse(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Send and receive until the connection or the run ends."""
        reader = asyncio.create_task(self._read(socket))
        if self._witness is not None:
            self._show_witness(socket)
        assignment = self.assignment
        if not self._known and assignment is not None and self.joining is None:
            hello = Hello(self.member, assignment.rank, assignment.size, self._whereabouts(assignment))
            await socket.send_str(dumps(hello))
        self.next_beat = time.monotonic()  # at once: the server binds a connection to a worker at its first message
        try:
            while not reader.done():
                self._posted.clear()
                while self._known and (outgoing := self.outbox.take()) is not None:
                    await socket.send_str(dumps(*outgoing))
                joining = self.joining
                if joining is not None and joining is not self._sent_joining:
                    await socket.send_str(dumps(joining))
                    self._sent_joining, self._known = joining, True
                if self._is_over():
                    return
                now = time.monotonic()
                if now >= self.next_beat:
                    self.next_beat = now + self._beat_s
                    await socket.send_str(dumps(self._beat()))
                    if self._witness is None:  # it may have become large
                        self._show_witness(socket)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(
                        self._posted.wait(), min(self.next_beat - now, ROWS_S if self.reporting else BEAT_S)
                    )
        finally:
            reader.cancel()

    def _beat(self) -> Beat:
        assignment = self.assignment
        at = None if assignment is None else self._whereabouts(assignment)
        return Beat(time.monotonic(), at, _resident_bytes(), self.device_memory)

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
                except Refused as refused:  # connect again; the lease limits for how long
                    self._refusal = f"; its last message was not valid: {refused}"
                    break
                await self._on_message(socket, message)
        if socket.close_code == REFUSED_CODE and self.over is None:
            self._fence("the host of the run refused a message of this worker; use one version of elastic for both")
        self._posted.set()

    async def _on_message(self, socket: aiohttp.ClientWebSocketResponse, message: HostMessage) -> None:
        match message:
            case BeatHeard():  # nothing else renews the lease: after a cut line old messages arrive late
                self._leased, self._beat_s = message.sent, max(BEAT_S, message.next_s)
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
                self.outbox.resend(message.generation)
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

    def _show_witness(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Have another process end this connection at once if this one dies, where the kernel would take its time."""
        large = self._witness is not None or (_resident_bytes() or 0) >= WITNESSED_BYTES
        if not self._may_have_witness or not large:
            return
        try:
            self._witness = self._witness or Witness()
        except OSError as error:
            self._may_have_witness = False
            print(f"warning: should this worker be killed, that is noticed later than usual: {error}", file=sys.stderr)
            return
        if not self._witness.has(socket.get_extra_info("socket")):
            self._witness = None  # it was killed

    async def _send_report(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        text = await asyncio.to_thread(self.report)
        if text and not socket.closed:
            with contextlib.suppress(ConnectionError):  # the server is away, and asks again if it still needs it
                await socket.send_str(dumps(Report(text)))

    def _fence(self, reason: str) -> None:
        self.fenced = self.fenced or reason  # the first reason is the cause; later ones follow from it
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


def _resident_bytes() -> int | None:
    """Resident memory of this process; None where the kernel does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize()


def stacks() -> str:
    """The stacks of all threads of this process, as text."""
    names = {t.ident: t.name for t in threading.enumerate()}
    texts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    ]
    return "\n".join(texts)
