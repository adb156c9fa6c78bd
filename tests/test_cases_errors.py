"""What goes wrong in a job's own code is told as what it is: where, in which sample, and never as a lost peer."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import tempfile
import threading
from multiprocessing import process
from multiprocessing.connection import Connection

import pytest

from elastic.data.fetching import Fetcher, ItemError, Order
from elastic.data.loader import Loader
from elastic.errors import ConfigError, RunFailed
from elastic.observe.ledger import gaps_and_doubles
from elastic.run.prepare import prepare
from tests import leaks
from tests.error_jobs import Backward, Items, OnOneNode
from tests.forked import (
    LONG,
    WAIT_S,
    B,
    Ran,
    Watch,
    configure,
    fault,
    fork,
    local_run,
    plan,
    sample_at,
    train,
    wait_until,
)
from tests.tiny_jobs import Plain, Samples

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]

STEP, MICROBATCH = 3, 2
SAMPLE = sample_at(STEP, MICROBATCH)
WORDS = "could not read img.png: connection to the object store was reset by its peer"


def failures(ran: Ran) -> list[str]:
    """What the events say of each error, without its traceback."""
    return [event["detail"].splitlines()[0] for event in ran.events("worker_failed")]


@pytest.mark.parametrize(("workers", "loaders"), [(2, 0), (1, 1)])
def test_an_item_that_raises_is_named_with_worker_step_microbatch_and_sample(workers, loaders, tmp_path):
    job = Items(samples=LONG, fault="corrupt", fault_at=SAMPLE, fault_file="corrupt jpeg")

    ran = train(job, configure(tmp_path, "run", data__workers=loaders, run__max_failures=1), workers=workers)

    told = (
        f"worker w1-0 (rank 0 of {workers}) failed at step 3, microbatch 2, sample {SAMPLE}: ValueError: corrupt jpeg"
    )
    assert failures(ran) == [told, told]
    assert ran.failure is not None
    assert ran.failure.startswith(f"{told}\nTraceback")
    assert "error_jobs.py" in ran.failure
    assert ran.failure.endswith("ValueError: corrupt jpeg")
    assert ran.column("step") == [1, 2]
    assert [e["step"] for e in ran.events("checkpoint_committed")] == [2]


@pytest.mark.parametrize(("workers", "loaders"), [(1, 0), (1, 1)])
def test_an_item_whose_error_sounds_like_the_network_is_the_jobs_error(workers, loaders, tmp_path):
    job = Items(samples=LONG, fault="raise", fault_at=SAMPLE, fault_file=WORDS)

    ran = train(job, configure(tmp_path, "run", data__workers=loaders, run__max_failures=1), workers=workers)

    told = f"worker w1-0 (rank 0 of 1) failed at step 3, microbatch 2, sample {SAMPLE}: RuntimeError: {WORDS}"
    assert failures(ran) == [told, told]
    assert ran.failure is not None
    assert ran.failure.startswith(told)


@pytest.mark.parametrize("exactness", ["bitwise", "fast"])
def test_an_error_in_a_backward_pass_is_an_error_whatever_it_says(exactness, tmp_path):
    job = Backward(samples=LONG, fault_at=SAMPLE)
    options = {"run__max_failures": 1, "run__exactness": exactness, "batch__pass_size": 3}

    ran = train(job, configure(tmp_path, "run", **options), workers=2)

    assert ran.failure is not None
    first = ran.failure.splitlines()[0]
    assert first.startswith("worker w1-0 (rank 0 of 2) failed at step 3, microbatch 2, samples ")
    assert f"{SAMPLE}" in first
    assert first.endswith(f": RuntimeError: {job.text}")
    assert failures(ran) == [first, first]
    assert len(ran.events("world_formed")) == 3


def test_a_slow_item_is_waited_for_and_named(tmp_path):
    """Six times the hang time-out: whoever were given the microbatch instead would have to wait for it as well."""
    held, watch = tmp_path / "held", Watch()
    held.touch()
    job = Items(samples=LONG, fault="hold", fault_at=SAMPLE, fault_file=str(held))
    run = prepare(job, configure(tmp_path, "run", recovery__hang_timeout="0.5s", scaling__max_workers=2))
    with local_run(run, 2, on_record=watch) as local:
        slow = watch.wait_for(
            lambda record: record.get("kind") == "slow_data" and f"sample {SAMPLE};" in record["detail"]
        )
        held.unlink()
        local.wait(WAIT_S)
    ran = Ran(run, None)

    assert slow["member"] == "w1-0"
    assert slow["detail"] == (
        f"the training data takes more than 0.5 s for step 3, microbatch 2, sample {SAMPLE}; it is waited for up to "
        "30 s, which is 60 times --recovery.hang-timeout"
    )
    assert sum(f"sample {SAMPLE};" in e["detail"] for e in ran.events("slow_data")) == 1
    assert len(ran.events("world_formed")) == 1
    assert ran.column("world_size") == [2] * 12


# ---- one worker, or all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "strategy", "why"),
    [
        ("SICK", "ddp", "left out: it failed 2 times at one step"),
        ("SICK", "fsdp", "left out: it failed 2 times at one step"),
        ("MORE_DATA", "ddp", "worker w1-2 could not get ready:"),
    ],
)
def test_a_newcomer_that_fails_is_left_out_and_the_run_goes_on(broken, strategy, why, tmp_path, gate):
    held, watch = gate("held"), Watch()
    options = {"scaling__max_workers": 3, "parallel__strategy": strategy}
    run = prepare(OnOneNode(samples=LONG), configure(tmp_path, "run", **options))
    faults = plan(fault("step.forward", 6, 0, "hold", file=held))
    with local_run(run, 2, on_record=watch, environment=faults) as local:
        watch.wait_for_step(5)
        local.add_worker(environment={broken: "1"})
        watch.wait_for(lambda record: record.get("member") == "w1-2")
        held.unlink()
        local.wait(WAIT_S)
    ran = Ran(run, None)

    assert ran.result["status"] == "finished"
    told = [e for kind in ("notice", "member_lost") for e in ran.events(kind) if e.get("member") == "w1-2"]
    assert told[0]["detail"].startswith(why)
    if broken == "SICK":
        line = "RuntimeError: CUDA error: uncorrectable ECC error encountered"
        assert [said.endswith(line) for said in failures(ran)] == [True, True]
    assert set(ran.column("world_size")) == {2}
    assert gaps_and_doubles(ran.rows, B) == [], "no step was lost"
    assert ran.sha == train(Plain(samples=LONG), configure(tmp_path, "other"), workers=1).sha


@pytest.mark.parametrize("least", [1, 2])
def test_who_has_no_data_before_the_first_world_is_left_out_as_long_as_enough_have(least, tmp_path, gate):
    job = OnOneNode(samples=LONG, marker=str(tmp_path / "first"))
    run = prepare(job, configure(tmp_path, "run", scaling__max_workers=2, scaling__min_workers=least))
    gate("first")
    with local_run(run, 2) as local:
        if least == 1:
            local.wait(WAIT_S)
        else:
            with pytest.raises(RunFailed, match=r"could not get ready(?s:.*)OSError: /data/train is not mounted here"):
                local.wait(WAIT_S)
    ran = Ran(run, None)

    (lost,) = ran.events("member_lost")
    assert "OSError: /data/train is not mounted here" in lost["detail"]
    assert ran.column("world_size") == [1] * 12 if least == 1 else ran.rows == []


def test_processes_that_die_at_one_sample_again_and_again_end_the_run(tmp_path):
    """Each that dies is replaced, as on Ray."""
    job = Items(samples=LONG, fault="die", fault_at=SAMPLE)
    run = prepare(job, configure(tmp_path, "run", scaling__max_workers=1))

    def replace_it(record: dict) -> None:
        if record.get("kind") == "process_ended":
            local.add_worker()

    with local_run(run, 1, on_record=replace_it) as local, pytest.raises(RunFailed) as failed:
        local.wait(WAIT_S)

    text = str(failed.value)
    told = r"5 worlds one after another lost a worker at step [123], since its process ended"  # by the rows that came
    assert re.match(told, text)
    assert text.count("killed by SIGKILL") >= 4


# ---- loader processes -------------------------------------------------------------------------------------------

IN_A_SCRIPT = """
from dataclasses import dataclass
import torch

