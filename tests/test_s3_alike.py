"""Stores that speak S3 without being Amazon's, and how they are named: variables, fsspec's files, hosts and ports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elastic.errors import ConfigError
from elastic.storage import Storage
from jobs.bench.s3front import S3Front
from tests.state_by_hand import load_state, save_state

pytestmark = [pytest.mark.processes, pytest.mark.long]
ROOT = Path(__file__).parent.parent
MIB = 1 << 20


@pytest.fixture(scope="module")
def store() -> Iterator[S3Front]:
    with S3Front() as front:
        yield front


@pytest.fixture
def box(store: S3Front, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of the store, which the environment names by its host's name, as people do."""
    from s3fs import S3FileSystem

    for name, value in {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{store.port}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    S3FileSystem.clear_instance_cache()
    fs = S3FileSystem(use_listings_cache=False)
    fs.mkdir("box")
    store.records()
    yield "s3://box"
    store.clear()
    store.release()
    fs.rm("box", recursive=True)
    S3FileSystem.clear_instance_cache()


def test_a_store_on_a_host_of_ones_own_keeps_checkpoints(box: str, store: S3Front) -> None:
    state = {"w": torch.arange(3 * MIB, dtype=torch.float32)}
    storage = Storage(f"{box}/runs")
    storage.probe()

    save_state(storage.url, 1, state)

    assert torch.equal(load_state(storage.url)[0]["w"], state["w"])
    assert {r.key.split("/")[1] for r in store.records()} == {"box"}, "buckets are in the path, not in the host's name"


def test_a_store_that_does_not_heed_if_none_match_is_found_out_before_anything_starts(box: str, store: S3Front) -> None:
    store.fault(method="PUT", ignored="if-none-match", count=1000)

    with pytest.raises(ConfigError) as caught:
        Storage(f"{box}/runs").probe()

    text = str(caught.value)
    assert text.startswith(f"--run.storage is '{box}/runs', which cannot refuse to create an existing file: ")
    assert "a second create overwrote the first" in text
    assert text.endswith("a store with conditional writes (If-None-Match)")
    assert "\n" not in text
    assert Storage(f"{box}/runs").names() == [], "nothing is left of the try"


def test_a_store_that_does_not_know_conditional_writes_is_refused_in_one_sentence(box: str, store: S3Front) -> None:
    store.fault(method="PUT", status=501, code="NotImplemented", count=1000)

    with pytest.raises(ConfigError) as caught:
        Storage(f"{box}/runs").probe()

    assert "which cannot write: " in str(caught.value)
    assert "\n" not in str(caught.value)


_USE = """
import sys, torch
from tests.state_by_hand import load_state, save_state
save_state(sys.argv[1], 3, {"w": torch.arange(9)})
assert load_state(sys.argv[1])[0]["w"].tolist() == list(range(9))
"""


@pytest.mark.parametrize("way", ["file", "variables"])
def test_endpoint_and_keys_may_come_from_fsspec_s_own_configuration(
    way: str, box: str, store: S3Front, tmp_path: Path
) -> None:
    """Of a process whose environment has nothing of Amazon's; its uploader is another process still."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    own |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    if way == "file":
        (tmp_path / "conf").mkdir()
        settings = {"endpoint_url": store.url, "key": "any", "secret": "any", "config_kwargs": {"read_timeout": 7}}
        (tmp_path / "conf" / "s3.json").write_text(json.dumps({"s3": settings}))
        own["FSSPEC_CONFIG_DIR"] = str(tmp_path / "conf")
    else:
        own |= {"FSSPEC_S3_ENDPOINT_URL": store.url, "FSSPEC_S3_KEY": "any", "FSSPEC_S3_SECRET": "any"}

    done = subprocess.run(
        [sys.executable, "-c", _USE, f"{box}/{way}"], env=own, cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stderr
    assert [r.key for r in store.records() if r.method == "PUT" and r.key.endswith("manifest.json")]


def test_options_of_a_client_in_fsspec_s_files_are_kept_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.config import conf

    from elastic.storage import _options

    given = {"read_timeout": 7, "max_pool_connections": 5, "s3": {"addressing_style": "virtual"}}
    monkeypatch.setitem(conf, "s3", {"config_kwargs": given})

    found = _options("s3")["config_kwargs"]

    assert (found["read_timeout"], found["max_pool_connections"]) == (7, 5)
    assert found["s3"] == {"payload_signing_enabled": False, "addressing_style": "virtual"}


@pytest.mark.parametrize("status", [500, 504])
def test_whatever_a_busy_store_answers_is_met_with_patience(box: str, store: S3Front, status: int) -> None:
    code = {500: "InternalError", 504: "GatewayTimeout"}[status]
    state = {"w": torch.arange(MIB, dtype=torch.float32)}

    store.fault(method="PUT", key="rank-0000.pack", status=status, code=code, count=2)
    store.fault(method="PUT", key="manifest.json", status=status, code=code)
    save_state(f"{box}/runs", 1, state)
    store.fault(method="GET", key="rank-0000.pack", status=status, code=code, count=2)

    assert torch.equal(load_state(f"{box}/runs")[0]["w"], state["w"])
    assert store.unused() == 0


def test_slow_answers_cost_time_and_those_that_never_come_are_asked_for_again(
    box: str, store: S3Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSSPEC_S3_CONFIG_KWARGS", '{"read_timeout": 2}')  # which the uploader's process reads
    from fsspec.config import conf

    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": 2}})
    state = {"w": torch.arange(4 * MIB, dtype=torch.float32)}
    began = time.monotonic()

    store.fault(method="PUT", key="partNumber=1(&|$)", delay_s=0.5)
    store.fault(method="PUT", key="partNumber=2(&|$)", delay_s=60)
    save_state(f"{box}/runs", 1, state)
    store.fault(method="GET", key="rank-0000.pack", delay_s=0.5)
    store.fault(method="GET", key="rank-0000.pack", delay_s=60)
    loaded, _ = load_state(f"{box}/runs")

    assert torch.equal(loaded["w"], state["w"])
    assert store.unused() == 0
    assert time.monotonic() - began < 30, "it waited for answers that never come"
