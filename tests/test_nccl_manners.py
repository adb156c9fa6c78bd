"""Runs over a stand-in for NCCL: what breaks a run on GPUs, and not on CPUs, breaks none."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from elastic.errors import WorldBroken
from elastic.observe.ledger import gaps_and_doubles
from elastic.parallel import nccl
from elastic.parallel.records import PendingRecord, Records
from elastic.tools.machine import judge_nccl
from elastic.worker import nccl_backend
from elastic.worker.nccl_backend import NcclBackend
from elastic.worker.nccl_report import ADDRESS, ask_nccl
from tests.forked import B, Ran, configure, fault, train
from tests.nccl_manners import Manners
from tests.tiny_jobs import Everything

SOON_S = 3.0  # from a loss to the next world
CPU = torch.device("cpu")


def go(folder: Path, faults: list[dict], manners: Manners, workers: int = 4, **options: Any) -> Ran:
    """A run to which these happen, each once."""
    marks = [folder / f"happened-{number}" for number in range(len(faults))]
    planned = [f | {"only": str(mark)} for f, mark in zip(faults, marks, strict=True)]
    config = configure(folder, "run", eval__every="3st", checkpoint__every="4st", **options)
    ran = train(Everything(), config, workers, faults=planned, manners=manners)
    assert [f for f, mark in zip(faults, marks, strict=True) if not mark.exists()] == [], ran.failure
    return ran


def assert_undisturbed(ran: Ran, undisturbed: Ran, lost: int) -> None:
    """Nothing is to be seen in what was trained, and of the workers only those are gone to whom something happened."""
    assert ran.failure is None
    assert ran.sha == undisturbed.sha
    assert ran.column("loss") == undisturbed.column("loss")
    assert ran.evaluations == undisturbed.evaluations
    assert gaps_and_doubles(ran.rows, B) == []
    assert ran.events("member_evicted") == []
    assert len(ran.events("member_lost")) == lost


#: Of each run how NCCL behaves, what happens, how many workers that costs, and options.
RUNS: dict[str, tuple[Manners, list[dict], int, dict[str, Any]]] = {
    "losses between and in the stages of a step": (
        Manners(),
        [
            fault("world.connected", None, 1),
            fault("eval.begin", 3, 1),
            fault("eval.begin", 3, 0, "sleep", seconds=0.4),  # who computes meanwhile communicates after the abort
            fault("step.reduce", 5, 2),
            fault("step.before_fence", 6, 1),
            fault("step.before_fence", 6, 0, "sleep", seconds=0.4),
        ],
        4,
        {},
    ),
    "losses of a cut model": (
        Manners(),
        [fault("step.forward", 1, 1), fault("eval.begin", 3, 0), fault("step.reduce", 5, 1)],
        3,
        {"parallel__strategy": "fsdp"},
    ),
    "a loss with several communicators": (
        Manners(),
        [fault("step.after_fence", 5, 1)],
        1,
        {"parallel__strategy": "hsdp", "scaling__workers_per_node": 2},
    ),
    "a loss where gradients are exchanged inside nodes, then between them": (
        Manners(abort_s=1.5),
        [fault("step.reduce", 5, 1)],
        1,
        {"scaling__workers_per_node": 2},
    ),
    "a loss while communicators are made that an abort frees": (
        Manners(create_s=0.1, creation="freeable"),
        [fault("nccl.creating", None, 1)],
        1,
        {"recovery__hang_timeout": "2s"},
    ),
    "a loss while communicators are made that nothing frees": (
        Manners(create_s=0.1, creation="blocks"),
        [fault("nccl.creating", None, 1)],
        1,
        {"recovery__hang_timeout": "2s"},
    ),
    "a loss while communicators are made, for which aborts wait": (
        Manners(create_s=0.1, creation="held", limit_s=2.5),  # an abort that were waited for would end the process
        [fault("nccl.creating", None, 1)],
        1,
        {"recovery__hang_timeout": "2s"},
    ),
    "a loss before all are there to make communicators": (
        Manners(create_s=0.1, creation="held", limit_s=2.5),
        [fault("world.assigned", None, 1)],
        1,
        {"recovery__hang_timeout": "2s"},
    ),
    "errors while all live: of the job, then of the network": (
        Manners(),
        [fault("step.forward", 2, 1, "raise"), fault("nccl.operation", 60, 0, "raise")],
        0,
        {"recovery__hang_timeout": "4s"},
    ),
    "an abort that does not end, and a device that is of no use after one": (
        Manners(limit_s=0.5),
        [
            fault("step.forward", 4, 1),
            fault("nccl.aborting", do="sleep", seconds=60),
            fault("nccl.synchronizing", do="raise"),
        ],
        3,
        {},
    ),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_a_run_over_nccl_goes_on_with_the_same_bits_after(name: str, undisturbed: Ran, tmp_path: Path) -> None:
    manners, faults, lost, options = RUNS[name]
    ran = go(tmp_path, faults, manners, 5 if lost == 4 else 4, **options)
    assert_undisturbed(ran, undisturbed, lost)
    of_the_job = [f for f in faults if f["point"] == "step.forward" and f["do"] == "raise"]
    assert len(ran.events("worker_failed")) == len(of_the_job), ran.events("worker_failed")
    if manners.create_s > 0.05:
        gone, formed = ran.events("member_lost")[0], ran.events("world_formed")[1]
        assert formed["time"] - gone["time"] < SOON_S
    if manners.abort_s > 1:  # of three communicators: they are aborted at the same time, not one after another
        times = [row["time"] for row in ran.history]
        assert manners.abort_s < max(b - a for a, b in itertools.pairwise(times)) < 3 * manners.abort_s
    if not lost:
        assert any("NCCL reports COMM_ERROR" in event["detail"] for event in ran.events("world_broken"))


@pytest.fixture
def reporter() -> Iterator[tuple[str, list[bytes]]]:
    """Something that answers as NCCL does about its ranks: where, and what it was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            while True:
                try:
                    caller, _ = listening.accept()
                except OSError:  # it is closed: the test is over
                    return
                with caller, caller.makefile("rwb") as line:
                    asked.append(line.readline())
                    line.write(b"SERVER PROTOCOL 2\n")
                    line.flush()
                    asked.append(line.readline())
                    line.write(b"rank 1 has begun 59 operations\nrank 0 has begun 60\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listening.getsockname()[1]}", asked
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_a_kernel_that_never_ends_stalls_a_world_whose_report_is_saved_and_costs_nobody(
    undisturbed: Ran, reporter: tuple[str, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESS, reporter[0])
    hanging = fault("nccl.kernel", 38, 1, "raise")  # in the passes of a step
    ran = go(tmp_path, [hanging], Manners(), 2, recovery__hang_timeout="1s")
    assert_undisturbed(ran, undisturbed, 0)
    stalled = ran.events("world_stalled")
    assert len(stalled) == 1
    assert "nobody has moved" in stalled[0]["detail"]
    saved = {name.split("-", 1)[1]: ran.storage.read(f"stacks/{name}").decode() for name in ran.storage.names("stacks")}
    assert set(saved) == {f"w1-{i}{what}.txt" for i in (0, 1) for what in ("", "-connections")}
    assert all("rank 1 has begun 59 operations" in saved[f"w1-{i}-connections.txt"] for i in (0, 1))


# ---- the pieces -----------------------------------------------------------------------------------------------------


def test_nccl_is_asked_for_its_report_in_its_own_words(
    reporter: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ADDRESS, reporter[0])
    assert ask_nccl().endswith("rank 1 has begun 59 operations\nrank 0 has begun 60\n")
    assert reporter[1] == [b"CLIENT PROTOCOL 2\n", b"VERBOSE STATUS\n"]
    monkeypatch.setenv(ADDRESS, "127.0.0.1:1")
    assert "none from 127.0.0.1:1" in ask_nccl()


class Slow:
    """A group whose abort takes its time."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def abort(self) -> None:
        assert not self.began, "aborted twice"
        self.began = time.monotonic()
        time.sleep(0.3)
        self.ended = time.monotonic()


def test_freeing_keeps_nobody_waiting_and_aborts_each_group_once_and_all_side_by_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = [Slow(), Slow(), Slow()]
    monkeypatch.setattr(nccl_backend, "process_groups", lambda: groups)
    backend = NcclBackend("1-1", 2, CPU, lambda what: None)
    began = time.monotonic()
    backend.free()
    backend.free()
    assert time.monotonic() - began < 0.2, "the watcher says nothing meanwhile"
    backend.close()
    backend.free()
    assert max(group.began for group in groups) < min(group.ended for group in groups)
    with pytest.raises(WorldBroken), backend.connecting():
        pass


def test_a_communicator_that_was_made_while_its_world_broke_is_aborted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first abort came before torch knew the communicator."""
    aborts: list[str] = []

    class Group:
        def abort(self) -> None:
            aborts.append("begins")
            time.sleep(0.05)
            aborts.append("ends")

    backend = NcclBackend("1-1", 1, CPU, lambda what: None)
    monkeypatch.setattr(nccl_backend, "process_groups", lambda: [group])
    monkeypatch.setattr(dist, "all_reduce", lambda one, group: backend.free())
    group = Group()
    with pytest.raises(WorldBroken), backend.connecting():
        backend.open(dist.HashStore(), 5.0)
    assert aborts == ["begins", "ends"] * 2


def test_members_that_do_not_come_to_connect_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_backend, "process_groups", list)
    backend = NcclBackend("1-1", 3, CPU, lambda what: None)
    with pytest.raises(WorldBroken, match="2 of 3 members of world 1-1 did not come to connect"):
        backend.open(dist.HashStore(), 0.1)


def test_nothing_is_looked_at_that_an_aborted_gather_left() -> None:
    def broken() -> None:
        raise WorldBroken("world 1-1 is broken")

    records = Records([range(1), range(1, 2)], 0, CPU, check=broken)
    records.add(torch.tensor(1.0), 1, {"accuracy": 1.0}, (7,))
    gathered = records._matrix(1).expand(2, -1, -1).clone()
    gathered[1] = 0x7FF8000000000000  # NaN, which torch's deterministic mode fills memory with
    with pytest.raises(WorldBroken):
        PendingRecord(records, gathered, None).result()


def test_the_doctor_says_what_is_set_and_looks_at_what_the_user_set_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    seen = {"nccl": "2.29.7", "settings": nccl.describe_settings()}
    found = judge_nccl("here", seen)
    odd = {finding.found for finding in found if finding.state == "warn"}
    assert odd == {"2.29.7", "NCCL_NVLS_ENABLE=1 (yours)"}
    assert len(found) == 2 + len(nccl.SETTINGS)
    assert judge_nccl("here", {"memory": []}) == []
    lines = "\n".join(nccl.settings_lines("gpu"))
    assert all(setting.name in lines and setting.why in lines for setting in nccl.SETTINGS)
    assert nccl.settings_lines("cpu") == []
    assert "--scaling.accelerator gpu lists them" in nccl.settings_lines("auto")[1]


def test_settings_are_made_where_the_user_made_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in nccl.SETTINGS:
        monkeypatch.setenv(setting.name, "")
        monkeypatch.delenv(setting.name)
    monkeypatch.setenv(nccl.INTERFACE, "")
    monkeypatch.delenv(nccl.INTERFACE)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    NcclBackend.prepare("127.0.0.1")
    said = {name: value for name, value, _ in nccl.describe_settings()}
    assert said["NCCL_NVLS_ENABLE"] == "1 (yours)"
    assert said["TORCH_NCCL_ENABLE_MONITORING"] == "0"
    assert os.environ[nccl.INTERFACE] == "=lo"
    assert os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] == "0"
