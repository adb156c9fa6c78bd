"""What saving takes of memory: one state to stage, however many saves there are and however slow storage is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from elastic.checkpoint.saver import Saver
from elastic.checkpoint.tensors import Shard
from elastic.storage import Storage
from tests import forked
from tests.forked import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.usefixtures("fork_server")]
MIB = 1 << 20
STATE = 96 * MIB
SLACK = 64 * MIB


def kept(pid: int, *fields: str) -> int:
    """Bytes of memory of a process: RssAnon is its own, RssShmem is shared with others."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith(("Rss", "VmHWM"))}
    return sum(found[field] for field in fields)


def _save_often(url: str, said: str) -> None:
    """Three saves, while the uploader waits at each."""
    held = Path(said).with_name("held")
    hold = {"point": "upload.before_complete", "do": "hold", "file": str(held)}
    os.environ["ELASTIC_FAULTS"] = json.dumps([{**hold, "step": step} for step in (1, 2, 3)])
    tensor = torch.ones(STATE // 4)
    shards = [Shard.whole("t", tensor, stable=True)]
    before, seen, saver = kept(os.getpid(), "RssAnon", "RssShmem"), [], Saver(Storage(url))
    try:
        for step in (1, 2, 3):
            held.touch()
            saver.start(step, "1-1-1", shards)
            saver.settle()
            uploader = saver._uploader
            assert uploader is not None
            pid = uploader._process.pid
            wait_until(lambda pid=pid: kept(pid, "RssShmem") >= STATE, "the uploader to have read all of the state")
            seen.append([kept(os.getpid(), "RssAnon", "RssShmem") - before, kept(pid, "RssAnon")])
            held.unlink()
            assert saver.wait(60).error is None
    finally:
        saver.close()
    Path(said).write_text(json.dumps(seen))


def test_memory_stays_that_of_one_staged_state(tmp_path):
    process = forked._context.Process(target=_save_often, args=(str(tmp_path / "run"), str(tmp_path / "said")))
    process.start()
    process.join(100)

    assert process.exitcode == 0
    for worker, uploader in json.loads((tmp_path / "said").read_text()):
        assert STATE <= worker <= STATE + SLACK, "more than one staged state"
        assert uploader <= SLACK, "the uploader copies what it sends"
