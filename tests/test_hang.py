"""A user function that blocks: its worker is named, everyone's stacks are saved, it is evicted, and the run goes on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from elastic.run.prepare import prepare
from tests.forked import LONG, WAIT_S, Ran, Watch, configure, local_run, sample_at
from tests.tiny_jobs import FAULTS, Everything, Plain

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


@dataclass
class SlowToEvaluate(Plain):
    """Its evaluate() does not return while there is a file."""

    def evaluate(self, model, batch):
        if self.fault_file:
            FAULTS["hold"](self.fault_file)
        return self.loss(model, batch)


def test_an_evaluation_or_its_trial_that_stands_still_is_named_after_one_time_out_with_stacks(tmp_path):
    held, watch = tmp_path / "held", Watch()
    held.touch()
    config = configure(tmp_path, "run", run__duration="2st", recovery__hang_timeout="1s", parallel__strategy="fsdp")
    run = prepare(SlowToEvaluate(fault_file=str(held)), replace(config, scaling=replace(config.scaling, max_workers=2)))
    with local_run(run, 2, on_record=watch) as local:
        told = watch.wait_for(lambda record: record.get("kind") == "slow_evaluation")
        held.unlink()
        local.wait(WAIT_S)
    ran = Ran(run, None)

    assert told["detail"].startswith(
        "a batch takes more than 1 s in eval: a trial of evaluate() on eval_data()['near'] before the first step; it "
        "is waited for up to 10 s"
    )
    assert 'FAULTS["hold"](self.fault_file)' in ran.storage.read(f"stacks/{ran.storage.names('stacks')[0]}").decode()
    assert (ran.result["status"], len(ran.events("slow_evaluation"))) == ("finished", 1)
    assert not ran.events("world_stalled")
