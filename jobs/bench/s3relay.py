"""The process of `jobs.bench.s3front`: answers requests from an object store behind it or from memory.

Commands come as lines of JSON on standard input, one answer each on standard output; the process ends with its input.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from jobs.bench.s3memory import Answer, MemoryStore, error
from jobs.bench.s3wire import Cut, Head, Meter, Pace, Wire

LOOPBACK = "127.0.0.1"
UPSTREAM_S = 30.0


@dataclass
class Fault:
    """What to do to the next `count` requests whose method and `/bucket/key?query` match.

    One of: `status` (answer with it and S3's error `code`; the request goes nowhere), `delay_s` (the first byte of the
    answer waits), `cut` (`request` or `response`: the connection is reset after `after_bytes` of that body), `ignored`
    (a header, in lower case, that the store in memory does not heed).
    """

    method: str = ".*"
    key: str = ".*"
    count: int = 1
    status: int = 0
    code: str = "SlowDown"
    delay_s: float = 0.0
    cut: str = ""
    after_bytes: int = 0
    ignored: str = ""

    def takes(self, method: str, target: str) -> bool:
        if self.count <= 0 or not re.fullmatch(self.method, method) or not re.search(self.key, target):
            return False
        self.count -= 1
        return True


@dataclass
class Record:
    """A request as the proxy saw it; times are of its monotonic clock, in seconds."""

    method: str
    key: str
    query: dict[str, str]
    range: str
    began: float
    ended: float = 0.0
    status: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    fault: str = ""


@dataclass
class Exchange:
    """One request in hand."""

    request: Head
    client: Wire
    record: Record
    fault: Fault
    rate: float
    first_byte_s: float
    released: asyncio.Event
    came: float = field(default_factory=time.monotonic)

    def meter(self, direction: str) -> Meter:
        """Counts a body that passes, at the pace of a connection, and cuts it where asked."""
        pace, passed = Pace(self.rate), 0
        cut = self.fault.cut == direction

        async def meter(count: int) -> None:
            nonlocal passed
            passed += count
            if direction == "request":
                self.record.sent_bytes += count
            else:
                self.record.received_bytes += count
            await pace(count)
            if cut and passed >= self.fault.after_bytes:
                raise Cut

        return meter

    async def first_byte(self) -> None:
        """Wait until the answer may begin, which it never does where it is to be cut after 0 bytes."""
        wait = max(self.first_byte_s, self.fault.delay_s) - (time.monotonic() - self.came)
        if wait > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.released.wait(), wait)
        if self.fault.cut == "response" and not self.fault.after_bytes:
            raise Cut


class Relay:
    """Serves connections; `upstream` is a port of this machine, or 0 for the store in memory."""

    def __init__(self, upstream: int, first_byte_s: float, rate: float):
        self.upstream, self.first_byte_s, self.rate = upstream, first_byte_s, rate
        self.memory = MemoryStore()
        self.faults: list[Fault] = []
        self.records: list[Record] = []
        self._released = asyncio.Event()  # set where delayed answers may come at once

    def release(self) -> None:
        """Let answers come that are being delayed."""
        self._released.set()
        self._released = asyncio.Event()

    async def listen(self) -> int:
        """Start to accept; returns the port."""
        listener = socket.create_server((LOOPBACK, 0), backlog=1024)
        listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(listener))
        return int(listener.getsockname()[1])

    async def _accept(self, listener: socket.socket) -> None:
        tasks: set[asyncio.Task[None]] = set()
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(listener)
            task = asyncio.create_task(self._serve(Wire(connection)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _serve(self, client: Wire) -> None:
        upstream: list[Wire] = []
        try:
            while (request := await client.head()) is not None:
                if not await self._one(request, client, upstream):
                    break
        except Cut:
            client.break_off()
        except ConnectionError:
            pass  # either side went away; the record says how far it came
        finally:
            for wire in (client, *upstream):
                wire.close()

    async def _one(self, request: Head, client: Wire, upstream: list[Wire]) -> bool:
        """Answer one request; returns whether the connection goes on."""
        target = request.first[1]
        fault = next((f for f in self.faults if f.takes(request.method, target)), Fault())
        record = Record(request.method, request.path, request.query, request.headers.get("range", ""), time.monotonic())
        record.fault = str(fault.status or "") or fault.cut or ("delay" if fault.delay_s else "")
        self.records.append(record)
        released = self._released if fault.delay_s else asyncio.Event()
        exchange = Exchange(request, client, record, fault, self.rate, self.first_byte_s, released)
        try:
            if fault.status:
                await _receive(exchange)
                return await _reply(exchange, error(fault.status, fault.code, "as a test asked"))
            request.headers.pop(fault.ignored, None)
            if not self.upstream:
                return await _reply(exchange, self.memory.answer(request, await _receive(exchange)))
            return await self._forward(exchange, upstream)
        finally:
            record.ended = time.monotonic()

    async def _forward(self, exchange: Exchange, upstream: list[Wire]) -> bool:
        request, client, record = exchange.request, exchange.client, exchange.record
        if upstream and upstream[0].stale(self.upstream):
            upstream.pop().close()
        if not upstream:
            upstream.append(await Wire.connect(LOOPBACK, self.upstream))
        server = upstream[0]
        await server.send(request.raw)
        answer = await _upload(exchange, server)
        if answer is None:
            raise ConnectionError("the store closed the connection")
        record.status = answer.status
        await exchange.first_byte()
        await client.send(answer.raw)
        meter = exchange.meter("response")
        if request.method != "HEAD" and answer.status not in (204, 304):
            if answer.chunked:
                await server.pump_chunked(client, meter)
            elif answer.length is None:
                await server.pump_rest(client, meter)
                return False
            else:
                await server.pump(client, answer.length, meter)
        unread = (request.length or 0) > record.sent_bytes
        return not (answer.closes or request.closes or unread)


async def _upload(exchange: Exchange, server: Wire) -> Head | None:
    """Pass the request's body on and wait for the answer; the store may answer before it has read the body."""
    request, client, meter = exchange.request, exchange.client, exchange.meter("request")
    if "expect" in request.headers:
        async with asyncio.timeout(UPSTREAM_S):
            answer = await server.head()
        if answer is None or answer.status != 100:
            return answer
        await client.send(answer.raw)
    if request.chunked:
        await client.pump_chunked(server, meter)
    elif request.length:
        await client.pump(server, request.length, meter)
    exchange.came = time.monotonic()
    return await server.head()


