"""The check behind every test: it sees what a test leaves behind, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests import leaks


def _found(before: leaks.Snapshot, **options: bool) -> str:
    return " ".join(leaks.compare(before, leaks.take(), **options))


def test_nothing_done_leaves_nothing():
    before = leaks.take()

    assert leaks.compare(before, leaks.take()) == []


def test_a_child_process_and_its_own_child_are_seen_until_they_end():
    before = leaks.take()
    grandchild = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", grandchild], stdout=subprocess.PIPE, text=True) as child:
        sleeper = int(child.stdout.readline())
        while leaks._command_line(sleeper) != "sleep 60":
            pass  # it has become that program, and has no arguments yet

        found = _found(before)

        child.kill()
        subprocess.run(["kill", str(sleeper)], check=True)
    assert f"process {child.pid} is still running" in found
    assert f"process {sleeper} is still running: sleep 60" in found
    assert leaks.wait_until_clean(before) == []


def test_a_thread_counts_if_it_keeps_the_process_alive_or_is_ours():
    before, end = leaks.take(), threading.Event()
    threads = [
        threading.Thread(target=end.wait, name="forgotten"),
        threading.Thread(target=end.wait, name="run-keeper", daemon=True),
        threading.Thread(target=end.wait, name="somebody-elses-daemon", daemon=True),
    ]
    for thread in threads:
        thread.start()

    found, found_with_ray = _found(before), _found(before, ray=True)

    end.set()
    for thread in threads:
        thread.join()
    assert "thread forgotten" in found
    assert "thread run-keeper" in found
    assert "somebody" not in found
    assert found_with_ray == "thread run-keeper is still running"


def test_a_changed_variable_is_seen(monkeypatch):
    before = leaks.take()
    monkeypatch.setenv("RAY_SOMETHING", "1")
    assert _found(before, ray=True) == ""

    monkeypatch.setenv("MASTER_ADDR", "here")

    assert "environment variable MASTER_ADDR was None and is 'here'" in _found(before)
    assert "RAY_SOMETHING" in _found(before)


def test_a_file_with_our_prefix_in_the_temporary_folder_is_seen():
    before = leaks.take()
    with tempfile.NamedTemporaryFile(prefix="elastic-") as file, tempfile.NamedTemporaryFile(prefix="other-"):
        assert _found(before) == f"{Path(file.name).name} is left in the temporary folder"


def test_a_process_group_is_seen():
    import torch.distributed as dist

    before = leaks.take()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert _found(before) == "the torch.distributed process group is still initialised"
    finally:
        dist.destroy_process_group()
