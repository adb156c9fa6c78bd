"""The checkpoint engine on a real S3: what it asks for, and what it does when the store stumbles."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from s3fs import S3FileSystem

from elastic.errors import CheckpointError
from jobs.bench.s3front import data_bytes, most_in_flight
from tests.state_by_hand import load_state, save_state

pytestmark = pytest.mark.processes
MIB = 1 << 20
PARTS = 12  # of 5 MiB, the least that S3 takes, so that many go up together; the last one short


@pytest.fixture
def tensors():
    """56 MiB, every value another."""
    return {f"layer.{i}": torch.arange(7 * MIB // 4, dtype=torch.float32).view(7, -1) + i for i in range(8)}


@pytest.fixture
def url(bucket):
    return f"{bucket}/models"


def loads_right(url: str, tensors: dict[str, torch.Tensor]) -> None:
    found, manifest = load_state(url)
    assert manifest.step == 7
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def unfinished_uploads(url: str) -> list[str]:
    fs = S3FileSystem(use_listings_cache=False)
    bucket = url.removeprefix("s3://").partition("/")[0]
    return [u["Key"] for u in fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])]


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, f"waited 30 s until {what}"
        time.sleep(0.01)


def test_parts_go_up_together_and_every_byte_comes_down_once(url, tensors, front):
    size = sum(t.nbytes for t in tensors.values())

    save_state(url, 7, tensors)
    saved = [r for r in front.records() if "partNumber" in r.query]
    loads_right(url, tensors)
    loaded = [r for r in front.records() if r.key.endswith(".pack") and r.method == "GET"]

    assert sorted(int(r.query["partNumber"]) for r in saved) == list(range(1, PARTS + 1))
    assert most_in_flight(saved) > 1
    assert data_bytes(saved, "PUT") == size
    assert data_bytes(loaded) == size, "read amplification is not 1.00"
    assert all(r.range for r in loaded)
    assert unfinished_uploads(url) == []


def test_slow_downs_and_cuts_in_both_directions_are_overcome(url, tensors, front):
    front.fault(method="PUT", key="partNumber=1(&|$)", status=503)
    front.fault(method="PUT", key="partNumber=2(&|$)", cut="request", after_bytes=5 * MIB)
    front.fault(method="PUT", key="partNumber=3(&|$)", cut="response")
    front.fault(method="POST", key="uploadId=", cut="response")  # completed, and the answer lost
    front.fault(method="PUT", key="manifest.json", cut="response")
    save_state(url, 7, tensors)
    assert front.unused() == 0

    front.fault(method="GET", key=r"\.pack", status=503)
    front.fault(method="GET", key=r"\.pack", cut="response", after_bytes=3 * MIB)
    loads_right(url, tensors)

    assert front.unused() == 0
    assert unfinished_uploads(url) == []


@pytest.mark.timeout(180)
def test_a_server_restarted_during_a_save_and_during_a_load_is_waited_for(own_seaweed, url, tensors, front):
    with ThreadPoolExecutor(1) as pool:
        front.fault(method="PUT", key="partNumber=2(&|$)", delay_s=60, cut="response")
        saving = pool.submit(save_state, url, 7, tensors)
        wait_until(lambda: front.unused() == 0, "part 2 was on its way")
        own_seaweed.kill()
        own_seaweed.start()
        front.release()
        saving.result(120)

        front.fault(method="GET", key=r"\.pack", delay_s=60, cut="response")
        loading = pool.submit(loads_right, url, tensors)
        wait_until(lambda: front.unused() == 0, "a read was on its way")
        own_seaweed.kill()
        own_seaweed.start()
        front.release()
        loading.result(120)


def test_keys_that_expire_during_a_save_fail_it_in_one_sentence_and_leave_nothing(url, tensors, front):
    save_state(url, 7, tensors)
    front.fault(method="PUT", key="partNumber", status=400, code="ExpiredToken", count=1000)

    with pytest.raises(CheckpointError) as caught:
        save_state(url, 8, tensors)

    assert "\n" not in str(caught.value)
    assert "rank-0000.pack" in str(caught.value)
    front.clear()
    loads_right(url, tensors)
    assert unfinished_uploads(url) == []