async def _receive(exchange: Exchange) -> bytearray:
    """Take a request's whole body."""
    request = exchange.request
    if "expect" in request.headers:
        await exchange.client.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert not request.chunked, "the store in memory takes bodies of known length"
    body = bytearray(request.length or 0)
    await exchange.client.read_into(memoryview(body), exchange.meter("request"))
    exchange.came = time.monotonic()
    return body


async def _reply(exchange: Exchange, answer: Answer) -> bool:
    """Send an answer of our own."""
    exchange.record.status = answer.status
    bodiless, meter = exchange.request.method == "HEAD", exchange.meter("response")
    await exchange.first_byte()
    await exchange.client.send(answer.head(bodiless=bodiless))
    if not bodiless:
        pieces = answer.blob.pieces(answer.start, answer.end) if answer.blob else [memoryview(answer.text.encode())]
        for piece in pieces:
            await exchange.client.write_from(piece, meter)
    return not exchange.request.closes


def commands(relay: Relay) -> dict[str, Callable[..., Any]]:
    """What may be asked on standard input, by name."""

    def records() -> list[dict[str, Any]]:
        found, relay.records = relay.records, [r for r in relay.records if not r.ended]
        return [asdict(r) for r in found if r.ended]

    def cpu_s() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    return {
        "fault": lambda **values: relay.faults.append(Fault(**values)),
        "release": relay.release,
        "clear": lambda: relay.faults.clear(),
        "unused": lambda: sum(f.count for f in relay.faults),
        "upstream": lambda port: setattr(relay, "upstream", port),
        "records": records,
        "cpu_s": cpu_s,
    }


async def _main() -> None:
    settings = json.loads(sys.argv[1])
    relay = Relay(**settings)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    known: dict[str, Callable[..., Awaitable[Any] | Any]] = commands(relay)
    print(json.dumps(await relay.listen()), flush=True)
    while line := await reader.readline():
        command = json.loads(line)
        print(json.dumps(known[command.pop("do")](**command)), flush=True)


if __name__ == "__main__":
    asyncio.run(_main())
