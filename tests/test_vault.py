"""A vault: what it takes, gives, frees and refuses; and its death while a part comes."""

from __future__ import annotations

import http.client
import os
import select
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
import xxhash

from elastic.checkpoint.staging import StagingBuffer
from elastic.checkpoint.tensors import Shard
from elastic.errors import SnapshotError
from elastic.placement import Part, TensorSpec
from elastic.snapshot import store
from elastic.snapshot import vault as serving
from elastic.snapshot.adopted import WorkerMemory
from elastic.snapshot.client import VaultClient
from elastic.snapshot.holdings import Holding, SnapshotId
from elastic.snapshot.memory import available_bytes
from elastic.snapshot.store import Store
from elastic.snapshot.vault import VaultServer
from elastic.worker.snapshot_buffers import Buffer, Buffers
from elastic.worker.snapshot_upload import Sender, Upload
from elastic.worker.vaults import VaultProcess
from tests.forked import fault, plan, wait_until

TOKEN, HERE = "secret", "127.0.0.1"
HEAD = b'{"a": 1}'


def at(step: int, n: int = 1) -> SnapshotId:
    return SnapshotId(1, n, step)


def part(shard: int) -> Part:
    return Part((("shard", shard, 2),))


def put(vault: VaultClient, id: SnapshotId, shard: int, body: bytes, keep: SnapshotId | None = None, **more: str):
    xxh3 = more.get("xxh3", xxhash.xxh3_64(HEAD + body).hexdigest())
    vault.put(id, part(shard), HEAD, memoryview(body), xxh3, keep)


@pytest.fixture
def server() -> Iterator[VaultServer]:
    server = VaultServer(TOKEN, HERE)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def vault(server) -> Iterator[VaultClient]:
    client = VaultClient(server.url, TOKEN, 10)
    yield client
    client.close()


def test_it_gives_back_what_it_took(vault):
    body = bytes(range(256)) * 100_000  # more than it reads at once
    put(vault, at(4), 1, body)

    assert vault.holdings() == [Holding(at(4), part(1), vault.url)]
    assert vault.head(at(4), part(1)) == {"a": 1}
    first, second, none = bytearray(1000), bytearray(len(body)), bytearray(0)
    vault.read_into(at(4), part(1), [(77, memoryview(first)), (0, memoryview(none)), (0, memoryview(second))])
    assert (bytes(first), bytes(second)) == (body[77:1077], body)
    assert vault.memory()["held"] == len(body)


def test_room_is_freed_when_a_newer_part_comes_but_not_that_of_the_newest_complete_one(vault):
    for step, keep in ((2, None), (4, at(2)), (6, at(4))):
        put(vault, at(step), 0, b"x" * 5000, keep)
        put(vault, at(step), 1, b"x" * 5000, keep)

    assert sorted({h.id.step for h in vault.holdings()}) == [4, 6]
    assert vault.memory()["held"] == 4 * 5000, "room is used again"
    put(vault, at(8), 0, b"x" * 5000, at(4))  # that of step 6 failed elsewhere
    assert sorted({h.id.step for h in vault.holdings()}) == [4, 8]


def test_a_part_that_comes_late_is_refused_and_frees_no_newer_one(vault, lent):
    """As where a worker called off its upload, and the next world took a snapshot before the vault read the part."""
    put(vault, at(4, n=2), 0, b"new")

    refused = "a part of snapshot 1-1-6 came after one of 1-2-4"
    with pytest.raises(SnapshotError, match=refused):
        put(vault, at(6), 1, b"old")
    with pytest.raises(SnapshotError, match=refused):
        vault.adopt(at(6), part(1), HEAD, memory_of(lent), None)
    assert [h.id for h in vault.holdings()] == [at(4, n=2)]
    put(vault, at(4, n=2), 1, b"of the same")
    assert len(vault.holdings()) == 2


def test_what_was_undone_is_forgotten(vault):
    put(vault, at(4), 0, b"x")
    put(vault, at(6), 0, b"y", at(4))

    vault.forget(after=4, before=at(0))
    assert [h.id.step for h in vault.holdings()] == [4, 6], "these are of no older world"
    vault.forget(after=4, before=at(0, n=2))
    assert [h.id.step for h in vault.holdings()] == [4]


def test_bytes_that_changed_on_the_way_are_not_kept(vault):
    with pytest.raises(SnapshotError, match="not those that were sent"):
        put(vault, at(4), 0, b"some bytes", xxh3="0" * 16)
    assert vault.holdings() == []


def test_a_part_that_does_not_fit_is_refused_and_the_sender_is_told(vault, monkeypatch):
    monkeypatch.setattr(store, "available_bytes", lambda: 1 << 20)

    with pytest.raises(SnapshotError, match="a part of 20971520 bytes does not fit into 1048576 bytes that are left"):
        put(vault, at(4), 0, bytes(20 << 20))
    put(vault, at(4), 0, b"this one does")


