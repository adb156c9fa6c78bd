"""The proxy in front of an object store: forwards untouched, makes the faults asked for, keeps a record."""

from __future__ import annotations

import http.client
import time

import pytest
from s3fs import S3FileSystem

from jobs.bench.s3front import S3Front, data_bytes, most_in_flight

pytestmark = pytest.mark.processes
MIB = 1 << 20


@pytest.fixture
def fs(bucket):
    return S3FileSystem(use_listings_cache=False)


@pytest.fixture(scope="module")
def memory():
    with S3Front() as front:
        yield front


@pytest.fixture
def memory_fs(memory):
    fs = S3FileSystem(key="any", secret="any", endpoint_url=memory.url, use_listings_cache=False)
    fs.mkdir("box")
    memory.records()
    yield fs
    memory.clear()
    fs.rm("box", recursive=True)


def numbered(size: int) -> bytes:
    """Bytes in which every place can be told."""
    return b"".join(i.to_bytes(4, "little") for i in range(size // 4))


def behaves_like_s3(fs, root: str) -> None:
    """What both the real store behind the proxy and the one in memory must do."""
    whole = numbered(12 * MIB)
    fs.pipe_file(f"{root}/a/one object, spaced&named+<oddly>", whole)
    assert fs.cat_file(f"{root}/a/one object, spaced&named+<oddly>") == whole
    with fs.open(f"{root}/a/parts", "wb", block_size=5 * MIB) as f:  # a multipart upload
        f.write(whole)
    assert fs.cat_file(f"{root}/a/parts", start=5 * MIB - 8, end=5 * MIB + 8) == whole[5 * MIB - 8 : 5 * MIB + 8]
    assert fs.cat_file(f"{root}/a/parts", start=-4) == whole[-4:]
    assert fs.info(f"{root}/a/parts")["size"] == len(whole)
    fs.pipe_file(f"{root}/a/new", b"first", mode="create")
    with pytest.raises(OSError, match=r"pre-?conditions|File exists"):
        fs.pipe_file(f"{root}/a/new", b"second", mode="create")
    fs.copy(f"{root}/a/new", f"{root}/b/copied")
    assert fs.cat_file(f"{root}/b/copied") == b"first"
    fs.pipe({f"{root}/many/{i:02d}": b"x" for i in range(7)})
    assert [n.rpartition("/")[2] for n in fs.ls(f"{root}/many", detail=False)] == [f"{i:02d}" for i in range(7)]
    first_page = fs.call_s3("list_objects_v2", Bucket=root.removeprefix("s3://"), Prefix="many/", MaxKeys=3)
    assert (len(first_page["Contents"]), first_page["IsTruncated"]) == (3, True)
    assert [n.rpartition("/")[2] for n in fs.ls(f"{root}/a", detail=False)] == sorted(
        ["new", "one object, spaced&named+<oddly>", "parts"]
    )
    assert [n.rpartition("/")[2] for n in fs.ls(root, detail=False)] == ["a", "b", "many"]
    fs.rm(f"{root}/a", recursive=True)
    assert not any("/a/" in name for name in fs.find(root))
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{root}/a/new")


def test_what_goes_through_is_untouched(fs, bucket):
    behaves_like_s3(fs, bucket)


def test_the_store_in_memory_does_what_a_real_one_does(memory_fs):
    behaves_like_s3(memory_fs, "box")


def test_the_record_tells_methods_ranges_and_bytes(fs, bucket, front):
    fs.pipe_file(f"{bucket}/pack", numbered(3 * MIB))
    fs.cat_file(f"{bucket}/pack", start=MIB, end=2 * MIB)

    put, get = front.records()

    assert (put.method, put.key, put.status, put.sent_bytes) == ("PUT", f"/{bucket[5:]}/pack", 200, 3 * MIB)
    assert (get.method, get.status, get.range) == ("GET", 206, f"bytes={MIB}-{2 * MIB - 1}")
    assert data_bytes([put, get]) == get.received_bytes == MIB
    assert data_bytes([put, get], "PUT") == 3 * MIB
    assert most_in_flight([put, get]) == 1
    assert front.records() == []


def test_the_next_n_requests_are_told_to_slow_down_and_no_more(fs, bucket, front):
    front.fault(method="PUT", key="pack$", status=503, count=2)

    fs.pipe_file(f"{bucket}/other", b"x")
    fs.pipe_file(f"{bucket}/pack", b"whole")

    assert front.unused() == 0
    assert [r.status for r in front.records()] == [200, 503, 503, 200]
    assert fs.cat_file(f"{bucket}/pack") == b"whole"


def test_an_answer_is_delayed(fs, bucket, front):
    fs.pipe_file(f"{bucket}/pack", b"whole")
    front.fault(method="GET", delay_s=0.3)

    began = time.monotonic()
    assert fs.cat_file(f"{bucket}/pack") == b"whole"

    assert 0.3 <= time.monotonic() - began < 3
    assert [r.fault for r in front.records() if r.method == "GET"] == ["delay"]


@pytest.mark.parametrize("way", ["request", "response"])
def test_a_connection_is_cut_in_the_middle_of_a_body(way):
    data = numbered(4 * MIB)
    with S3Front() as memory:
        host = memory.url.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=10)
        for method, path, body in (("PUT", "/box", b""), ("PUT", "/box/pack", data)):
            connection.request(method, path, body)
            connection.getresponse().read()
        memory.fault(method="PUT" if way == "request" else "GET", cut=way, after_bytes=MIB)

        def move() -> None:
            connection.request("PUT" if way == "request" else "GET", "/box/pack", b"z" * len(data))
            connection.getresponse().read()

        with pytest.raises((ConnectionError, http.client.IncompleteRead)):
            move()

        records = {r.fault: r for r in memory.records()}
        moved = records[way].sent_bytes if way == "request" else records[way].received_bytes
        assert MIB <= moved < 2 * MIB
        connection.close()
        connection.request("GET", "/box/pack")
        assert connection.getresponse().read() == data, "a torn upload was kept"
        connection.close()
