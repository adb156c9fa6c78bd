"""A vault: what it takes, gives, frees and refuses; and its death while a part comes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
import xxhash

from elastic.errors import SnapshotError
from elastic.placement import Part
from elastic.snapshot import vault as rooms
from elastic.snapshot.client import VaultClient
from elastic.snapshot.holdings import Holding, SnapshotId
from elastic.snapshot.memory import available_bytes
from elastic.snapshot.vault import Store, VaultServer
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
    monkeypatch.setattr(rooms, "available_bytes", lambda: 1 << 20)

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

    assert newer.room is not reading.room
    store.close(reading)
    assert store.open((at(2), Part())) is None
    assert store.open((at(4), Part())) is None, "it is not whole"


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