def test_without_the_token_it_says_nothing(server):
    stranger = VaultClient(server.url, "guessed", 10)
    with pytest.raises(SnapshotError, match="wrong or missing token"):
        stranger.holdings()
    with pytest.raises(SnapshotError):
        put(stranger, at(4), 0, b"x")
    stranger.close()


def test_a_connection_stays_and_is_made_again_if_the_vault_has_ended_it_while_idle(monkeypatch):
    connects = []
    connect = http.client.HTTPConnection.connect
    monkeypatch.setattr(http.client.HTTPConnection, "connect", lambda self: (connects.append(1), connect(self)))
    monkeypatch.setattr(serving._Handler, "timeout", 0.2)
    server = VaultServer(TOKEN, HERE)
    server.start()
    client = VaultClient(server.url, TOKEN, 10)
    try:
        put(client, at(4), 0, b"one")
        put(client, at(5), 0, b"two")
        assert len(connects) == 1
        assert client._connection.sock is not None
        select.select([client._connection.sock], [], [], 20)  # its end

        put(client, at(6), 0, b"three")
        assert len(connects) == 2
        client.cut()
        with pytest.raises(SnapshotError):
            put(client, at(7), 0, b"four")
        assert len(connects) == 2, "one that was cut does not connect again"
    finally:
        client.close()
        server.stop()


def test_what_is_not_there_is_an_error(vault):
    with pytest.raises(SnapshotError, match="shard 0 of 2 of snapshot 1-1-4 is not here"):
        vault.head(at(4), part(0))


def test_a_sender_that_is_cut_off_leaves_nothing_behind(vault, monkeypatch):
    began, go_on = threading.Event(), threading.Event()
    first = Store.begin

    def begin(*arguments):
        part = first(*arguments)
        began.set()
        assert go_on.wait(10)
        return part

    monkeypatch.setattr(Store, "begin", begin)
    failed: list[Exception] = []

    def send() -> None:
        try:
            put(vault, at(4), 0, bytes(64 << 20))
        except SnapshotError as error:
            failed.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    assert began.wait(10)
    vault.cut()
    go_on.set()
    sender.join(10)
    assert len(failed) == 1
    other = VaultClient(vault.url, TOKEN, 10)
    wait_until(lambda: other.memory()["held"] == 0, "the part to be dropped")
    assert other.holdings() == []
    other.close()


def test_room_that_is_read_from_is_not_used_again():
    store = Store()
    part = store.begin((at(2), Part()), HEAD, 5000, None)
    store.end((at(2), Part()), part, whole=True)
    reading = store.open((at(2), Part()))
    assert reading is part

    newer = store.begin((at(4), Part()), HEAD, 5000, None)

    assert newer.memory is not reading.memory
    store.close(reading)
    assert store.open((at(2), Part())) is None
    assert store.open((at(4), Part())) is None, "it is not whole"


@pytest.fixture
def lent() -> Iterator[StagingBuffer]:
    """10,000 bytes of a worker, all 7."""
    buffer = StagingBuffer(pinned=False)
    buffer.reserve(10_000)
    buffer.bytes(0, 10_000).fill_(7)
    yield buffer
    if buffer.size:  # else the test has closed it
        buffer.close()


def memory_of(buffer: StagingBuffer, size: int = 10_000) -> WorkerMemory:
    return WorkerMemory.of(buffer.fd, size)


def test_a_part_in_a_workers_memory_is_kept_without_a_copy_and_outlives_the_worker(vault, lent):
    vault.adopt(at(4), part(0), HEAD, memory_of(lent), None)
    assert vault.memory(memory_of(lent)) == {**vault.memory(), "maps": 1}
    assert vault.holdings() == [Holding(at(4), part(0), vault.url)]
    lent.bytes(0, 1).fill_(8)  # the vault has no bytes of its own

    lent.close()  # as where the worker ends

    got = bytearray(3)
    vault.read_into(at(4), part(0), [(0, memoryview(got))])
    assert bytes(got) == b"\x08\x07\x07"
    put(vault, at(6), 0, b"x")
    assert [h.id.step for h in vault.holdings()] == [6], "a newer part frees it, as any other"


def test_memory_that_was_released_is_in_no_part_and_is_not_given_to_a_reader(lent):
    kept, key, memory = Store(), (at(2), part(0)), memory_of(lent)
    kept.adopt(key, HEAD, memory, None)
    reading = kept.open(key)
    assert reading is not None
    kept.begin((at(4), part(0)), HEAD, 5, None)  # which frees the older part

    assert not kept.release(memory), "somebody still reads it"
    assert kept.open(key) is None
    kept.close(reading)
    assert kept.release(memory)
    assert kept.release(memory), "twice is as once"


