"""What every storage of a run does. Test modules take these tests over, each with a fixture `storage` of its own."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest


def test_what_was_created_is_read_back_whole_and_in_ranges(storage):
    storage.create("a/b/pack", b"0123456789")

    assert storage.read("a/b/pack") == b"0123456789"
    assert storage.read("a/b/pack", 2, 5) == b"234"
    assert storage.read("a/b/pack", 7) == b"789"
    assert storage.read("a/b/pack", 8, 100) == b"89"
    assert storage.size("a/b/pack") == 10
    assert storage.exists("a/b/pack")


def test_a_second_create_is_refused_and_changes_nothing(storage):
    storage.create("manifest.json", b"first")

    with pytest.raises(FileExistsError):
        storage.create("manifest.json", b"second, and longer")

    assert storage.read("manifest.json") == b"first"
    assert storage.names() == ["manifest.json"]


def test_replace_writes_over_what_was_there(storage):
    storage.replace("status.json", b"long long ago")

    storage.replace("status.json", b"now")

    assert storage.read("status.json") == b"now"
    assert storage.names() == ["status.json"]


def test_what_is_not_there_is_said_to_be_not_there(storage):
    with pytest.raises(FileNotFoundError):
        storage.read("nothing")
    with pytest.raises(FileNotFoundError):
        storage.read("no/folder/either", 0, 4)

    assert not storage.exists("nothing")
    assert storage.names() == []
    assert storage.names("no/folder") == []
    storage.remove("nothing")


def test_names_are_those_directly_inside_sorted(storage):
    for name in ("b/2", "b/1", "a", "b/c/3"):
        storage.create(name, b"x")

    assert storage.names() == ["a", "b"]
    assert storage.names("b") == ["1", "2", "c"]
    assert storage.child("b").names() == ["1", "2", "c"]
    assert storage.child("b").read("c/3") == b"x"


def test_a_folder_is_removed_whole_and_only_it(storage):
    for name in ("steps/1/pack", "steps/1/manifest.json", "steps/10/pack"):
        storage.create(name, b"x")

    storage.remove("steps/1")
    storage.remove("steps/10/pack")

    assert not storage.exists("steps/1/pack")
    assert not storage.exists("steps/10/pack")
    assert storage.names("steps/1") == []
    if not storage.url.startswith("s3:"):  # the S3 of these tests lists an empty folder for a while; S3 itself has none
        assert "1" not in storage.names("steps")


def test_an_upload_is_the_file_s_bytes(storage, tmp_path):
    file = tmp_path / "events.tfevents"
    file.write_bytes(bytes(range(256)))

    storage.upload("tensorboard/events", str(file))

    assert storage.read("tensorboard/events") == bytes(range(256))


def test_a_place_that_can_be_written_passes_the_probe_and_stays_empty(storage):
    storage.probe()

    assert storage.names() == []


def test_of_threads_that_race_to_create_a_file_exactly_one_wins(storage):
    rounds, racers = 4 if storage.url.startswith("s3:") else 50, 4
    barrier = threading.Barrier(racers)

    def race(racer: int) -> list[int]:
        won = []
        for i in range(rounds):
            barrier.wait(30)
            try:
                storage.create(f"claims/{i:06d}.json", f"racer {racer} round {i}".encode())
            except FileExistsError:
                continue
            won.append(i)
        return won

    with ThreadPoolExecutor(racers) as pool:
        wins = list(pool.map(race, range(racers)))

    assert sorted(i for won in wins for i in won) == list(range(rounds))
    for racer, won in enumerate(wins):
        for i in won:
            assert storage.read(f"claims/{i:06d}.json") == f"racer {racer} round {i}".encode()
    if storage.local:
        assert sorted(os.listdir(storage.path("claims"))) == storage.names("claims"), "temporary files are left"
