"""Connecting a world: what an earlier one left behind does not matter, and a store that is gone does not block."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import torch
import torch.distributed as dist

from elastic.errors import WorldBroken
from elastic.membership.client import Assignment
from elastic.membership.world import Generation
from elastic.worker.group import Group


def group(port: int) -> Group:
    return Group(Assignment(Generation(1, 1), 0, 1, ("127.0.0.1", port), {}, 0), torch.device("cpu"))


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
