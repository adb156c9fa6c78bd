"""Files of a run: create-if-absent above all, on a local folder and in fsspec's memory file system."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from elastic.errors import ConfigError
from elastic.run.prepare import prepare
from elastic.storage import Storage
from tests.forked import configure
from tests.storage_contract import *  # noqa: F403
from tests.tiny_jobs import Plain


@pytest.fixture(params=["local", "file", "memory"])
def storage(request, tmp_path):
    if request.param == "memory":
        root = f"/{uuid.uuid4().hex}"
        yield Storage(f"memory:/{root}/runs")
        fsspec.filesystem("memory").rm(root, recursive=True) if fsspec.filesystem("memory").exists(root) else None
        return
    yield Storage(str(tmp_path / "runs") if request.param == "local" else f"file://{tmp_path}/runs")


@pytest.fixture
def folder(tmp_path):
    return Storage(str(tmp_path / "runs"))


def test_only_a_folder_can_append(folder):
    folder.append("deep/metrics.jsonl", b"one\n")
    folder.append("deep/metrics.jsonl", b"two\n")

    assert folder.can_append
    assert folder.read("deep/metrics.jsonl") == b"one\ntwo\n"
    for url in ("memory://never/written", "s3://never-written/runs"):
        other = Storage(url)
        assert not other.can_append
        with pytest.raises(AssertionError, match="cannot append"):
            other.append("metrics.jsonl", b"one\n")


_RACER = """
import sys
from elastic.storage import Storage
folder, rounds, racer = Storage(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
sys.stdin.readline()
for i in range(rounds):
    try:
        folder.create(f"claims/{i:06d}.json", racer.encode())
        print("won", i)
    except FileExistsError:
        pass
"""


def test_of_processes_that_race_to_create_a_file_exactly_one_wins(folder):
    rounds, racers = 50, 4
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, folder.url, str(rounds), str(racer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for racer in range(racers)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"

    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    wins = [child.communicate(timeout=60)[0].splitlines() for child in children]

    assert sorted(line for won in wins for line in won) == sorted(f"won {i}" for i in range(rounds))
    for racer, won in enumerate(wins):
        for line in won:
            assert folder.read(f"claims/{int(line.split()[1]):06d}.json") == str(racer).encode()


def test_a_reader_sees_the_old_or_the_new_bytes_while_they_are_replaced(folder):
    old, new = b"a" * 200_000, b"b" * 300_000
    folder.replace("status.json", old)
    done = threading.Event()

    def write() -> None:
        for i in range(40):
            folder.replace("status.json", new if i % 2 == 0 else old)
        done.set()

    seen = set()
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        while not done.is_set() and not writer.done():
            seen.add(folder.read("status.json"))
        writer.result()

    assert seen <= {old, new}
    assert folder.names() == ["status.json"]


def test_a_place_that_cannot_be_written_is_refused_with_the_option_and_the_reason(tmp_path):
    (tmp_path / "file").write_text("not a folder")

    for url in ("/dev/null/runs", str(tmp_path / "file" / "runs"), "/proc/nowhere"):
        with pytest.raises(ConfigError) as caught:
            Storage(url).probe()
        assert str(caught.value).startswith(f"--run.storage is '{url}', which cannot write: ")
        assert str(caught.value).endswith("give a place that you may write to")


def test_a_storage_whose_create_overwrites_is_refused(folder, monkeypatch):
    monkeypatch.setattr(folder, "create", folder.replace)

    with pytest.raises(ConfigError, match=r"cannot refuse to create an existing file: .*a second create overwrote"):
        folder.probe()


def test_a_storage_that_gives_back_other_bytes_is_refused(folder, monkeypatch):
    monkeypatch.setattr(folder, "read", lambda name: b"else")

    with pytest.raises(ConfigError, match=r"cannot read back: .*other bytes came back"):
        folder.probe()


@pytest.mark.parametrize("url", ["ftp://host/runs", "http://host/runs", "hdfs://runs", "what://"])
def test_a_scheme_without_atomic_create_is_refused_by_name(url):
    with pytest.raises(ConfigError) as caught:
        Storage(url)

    text = str(caught.value)
    assert f"'{url}'" in text
    assert repr(url.partition(":")[0]) in text
    assert "s3://" in text


@pytest.mark.parametrize(
    ("scheme", "package"),
    [("gs", "gcsfs"), ("gcs", "gcsfs"), ("az", "adlfs"), ("abfs", "adlfs"), ("abfss", "adlfs"), ("s3", "s3fs")],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(scheme, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed, also where it is
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)  # loaded before
    config = configure(f"{scheme}://box/runs", "run")

    with pytest.raises(ConfigError) as caught:
        prepare(Plain(), config)

    text = str(caught.value)
    assert text.startswith(f"--run.storage is '{scheme}://box/runs', which needs `pip install {package}` (")
    assert "\n" not in text


def test_a_run_in_the_memory_of_one_process_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--run.storage is 'memory://runs', which only one process can see"):
        prepare(Plain(), configure("memory://runs", "run"))


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links_is_refused_by_name(code, folder, monkeypatch):
    """FAT, and some that are mounted over a network, answer so."""

    def no_links(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", no_links)

    with pytest.raises(ConfigError) as caught:
        folder.probe()

    text = str(caught.value)
    assert "which cannot create files atomically: StorageError: this file system has no hard links" in text
    assert text.endswith("give a local disk, NFS, or a store with conditional writes (If-None-Match)")
    assert folder.names() == []


def test_a_relative_folder_is_meant_from_where_the_command_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    storage = Storage("runs")

    assert storage.url == str(tmp_path / "runs")
    monkeypatch.chdir("/")
    storage.create("x", b"here")
    assert (Path(tmp_path) / "runs" / "x").read_bytes() == b"here"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3:/bucket/runs", "has no '://' and would be a local folder; write s3://bucket/runs"),
        ("gs:bucket", "write gs://bucket"),
        ("file:/tmp/runs", "write file:///tmp/runs"),
        ("s3://", "names no bucket; write s3://bucket/folder"),
        ("s3:///runs", "empty name between two slashes; write s3://runs"),
        ("s3://bucket//runs", "has an empty name between two slashes; write s3://bucket/runs"),
        ("~nosuchuser/runs", "there is no user 'nosuchuser' on this machine"),
        ("file://host/runs", "names a host or a relative folder; write file:///folder"),
        ("file://", "names no folder"),
        ("", "names no place"),
        (" ", "names no place"),
    ],
)
def test_a_place_that_cannot_be_meant_is_refused_with_what_to_write(url, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Storage(url)
    assert str(caught.value).startswith(f"--run.storage is {url!r}, ")


def test_places_that_are_meant_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Storage("runs").root == str(tmp_path / "runs")
    assert Storage(f"file://{tmp_path}/runs").root == f"{tmp_path}/runs"
    assert Storage("C:runs").root == str(tmp_path / "C:runs")
    assert Storage("s3://bucket/runs/").root == "bucket/runs"


def test_a_relative_folder_inside_a_package_of_ray_s_is_refused(tmp_path, monkeypatch):
    """Which would be another folder as soon as a line of the job has changed."""
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0b8f9500d23d1573"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    with pytest.raises(ConfigError, match=r"--run.storage is 'runs', a folder inside the package that Ray made"):
        prepare(Plain(), configure("runs", "run"))
    assert prepare(Plain(), configure(tmp_path / "runs", "run")).folder.storage.root == f"{tmp_path}/runs/run"
