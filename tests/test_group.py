"""Connecting a world: what an earlier one left behind does not matter, and a store that is gone does not block."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from elastic.errors import WorldBroken
from elastic.membership.client import Assignment
from elastic.membership.world import Generation
from elastic.worker.group import Group

# A member that says where it listens, and gets no further: it dies there, or its host is cut off (it stops).
LATE = """
import os, sys, torch.distributed as dist
from datetime import timedelta

class Store(dist.Store):
    def __init__(self, store):
        super().__init__()
        self.store = store

    def set(self, key, value):
        self.store.set(key, value)
        if key.endswith("/cpu//0/1"):
            os.kill(os.getpid(), int(sys.argv[2]))

store = Store(dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False))
dist.init_process_group("gloo", store=dist.PrefixStore("1-1", store), rank=1, world_size=2)
"""


def group(port: int, size: int = 1) -> Group:
    return Group(Assignment(Generation(1, 1), 0, size, ("127.0.0.1", port), {}, 0), torch.device("cpu"))


def enter(world: Group) -> None:
    world.connect(60.0)
    world.agree([0])  # where one is cut off, its host may have accepted the call


def test_a_world_names_its_groups_from_0_whatever_failed_before():
    dist.distributed_c10d._world.group_count = 3  # what three attempts that failed leave behind
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = group(server.port)
    world.connect(10.0)
    try:
        assert dist.distributed_c10d._get_default_group().group_name == "0"
    finally:
        world.close()


def test_a_store_that_is_gone_means_that_the_world_is_over():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = group(server.port)
    del server
    began = time.monotonic()
    with pytest.raises(WorldBroken, match=r"store of world 1-1 at 127.*refused"):
        world.connect(10.0)
    assert time.monotonic() - began < 5


def test_a_store_that_does_not_answer_is_left_when_the_world_is_broken():
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        world = group(deaf.getsockname()[1])
        threading.Timer(0.2, world.free).start()
        began = time.monotonic()
        with pytest.raises(WorldBroken, match="store of world 1-1 at 127"):
            world.connect(10.0)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("attempt", range(4))  # by the order of their addresses, one listens and the other one calls
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_member_that_is_gone_while_connecting_holds_nobody_up(end: signal.Signals, attempt: int):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = group(server.port, 2)
    member = subprocess.Popen([sys.executable, "-c", LATE, str(server.port), str(int(end))])
    try:
        _, status = os.waitpid(member.pid, os.WUNTRACED)
        assert end in (os.WSTOPSIG(status) if os.WIFSTOPPED(status) else -1, os.WTERMSIG(status))
        threading.Timer(0.2, world.free).start()
        began = time.monotonic()
        with pytest.raises(WorldBroken):
            enter(world)
        assert time.monotonic() - began < 5
    finally:
        world.close()
        member.kill()
        member.wait()
