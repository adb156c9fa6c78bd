"""Files of a run on a real S3, beyond what every storage does (`test_storage`): faults, races, wrong keys."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elastic.errors import ConfigError
from elastic.run.folder import RunFolder
from elastic.storage import Storage
from jobs.bench.seaweed import credentials
from tests.storage_contract import *  # noqa: F403

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parent.parent


@pytest.fixture
def storage(bucket):
    return Storage(f"{bucket}/runs")


def as_user(monkeypatch, user: str, secret: str | None = None) -> None:
    from s3fs import S3FileSystem

    for name, value in credentials(user).items():
        monkeypatch.setenv(name, value)
    if secret is not None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    S3FileSystem.clear_instance_cache()


def test_what_another_process_wrote_is_seen_at_once(storage):
    assert storage.names() == []
    code = "import sys; from elastic.storage import Storage; Storage(sys.argv[1]).create('there', b'x')"

    subprocess.run([sys.executable, "-c", code, storage.url], check=True, timeout=60, cwd=ROOT)

    assert storage.names() == ["there"]
    assert storage.exists("there")


def test_of_two_drivers_that_claim_a_run_at_one_moment_one_is_refused(storage):
    folders = [RunFolder(storage.child("run")) for _ in range(2)]
    barrier = threading.Barrier(2)

    def claim(folder: RunFolder) -> int | str:
        folder.newest_epoch()
        barrier.wait(30)
        try:
            return folder.claim(take_over=False)
        except ConfigError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(claim, folders))

    epochs = [o for o in outcomes if isinstance(o, int)]
    assert len(epochs) == len(set(epochs)), "two drivers hold one claim"
    refused = ("claimed by another driver", "which claimed it 0 s ago", "which claimed it 1 s ago")
    assert len(epochs) == 1, "the second is refused, whether it saw the first or came at the same moment"
    assert all(any(way in o for way in refused) for o in outcomes if isinstance(o, str))
    assert storage.child("run").names("claims") == [f"{e:06d}.json" for e in sorted(epochs)]


def test_slow_down_is_answered_with_patience(storage, front):
    front.fault(method="PUT", status=503, count=1)
    storage.create("pack", b"whole")
    front.fault(method="GET", status=503, count=1)

    assert storage.read("pack") == b"whole"
    assert front.unused() == 0


def test_a_body_cut_on_its_way_is_sent_again(storage, front):
    data = bytes(range(256)) * 8192
    front.fault(method="PUT", cut="request", after_bytes=1 << 20)
    storage.create("pack", data)
    front.fault(method="GET", key="pack$", cut="response", after_bytes=1 << 20)

    assert storage.read("pack", 0, len(data)) == data
    assert front.unused() == 0


def test_a_create_whose_answer_was_lost_is_not_taken_for_somebody_else_s(storage, front):
    front.fault(method="PUT", cut="response")

    storage.create("manifest.json", b"ours")

    assert front.unused() == 0
    assert [r.status for r in front.records() if r.method == "PUT"] == [200, 412], "the store did not keep the first"
    with pytest.raises(FileExistsError):
        storage.create("manifest.json", b"another's")


def test_a_bad_request_is_no_file_that_exists(bucket):
    with pytest.raises(OSError, match=r".") as caught:
        Storage(f"{bucket}/runs").create("x" * 5000, b"a key that is too long")
    assert not isinstance(caught.value, FileExistsError)


def refusal(url: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Storage(url).probe()
    return str(caught.value)


def test_wrong_keys_are_refused_in_one_sentence(bucket, monkeypatch):
    as_user(monkeypatch, "admin", secret="not the secret")
    wrong_secret = refusal(f"{bucket}/runs")
    as_user(monkeypatch, "nobody")
    unknown_key = refusal(f"{bucket}/runs")
    as_user(monkeypatch, "reader")
    read_only = refusal(f"{bucket}/runs")

    for text in (wrong_secret, unknown_key, read_only):
        assert text.startswith(f"--run.storage is '{bucket}/runs', which cannot write: PermissionError")
        assert "\n" not in text
        assert len(text) < 400


def test_a_missing_bucket_is_refused_in_one_sentence(front):
    text = refusal(f"s3://no-such-{uuid.uuid4().hex[:8]}/runs")

    assert "which cannot write: FileNotFoundError" in text
    assert "bucket" in text
    assert "\n" not in text


def test_an_endpoint_where_nobody_listens_is_refused_in_one_sentence(front, monkeypatch):
    from s3fs import S3FileSystem

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    S3FileSystem.clear_instance_cache()

    text = refusal("s3://box/runs")

    assert "which cannot write: " in text
    assert "http://127.0.0.1:9" in text
    assert "\n" not in text


@pytest.mark.parametrize("named", [(), ("--run.name", "mine")])
def test_a_command_with_wrong_keys_exits_2_with_that_sentence(bucket, monkeypatch, named):
    as_user(monkeypatch, "admin", secret="not the secret")

    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "elastic.worker",
            "--module",
            "jobs.bench.steady",
            "--workers",
            "1",
            "--run.storage",
            f"{bucket}/runs",
            *named,
        ],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
    )

    assert ended.returncode == 2, ended.stderr[-2000:]
    assert len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ended.stderr.startswith(f"error: --run.storage is '{bucket}/runs")
    assert "PermissionError" in ended.stderr
