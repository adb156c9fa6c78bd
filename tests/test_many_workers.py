"""A thousand workers that lose one of theirs, with real connections to a real server: all in one process, which is busy
with that."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import aiohttp
import pytest

from elastic.child import raise_descriptor_limit
from elastic.membership.protocol import (
    MAX_MESSAGE_BYTES,
    Acknowledge,
    Assignment,
    Broken,
    Join,
    dumps,
    from_host,
)
from elastic.membership.server import MembershipServer
from elastic.membership.state import Limits, State
from elastic.membership.world import Member
from jobs.bench.control_plane import Notes

pytestmark = [pytest.mark.long, pytest.mark.timeout(240)]

WORKERS = 1024


async def work(url: str, number: int, said: list[str], worlds: asyncio.Queue[int], leave: asyncio.Event) -> None:
    """One worker: joins, and joins again when its world is broken, until it is told to leave or hears of a second."""
    member = Member(f"w{number:04}", f"n{number % 64}", number)
    join = Join(member, -1, None, "", "", 0.0, {})
    headers = {"Authorization": "Bearer token"}
    async with (
        aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session,
        session.ws_connect(f"{url}/worker?id={member.id}", max_msg_size=MAX_MESSAGE_BYTES) as socket,
    ):
        await socket.send_str(dumps(join))
        join = replace(join, applied=5)
        while not leave.is_set():
            try:
                message = from_host((await socket.receive(0.2)).data)
            except TimeoutError:
                continue
            said.append(message.kind)
            if isinstance(message, Assignment):
                worlds.put_nowait(message.size)
            elif isinstance(message, Broken):
                await socket.send_str(dumps(Acknowledge(message.generation)))
                await socket.send_str(dumps(join))


async def lose_one(url: str) -> tuple[list[int], list[str]]:
    """The sizes of the worlds that workers hear of, before and after the loss, and all kinds of messages."""
    said: list[str] = []
    worlds: asyncio.Queue[int] = asyncio.Queue()
    one, all_leave = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(WORKERS):
            group.create_task(work(url, number, said, worlds, all_leave if number else one))
        sizes = [await worlds.get() for _ in range(WORKERS)]
        one.set()
        sizes += [await worlds.get() for _ in range(WORKERS - 1)]
        all_leave.set()
    return sizes, said


def test_of_a_thousand_workers_that_lose_one_nobody_is_refused() -> None:
    raise_descriptor_limit()
    keeper = Notes()
    state = State(epoch=1, limits=Limits(min_workers=1, max_workers=WORKERS, settle_s=120.0))
    server = MembershipServer(keeper, state, "token", host="127.0.0.1", new_store=lambda: (0, lambda: None))
    server.start()
    try:
        sizes, said = asyncio.run(lose_one(server.url))
    finally:
        server.stop()
        server._thread.join(60)  # on a busy machine it takes long to see so many go
    assert sizes[:WORKERS] == [WORKERS] * WORKERS
    assert sizes[WORKERS:] == [WORKERS - 1] * (WORKERS - 1)
    assert "refused" not in said
    assert "member_late" not in keeper.kinds