@dataclass
class Pair:
    values: torch.Tensor
    names: list

class Data:
    def __init__(self):
        self.values = torch.arange(64.0)

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return self.values[index]

def collate(samples):
    return Pair(torch.stack(samples), [f"sample {int(v)}" for v in samples])
"""


def loader_of(data, collate, **options) -> Loader:
    fetcher = Fetcher(data, collate, seed=0, dataset_size=64)
    order = Order(seed=0, dataset_size=64, global_size=8, microbatches=2)
    loader = Loader(fetcher, order, workers=1, prefetch=1, total_steps=50, **options)
    loader.start(0, [(0, 1), (1, 1)])
    return loader


def test_what_is_defined_in_a_script_reaches_loader_processes_and_comes_back():
    """As on Ray, where workers have the job of a script by value: its classes can be imported nowhere."""
    script = {"__name__": "__main__"}
    exec(IN_A_SCRIPT, script)
    loader = loader_of(script["Data"](), script["collate"])
    try:
        for step in range(3):
            for microbatch in (0, 1):
                span = loader.next(step, microbatch, 1)
                assert type(span.batch) is script["Pair"]
                assert span.batch.values.tolist() == [float(i) for i in span.ids]
                assert span.batch.names == [f"sample {i}" for i in span.ids]
    finally:
        loader.close()


class Locked(Samples):
    """Data that hold what no other process can have."""

    def __init__(self):
        super().__init__(64)
        self.lock = threading.Lock()


def generators(samples):
    return (sample for sample in samples)


def test_what_cannot_be_sent_is_told_in_a_sentence():
    with pytest.raises(ConfigError, match=r"train_data\(\), a Locked, cannot be sent .*thread.lock.*--data.workers 0"):
        loader_of(Locked(), list)

    loader = loader_of(Samples(64), generators)
    try:
        with pytest.raises(ItemError, match=r"what collate_fn\(\) returns cannot be sent .*generator"):
            loader.next(0, 0, 1)
    finally:
        loader.close()


def test_killed_loader_processes_are_replaced_and_the_step_goes_on(tmp_path):
    mark = tmp_path / "mark"
    mark.touch()
    job = Items(samples=LONG, fault="die-once", fault_at=SAMPLE, fault_file=str(mark))

    ran = train(job, configure(tmp_path, "run", data__workers=1), workers=1)

    (restarted,) = ran.events("loader_restarted")
    assert "a loader process is gone while samples of step " in restarted["detail"]
    assert "killed by SIGKILL" in restarted["detail"]
    assert len(ran.events("world_formed")) == 1
    assert ran.failure is None
    assert ran.sha == train(Items(samples=LONG), configure(tmp_path, "other"), workers=1).sha


def _serve(telling: Connection, folder: str) -> None:
    """A worker as it is on a cluster: a process of its own, whose temporary files are its own."""
    process._parent_process = None  # type: ignore[attr-defined]
    process.current_process()._config.pop("tempdir", None)  # type: ignore[attr-defined]
    tempfile.tempdir = folder
    loader = loader_of(Samples(64), list)
    loader.next(0, 0, 1)
    telling.send([p.pid for p in multiprocessing.active_children()])
    signal.pause()


def test_loader_processes_of_a_killed_worker_end_and_leave_no_folder():
    told, telling = multiprocessing.Pipe(duplex=False)
    with leaks.adopting_orphans(), tempfile.TemporaryDirectory() as folder:  # paths of sockets may not be long
        worker = fork(_serve, telling, folder)
        telling.close()
        (loader,) = told.recv()
        assert [name[:5] for name in os.listdir(folder)] == ["pymp-"]
        worker.kill()
        worker.join()
        wait_until(lambda: loader not in leaks.descendants(os.getpid()), "the loader process to end")
        assert os.listdir(folder) == []
