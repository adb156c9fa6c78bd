"""A node whose link is cut: no connection is reset and nobody is told. Workers in network namespaces, without Ray."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from elastic.errors import FencedError, RunFailed
from elastic.membership.client import WorkerLink
from elastic.membership.protocol import SILENT_S, Beat, Rows, Share
from elastic.membership.server import MembershipServer
from elastic.membership.world import Generation, Member
from elastic.observe.ledger import gaps_and_doubles
from elastic.run.prepare import prepare
from elastic.worker.hosting import HostProcess
from elastic.worker.local import LocalRun
from tests import hosts as namespaces
from tests.forked import STDERR, WAIT_S, B, Ran, Watch, configure, local_run
from tests.hosts import Host, Hosts
from tests.tiny_jobs import Everything

OUT = "it was silent, and its world went on without it"
pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.usefixtures("fork_server")]


@dataclass
class Gated(Everything):
    """Writes down when each process applied each step; at some steps it waits there for a file."""

    folder: str = field(default="", metadata={"help": "where to write, and where the files are waited for"})
    gates: str = field(default="", metadata={"help": "steps, such as 5,9, that wait for a file 5 or 5.PID"})

    def after_step(self, model, step):
        super().after_step(model, step)
        folder, pid = Path(self.folder), os.getpid()
        with (folder / f"{pid}.applied").open("a") as file:
            file.write(f"{step} {time.time()}\n")
        if str(step) in self.gates.split(","):
            (folder / f"{step}.{pid}.waits").touch()
            while not (folder / f"{step}").exists() and not (folder / f"{step}.{pid}").exists():
                time.sleep(0.01)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    reason = namespaces.missing()
    if reason is not None:
        pytest.skip(reason)
    with Hosts() as made:
        yield made


def until(what: str, condition: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:.0f} s"
        time.sleep(0.01)


class Cluster:
    """A run whose server and workers are each on a host of their own."""

    def __init__(self, hosts: Hosts, tmp_path: Path, workers: int, gates: str, **options: Any):
        self.hosts, self.workers, self.folder = hosts, workers, tmp_path / "gates"
        self.folder.mkdir()
        self.stderr = tmp_path / "stderr"
        config = configure(tmp_path, "run", scaling__max_workers=workers, **options)
        self.run = prepare(Gated(folder=str(self.folder), gates=gates), config)
        self.server, self.places = hosts.add(), [hosts.add() for _ in range(workers)]
        self.watch = Watch()

    @contextmanager
    def started(self) -> Iterator[LocalRun]:
        """The run under way, with the test on the server's host."""
        with (
            self.server.entered(),
            local_run(
                self.run,
                self.workers,
                places=self.places,
                host=self.server.address,
                on_record=self.watch,
                environment={STDERR: str(self.stderr)},
            ) as self.local,
        ):
            yield self.local

    def world(self, number: int) -> dict[str, int]:
        """Process ids of a world, by member."""
        record = self.watch.wait_for(lambda r: r.get("kind") == "world_formed" and r["generation"] == f"1-{number}")
        return dict(zip(record["detail"]["ids"], record["detail"]["pids"], strict=True))

    def host_of(self, member: str) -> Host:
        return self.places[int(member.removeprefix("w1-"))]

    def process(self, member: str) -> Any:
        return self.local.processes[int(member.removeprefix("w1-"))]

    def await_end(self, member: str) -> int:
        """The exit code of the member's process."""
        process = self.process(member)
        until(f"the end of {member}", lambda: process.poll() is not None)
        return process.poll()

    def last_words(self, member: str) -> str:
        """The error that its process ended with."""
        start = f"worker {member}: "
        return next(line.removeprefix(start) for line in self.stderr.read_text().splitlines() if line.startswith(start))

    def refusal(self, member: str, applied: int, late: Rows | Share) -> str:
        """Why a worker that says it is this member, with this state, is not let in; before, it says what is late."""
        token = self.local.link._headers["Authorization"].removeprefix("Bearer ")
        link = WorkerLink(self.local.url, token, Member(member, node=self.host_of(member).name), lease_s=WAIT_S)
        try:
            link.post(late, Generation(1, 1))
            link.ask(0.0, {}, applied, None)
            with pytest.raises(FencedError) as refused:
                link.next_world(save_alone=lambda: None)
        finally:
            link.close()
        return str(refused.value)

    def open(self, step: int, pid: int | None = None) -> None:
        """Open a gate, to one process or to all."""
        (self.folder / (f"{step}" if pid is None else f"{step}.{pid}")).touch()

    def await_gate(self, step: int, pids: Any) -> None:
        waiting = [self.folder / f"{step}.{pid}.waits" for pid in pids]
        until(f"gate {step}", lambda: all(file.exists() for file in waiting))

    def applied(self, pid: int) -> dict[int, float]:
        """When this process applied each step."""
        lines = (self.folder / f"{pid}.applied").read_text().splitlines()
        return {int(step): float(at) for step, at in map(str.split, lines)}


