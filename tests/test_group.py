"""Connecting a world, and being freed from one: nobody waits for a member or a store that is gone."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from elastic.compat.torch_groups import all_gather_flat
from elastic.errors import WorldBroken
from elastic.membership.protocol import Assignment, RestorePoint
from elastic.membership.world import Generation
from elastic.worker.flags import Flags
from elastic.worker.group import Group
from tests.forked import fork, wait_until
from tests.slowly import slow

OPERATIONS = {
    "broadcast": lambda values, others, rank: dist.broadcast(values, 1),
    "all_reduce": lambda values, others, rank: dist.all_reduce(values),
    "all_gather": lambda values, others, rank: all_gather_flat(others, values),
    "reduce_scatter": lambda values, others, rank: dist.reduce_scatter_tensor(values, others),
    "all_to_all": lambda values, others, rank: dist.all_to_all_single(others, others.clone()),
    "send": lambda values, others, rank: dist.send(values, 0) if rank else dist.recv(values, 1),
    "later": lambda values, others, rank: dist.all_reduce(values, async_op=True).get_future().wait(),
}


def big() -> tuple[torch.Tensor, torch.Tensor]:
    """Values that are on their way for a while, and room for those of two."""
    return torch.ones(4_000_000), torch.zeros(8_000_000)


def repeat(operation: Callable[..., object], *tensors: torch.Tensor) -> NoReturn:
    while True:
        operation(*tensors, 0)


def group(port: int, size: int = 1, rank: int = 0) -> Group:
    return Group(Assignment(Generation(1, 1), rank, size, ("127.0.0.1", port), RestorePoint(), 0), torch.device("cpu"))


def take_part(port: int, operation: str) -> NoReturn:
    """A member that takes part in one operation after the other, until it is killed in the middle of one."""
    world = group(port, 2, rank=1)
    world.connect(60.0)
    values, others = big()
    while True:
        OPERATIONS[operation](values, others, 1)


def come_late(port: int, end: signal.Signals) -> None:
    """A member that says where it listens, and gets no further: it dies there, or its host is cut off (it stops)."""

    class Store(dist.Store):
        def __init__(self, store: dist.Store):
            super().__init__()
            self.store = store

        def set(self, key: str, value: str) -> None:
            self.store.set(key, value)
            if key.endswith("/cpu//0/1"):
                os.kill(os.getpid(), end)

    store = Store(dist.TCPStore("127.0.0.1", port, is_master=False))
    dist.init_process_group("gloo", store=dist.PrefixStore("1-1", store), rank=1, world_size=2)


def state_of(pid: int) -> str:
    """The letter that /proc has for a process: T is stopped; none is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def enter(world: Group) -> None:
    world.connect(60.0)
    world.agree(Flags())  # where one is cut off, its host may have accepted the call


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


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("moment_s", [0.003, *slow(0.0, 0.007)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_member_that_dies_in_the_middle_of_an_operation_holds_nobody_up(operation: str, moment_s: float):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = group(server.port, 2)
    member = fork(take_part, server.port, operation)
    try:
        world.connect(60.0)
        values, others = big()
        OPERATIONS[operation](values, others, 0)
        killing = threading.Timer(moment_s, member.kill)
        killing.start()

        def hear_of_it() -> None:  # as the membership server would say
            member.join()
            world.free()

        hearing = threading.Thread(target=hear_of_it)
        hearing.start()
        began = time.monotonic()
        with pytest.raises(RuntimeError) as broken:
            repeat(OPERATIONS[operation], values, others)
        assert world.failed_by(broken.value)
        assert time.monotonic() - began < 5
        hearing.join()
        before = others.clone(), values.clone()
        world.close()
        assert time.monotonic() - began < 5
        assert torch.equal(before[0], others)
        assert torch.equal(before[1], values)
        assert not dist.is_initialized()
    finally:
        member.kill()
        member.join()
        world.close()


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("attempt", range(4))  # by the order of their addresses, one listens and the other one calls
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_member_that_is_gone_while_connecting_holds_nobody_up(end: signal.Signals, attempt: int):
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = group(server.port, 2)
    member = fork(come_late, server.port, end)
    try:
        if end == signal.SIGSTOP:
            wait_until(lambda: state_of(member.pid) == "T", "the member to stop")
        else:
            member.join(60)
            assert member.exitcode == -end
        threading.Timer(0.2, world.free).start()
        began = time.monotonic()
        with pytest.raises(WorldBroken):
            enter(world)
        assert time.monotonic() - began < 5
    finally:
        world.close()
        member.kill()
        member.join()