def test_only_the_memory_that_was_named_is_mapped(vault, lent, tmp_path):
    named = memory_of(lent)
    (tmp_path / "file").write_bytes(bytes(10_000))
    with open(tmp_path / "file", "rb") as file:
        wrong = [
            (replace(named, inode=named.inode + 1), "other memory"),
            (replace(named, size=10_001), "other memory"),
            (replace(named, fd=1 << 20), "No such file"),
            (WorkerMemory.of(file.fileno(), 5), "is no memory"),
        ]
        for memory, why in wrong:
            with pytest.raises(SnapshotError, match=f"cannot map the worker's memory: .*{why}"):
                vault.adopt(at(4), part(0), HEAD, memory, None)
            assert vault.memory(memory)["maps"] == 0
    assert vault.holdings() == []


def test_a_worker_copies_into_two_buffers_in_turn(vault):
    """Its own vault maps them. One that the vault may still read is never written to again."""
    buffers = Buffers(vault.url, TOKEN, pinned=False)

    def begin(step: int, keep: int | None) -> Buffer:
        taken = buffers.take(at(step), 5000)
        assert taken.lent is None
        taken.staging.bytes(0, 5000).fill_(step)
        kept = None if keep is None else at(keep)
        buffers.reclaim({at(step)} if kept is None else {at(step), kept})
        vault.adopt(at(step), part(0), HEAD, buffers.lend(taken, 5000), kept)
        return taken

    first = begin(2, None)
    second = begin(4, 2)
    buffers.reclaim({at(4)})  # it is complete
    assert begin(6, 4) is first
    third = begin(8, 4)  # that of 6 was not complete
    assert third not in (first, second)
    assert [h.id.step for h in vault.holdings()] == [4, 8]
    buffers.reclaim({at(8)})
    assert len(buffers._buffers) == 2
    assert vault.memory()["held"] == 5000
    with ExitStack() as stack:
        stack.callback(buffers.close)
        gone = Buffers("http://127.0.0.1:9", TOKEN, pinned=False)
        stack.callback(gone.close)
        lost = gone.take(at(2), 10)
        gone.lend(lost, 10)
        gone.reclaim({at(4)})
        assert gone._buffers == [], "a vault that does not answer may read it: it is given up"
        assert gone.take(at(4), 10) is not lost


def test_a_snapshot_right_after_another_is_complete_needs_no_new_memory_and_no_new_connection(vault, monkeypatch):
    """Two buffers do, as long as each snapshot begins when the one before is complete: new pages cost a step's time."""
    connects = []
    connect = http.client.HTTPConnection.connect
    monkeypatch.setattr(http.client.HTTPConnection, "connect", lambda self: (connects.append(1), connect(self)))
    sender, made = Sender(vault.url, TOKEN, torch.device("cpu"), lambda upload: None), set()
    moves, stays = torch.zeros(16), torch.zeros(1000)
    specs = [TensorSpec("moves", "float32", (16,)), TensorSpec("stays", "float32", (1000,))]
    whole, keep = Part(()), None
    try:
        for step in range(8):
            moves.fill_(step)
            stays.fill_(step)
            tensors = [Shard.whole("moves", moves), Shard.whole("stays", stays, stable=True)]
            sender.start(upload := Upload(at(step), whole, 0, (vault.url,), keep, {}, specs, tensors))
            moves.fill_(-1)  # as a forward pass may
            sender.settle()
            sender.wait(10)
            assert upload.ended.is_set()
            assert upload.error is None
            sender.complete(keep := at(step))
            made |= {buffer.staging.fd for buffer in sender._buffers._buffers}
        stored = bytearray(4 * 1016)
        vault.read_into(at(7), whole, [(0, memoryview(stored))])
        assert torch.frombuffer(stored, dtype=torch.float32).unique().tolist() == [7.0]
        assert len(made) == 2
        assert len(connects) == 3, "of the sender, its buffers and this test"
    finally:
        sender.close()


def test_memory_that_can_be_had_is_not_more_than_the_machine_has():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    assert 0 < available_bytes() <= total


@pytest.mark.processes
@pytest.mark.parametrize("point", ["vault.begin", "vault.receiving", "vault.whole"])
def test_a_vault_that_dies_while_a_part_comes_is_an_error_of_the_sender(point):
    process = VaultProcess(TOKEN, HERE, plan(fault(point, 4)))
    vault = VaultClient(process.wait(), TOKEN, 10)
    try:
        put(vault, at(2), 0, b"x" * 100)
        with pytest.raises(SnapshotError, match="failed"):
            put(vault, at(4), 0, bytes(20 << 20), at(2))
        assert process.process.wait(10) == -9
    finally:
        vault.close()
        process.stop()