@dataclass
class Said:
    """Something that a worker said to the server."""

    member: str
    at: float
    message: Any

    @property
    def step(self) -> int | None:
        """In which it is, where it says so."""
        at = self.message.at if isinstance(self.message, Beat) else None
        return at.position.step if at is not None else None


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[Said]:
    """All that workers say to the server, as it arrives."""
    arrived: list[Said] = []
    original = MembershipServer._from_worker

    def record(server: MembershipServer, member: str, message: Any, generation: Generation | None) -> None:
        arrived.append(Said(member, time.time(), message))
        original(server, member, message, generation)

    monkeypatch.setattr(MembershipServer, "_from_worker", record)
    return arrived


def test_survivors_of_a_cut_link_go_on_and_the_zombie_is_fenced_when_it_is_back(
    hosts: Hosts, undisturbed: Ran, said: list[Said], tmp_path: Path
) -> None:
    cluster = Cluster(hosts, tmp_path, 4, gates="5,9", checkpoint__every="5st")
    with cluster.started() as local:
        # given two workers cut off after the fence of step 5, which all passed: one blocks in the next step, and rank
        # 0 has yet to report its row
        first = cluster.world(1)
        talker, blocked, *others = first
        cluster.await_gate(5, first.values())
        hosts.cut(cluster.host_of(talker))
        hosts.cut(cluster.host_of(blocked))
        cut_at = time.time()
        for member in (blocked, *others):
            cluster.open(5, first[member])

        # then the others go on as they are
        second = cluster.world(2)
        assert second == {member: first[member] for member in others}
        cluster.await_gate(9, second.values())
        stall_s = min(cluster.applied(pid)[6] for pid in second.values()) - cut_at
        print(f"cut to the survivors' next step: {stall_s:.2f} s")
        assert stall_s < SILENT_S + 2

        # and when the link is back, the blocked one is freed and ends
        assert cluster.process(blocked).poll() is None
        hosts.heal(cluster.host_of(blocked))
        assert cluster.await_end(blocked) == 1
        assert cluster.last_words(blocked) == OUT

        # what the other one still had to say is heard, and counts for nothing
        hosts.heal(cluster.host_of(talker))
        healed_at = time.time()
        until(
            "its heartbeat",
            lambda: any(s.member == talker and s.message.kind == "beat" and s.at > healed_at for s in list(said)),
        )
        back_at = time.time()
        cluster.open(5, first[talker])
        assert cluster.await_end(talker) == 1
        assert cluster.last_words(talker) == OUT

        # what it says late counts for nothing: rows, a share of a checkpoint (it would be told as failed), its state
        row = Rows([{"step": 5, "generation": "1-1", "time": back_at, "step_s": 0.1, "sample_hash": "late"}])
        share = Share(5, "1-1-1", 1, None, None, "it is late", False, {})
        with cluster.host_of(talker).entered():
            for late in (row, share):
                assert cluster.refusal(talker, 5, late) == "the run went on without it"
        assert {"rows", "pack"} <= {s.message.kind for s in said if s.member == talker and s.at > back_at}
        cluster.open(9)
        local.wait(WAIT_S)
    ran = Ran(cluster.run, None)
    assert ran.sha == undisturbed.sha
    assert gaps_and_doubles(ran.rows, B) == []
    assert [row["step"] for row in ran.rows if "sample_hash" in row] == list(range(1, 13))
    assert ran.column("generation") == ["1-1"] * 5 + ["1-2"] * 7
    saved = [event["step"] for event in ran.events("checkpoint_committed")]
    assert saved == [5, 10, 12], "the broken world was saving step 5; the next one saves it again"
    assert ran.events("checkpoint_failed") == [], "the keeper never heard of the late share"
    assert {event["member"] for event in ran.events("member_late")} <= {talker, blocked}


def test_a_worker_that_is_cut_off_for_good_ends_with_its_lease(hosts: Hosts, undisturbed: Ran, tmp_path: Path) -> None:
    cluster = Cluster(hosts, tmp_path, 2, gates="5", recovery__lease="2s")
    with cluster.started() as local:
        first = cluster.world(1)
        lost = list(first)[1]
        cluster.await_gate(5, first.values())
        hosts.cut(cluster.host_of(lost))
        cluster.open(5)

        local.wait(WAIT_S)

        assert cluster.await_end(lost) == 1
        words = cluster.last_words(lost)
        assert words.startswith(f"the membership server at {local.url} was silent for ")
        assert words.endswith("longer than --recovery.lease 2s: others may have gone on with the run")
    assert Ran(cluster.run, None).sha == undisturbed.sha


