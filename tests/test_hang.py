"""A user function that blocks: its worker is named, everyone's stacks are saved, it is evicted, and the run goes on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic.run.prepare import prepare
from tests.forked import LONG, WAIT_S, Ran, Watch, configure, local_run, sample_at
from tests.tiny_jobs import Everything

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]

HELD = "FAULTS[fault](self.fault_file)"  # in tests.tiny_jobs


def test_a_blocked_worker_is_named_and_evicted_with_its_stacks_saved_and_the_bits_stay(tmp_path, undisturbed_epoch):
    held, watch = tmp_path / "held", Watch()
    held.touch()
    job = Everything(samples=LONG, fault="hold", fault_at=sample_at(5), fault_file=str(held))
    config = configure(tmp_path, "run", recovery__hang_timeout="2s")
    run = prepare(job, replace(config, scaling=replace(config.scaling, max_workers=3)))
    with local_run(run, 3, on_record=watch) as local:
        evicted = watch.wait_for(lambda record: record.get("kind") == "member_evicted")
        held.unlink()
        local.wait(WAIT_S)
    ran = Ran(run, None)

    assert evicted["step"] == 5
    assert evicted["detail"].startswith("hung in ")
    assert ran.column("sample_hash") == undisturbed_epoch.column("sample_hash")
    assert ran.sha == undisturbed_epoch.sha
    stacks = {
        name.split("-", 1)[1]: ran.storage.read(f"stacks/{name}").decode() for name in ran.storage.names("stacks")
    }
    assert len(stacks) == 3
    assert HELD in stacks[f"{evicted['member']}.txt"]
    assert not any(HELD in text for name, text in stacks.items() if name != f"{evicted['member']}.txt")
    assert not ran.events("member_late")
