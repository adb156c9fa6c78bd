"""Which cluster a command joins."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic.cluster import gcs
from elastic.cluster.embedded import check_answers, preflight, running_cluster, where_text
from elastic.cluster.examining import examine_cluster
from elastic.config import ClusterOptions, ScalingOptions
from elastic.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `ray start` leaves an address."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "ray_current_cluster"
    monkeypatch.setattr(gcs, "address_file", lambda: path)
    return path


@pytest.fixture
def answering() -> Iterator[str]:
    """The address of something that answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_the_cluster_that_ray_start_left_is_joined_if_it_answers(file, answering):
    assert running_cluster(None) is None
    file.write_text(answering + "\n")
    assert running_cluster(None) == answering
    assert running_cluster("other:1") == "other:1"
    with socket.create_server(("127.0.0.1", 0)) as gone:
        file.write_text(f"127.0.0.1:{gone.getsockname()[1]}")
    assert running_cluster(None) is None
    file.write_text("no address")
    assert running_cluster(None) is None
    with pytest.raises(ConfigError, match=r"^--address is 'auto', but no Ray cluster runs on this machine"):
        examine_cluster("auto", ())


def test_the_cluster_of_another_user_is_not_joined(file, answering, monkeypatch):
    file.write_text(answering)
    monkeypatch.setattr(os, "getuid", lambda: file.stat().st_uid + 1)
    assert running_cluster(None) is None


@pytest.mark.parametrize("before", [None, "10.0.0.1:6379"])
def test_a_cluster_of_several_local_nodes_is_found_by_nobody_else(file, before):
    if before:
        file.write_text(before)
    with gcs.found_cluster_kept():
        file.write_text("own:1")
    assert (file.read_text() if file.exists() else None) == before


def test_the_first_lines_say_where_a_run_goes():
    assert where_text("a:1") == "in the Ray cluster at a:1"
    assert where_text(None) == "with a Ray of its own on this machine"


def test_an_address_that_does_not_answer_is_refused_before_anything_starts():
    check_answers("auto")
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = f"127.0.0.1:{server.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"is '{gone}', where no Ray cluster answers .*; give the host and port"):
        preflight(ClusterOptions(address=gone), ScalingOptions())
    with pytest.raises(ConfigError, match=f"^--address is '{gone}', where no Ray cluster answers"):
        examine_cluster(gone, ())


def test_of_a_cluster_that_was_found_the_own_token_is_used_and_what_is_none_is_refused_soon(answering, tmp_path):
    """In a process of its own: Ray reads how to prove who one is once, and its client waits long after we do not."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(answering)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("mine")
    program = (
        "import os, sys\nfrom elastic.cluster import embedded\n"
        "from elastic.config import ClusterOptions, ScalingOptions\n"
        "check, embedded.check_answers = embedded.check_answers, lambda address: None\n"
        "for given in ('other:1', None):\n"
        "    address = embedded.preflight(ClusterOptions(address=given), ScalingOptions())\n"
        "    print(address, os.environ.get('RAY_AUTH_MODE'), flush=True)\n"
        "check(address, 0.3)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment, "HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path)},
    )
    assert ran.stdout.splitlines() == ["other:1 None", f"{answering} token"]
    assert ran.stderr.splitlines()[-1] == (
        f"elastic.errors.ConfigError: --cluster.address is '{answering}': what listens there does not answer as the "
        "head of a Ray cluster does (TimeoutError: no answer within 0.3 s); give the host and port of its head, or "
        "leave it out for a Ray of this machine's own"
    )
    assert "Token authentication" not in ran.stderr