def test_a_world_cut_off_as_a_whole_stops_applying_after_its_lease(hosts: Hosts, tmp_path: Path) -> None:
    lease_s = 3.0
    cluster = Cluster(hosts, tmp_path, 2, gates="3", recovery__lease=f"{lease_s:g}s", run__duration="1000000st")
    with cluster.started() as local:
        pids = cluster.world(1).values()
        cluster.await_gate(3, pids)
        hosts.cut(cluster.server)
        cut_at = time.time()
        cluster.open(3)

        assert [cluster.await_end(member) for member in cluster.world(1)] == [1, 1]
        last = max(max(cluster.applied(pid).values()) for pid in pids)
        assert lease_s - 2.5 < last - cut_at < lease_s + 0.1  # the last answered heartbeat was up to 1 s before the cut
        one, other = (max(cluster.applied(pid)) for pid in pids)
        assert abs(one - other) <= 1  # a step is applied where the lease held until its fence
        with pytest.raises(RunFailed, match=r"every worker .* ended without a result \(w1-0: exit code 1; "):
            local.wait(WAIT_S)
    ran = Ran(cluster.run, None)
    assert ran.result["status"] == "failed"
    assert ran.column("step") == list(range(1, len(ran.history) + 1))


def test_a_server_whose_link_is_back_within_the_lease_costs_nothing(
    hosts: Hosts, undisturbed: Ran, said: list[Said], tmp_path: Path
) -> None:
    cluster = Cluster(hosts, tmp_path, 2, gates="3,9", recovery__hang_timeout="3s")
    with cluster.started() as local:
        # given a server that last heard that one worker waits for the other
        first = cluster.world(1)
        ahead, _ = first
        cluster.await_gate(3, first.values())
        cluster.open(3, first[ahead])
        until(
            "a heartbeat from step 4",
            lambda: any(
                s.member == ahead
                and isinstance(s.message, Beat)
                and s.message.at is not None
                and s.message.at.position.step == 3
                for s in said
            ),
        )
        hosts.cut(cluster.server)
        cluster.open(3)

        cluster.await_gate(9, first.values())  # they train on meanwhile
        until("a long silence", lambda: time.time() - said[-1].at > SILENT_S + 0.5)
        hosts.heal(cluster.server)

        cluster.watch.wait_for_step(8)
        cluster.open(9)
        local.wait(WAIT_S)
    ran = Ran(cluster.run, None)
    assert ran.sha == undisturbed.sha
    assert ran.column("generation") == ["1-1"] * 12
    assert not ran.events("member_lost") + ran.events("member_evicted")


def test_a_worker_that_was_stopped_past_its_lease_goes_on_where_nobody_else_did(
    undisturbed: Ran, tmp_path: Path
) -> None:
    config = configure(tmp_path, "run", recovery__lease="1s", scaling__max_workers=1)
    run = prepare(Gated(folder=str(tmp_path)), config)
    fault = {"point": "step.after_fence", "step": 5, "do": "stop"}
    with local_run(run, 1, environment={"ELASTIC_FAULTS": json.dumps([fault])}) as local:
        (process,) = local.processes
        until("the stop", lambda: _state(process.pid) == "T")
        stopped_at = time.monotonic()
        until("the end of the lease, and of all patience", lambda: time.monotonic() - stopped_at > 5.0)
        os.kill(process.pid, signal.SIGCONT)
        local.wait(WAIT_S)
    ran = Ran(run, None)
    assert ran.sha == undisturbed.sha
    assert ran.column("generation") == ["1-1"] * 12


def test_a_host_that_was_away_for_longer_than_the_lease_costs_no_step(undisturbed: Ran, tmp_path: Path) -> None:
    """First the host alone, while its workers wait; then all of them together."""
    folder = tmp_path / "gates"
    folder.mkdir()
    run = prepare(
        Gated(folder=str(folder), gates="3,9"), configure(tmp_path, "run", recovery__lease="1s", scaling__max_workers=2)
    )
    with local_run(run, 2, own_host={}) as local:
        assert isinstance(local.hosting, HostProcess)
        host, pids = local.hosting.process.pid, [p.pid for p in local.processes]

        def all_wait(step: int) -> bool:
            return all((folder / f"{step}.{pid}.waits").exists() for pid in pids)

        def away(*stopped: int, seconds: float) -> None:
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            since = time.monotonic()
            until("the end of the lease", lambda: time.monotonic() - since > seconds)
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)

        until("gate 3", lambda: all_wait(3))
        away(host, seconds=2.5)
        assert all(p.poll() is None for p in local.processes)
        (folder / "3").touch()
        until("gate 9", lambda: all_wait(9))
        away(host, *pids, seconds=5.0)
        (folder / "9").touch()
        local.wait(WAIT_S)
        assert [p.wait(WAIT_S) for p in local.processes] == [0, 0]
    ran = Ran(run, None)
    assert ran.sha == undisturbed.sha
    assert ran.column("generation") == ["1-1"] * 12
    assert not ran.events("member_lost") + ran.events("member_late")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
