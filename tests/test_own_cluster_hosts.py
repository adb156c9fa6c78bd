"""Hosts that are started by cluster.yaml's commands, object storage on another, a run submitted through the job API: a
host is killed, hosts come, EC2 takes one back, a link is cut and comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from elastic.membership.protocol import SILENT_S
from elastic.observe.ledger import METRICS, read_records
from elastic.storage import Storage
from jobs.bench.nodes import OBJECT_STORE_BYTES, REPOSITORY, Command
from jobs.bench.seaweed import SeaweedFS, SeaweedMissing, binary, credentials
from tests import hosts as namespaces
from tests.hosts import Host, Hosts
from tests.notice_servers import NoticeServer, iso_in, notice_server
from tests.own_cluster import RAY
from tests.ray_cluster import Story, check_bits_and_samples, step_of, wait_until
from tests.test_cluster_files import AWS, prepared, start_command

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(480)]
METADATA_SERVICE = "169.254.169.254"
BUCKET = "training"
START_TIMEOUT_S = 90.0
#: Ray calls a node dead after so many checks; by default that takes 15 s and more.
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "8",
}
JOB = ("--run.duration", "100000st", "--scaling.max-workers", "2", "--checkpoint.every", "20st")


class AwsLike:
    """A cluster whose nodes are started by the commands of cluster.yaml, each on a host of its own.

    Left out are `ray stop`, which would end every Ray of this machine, and the autoscaler, which would need AWS: the
    test adds nodes. Added is what a machine has of its own: address, folder, one CPU to work with. Storage is a
    SeaweedFS on a host without a node.
    """

    def __init__(self, hosts: Hosts, folder: Path, stack: ExitStack):
        self.hosts, self.folder, self._stack, self._config = hosts, folder, stack, prepared(AWS)
        self._services: dict[str, NoticeServer] = {}
        (folder / ".ray").mkdir()
        (folder / ".ray" / "auth_token").write_text("the-token-of-this-cluster")
        self._storage = hosts.add()
        with self._storage.entered():
            server = stack.enter_context(SeaweedFS(address=self._storage.address))
        self._environment = {
            **os.environ,
            **credentials(),
            "AWS_ENDPOINT_URL": server.url,
            "HOME": str(folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "RAY_USAGE_STATS_ENABLED": "0",
            "SLOW_JOB_PAUSE_S": "0.04",
            **HEALTH,
        }
        self._s3("mkdir", BUCKET)
        self.head = hosts.add()
        self._await(self._start(self.head, "head"))

    def add(self, count: int) -> list[Host]:
        """New hosts with a worker node each, which EC2 may take back."""
        made = [self.hosts.add() for _ in range(count)]
        for host in made:
            host.answer_to(METADATA_SERVICE)
            with host.entered():
                self._services[host.name] = self._stack.enter_context(notice_server("aws", (METADATA_SERVICE, 80)))
        for started in [self._start(host, "worker") for host in made]:
            self._await(started)
        return made

    def take_back(self, host: Host, seconds: float) -> None:
        """EC2 says so, to who asks on that host."""
        notice = json.dumps({"action": "terminate", "time": iso_in(seconds)})
        self._services[host.name].answers["/latest/meta-data/spot/instance-action"] = (200, notice)

    def watcher_said(self, host: Host, text: str) -> bool:
        return text in self._log(host).read_text()

    def submit(self, name: str, *options: str) -> Command:
        """Submit a run of tests.slow_job, from the head as through the tunnel of `ray dashboard`."""
        return Command(
            RAY,
            "job",
            "submit",
            "--address",
            "http://127.0.0.1:8265",
            "--submission-id",
            name,
            "--",
            "python",
            "-m",
            "tests.slow_job",
            "--run.name",
            name,
            "--run.storage",
            f"s3://{BUCKET}/runs",
            "--run.exactness",
            "bitwise",
            "--observe.log-every",
            "0.05",
            *options,
            environment={**self._environment, "RAY_AUTH_MODE": "token"},
            under=self.head.command(),
        )

    def elastic(self, host: Host, verb: str, run: str, *options: str) -> Any:
        """What a control command says of a run, given on this host."""
        done = subprocess.run(
            host.command(sys.executable, "-m", "elastic.cli", verb, f"s3://{BUCKET}/runs/{run}", *options),
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
            check=True,
        )
        return json.loads(done.stdout)

    def runs(self) -> Path:
        """What runs left in storage, copied to a folder of this machine."""
        self._s3("get", f"{BUCKET}/runs", f"{self.folder}/runs")
        return self.folder / "runs"

    def _log(self, host: Host) -> Path:
        return self.folder / f"{host.port}.log"

    def _start(self, host: Host, which: str) -> subprocess.Popen[str]:
        command = start_command(self._config, which)
        own = f"--node-ip-address={host.address} --temp-dir={self.folder}/{host.port}"
        changes = [("ray start ", f"ray start {own} --object-store-memory={OBJECT_STORE_BYTES} ")]
        if which == "head":
            changes.append(("--autoscaling-config=~/ray_bootstrap_config.yaml", ""))
        else:
            changes.append(("--disable-usage-stats", "--disable-usage-stats --num-cpus=1"))
            changes.append(("~/elastic-node-watch.log", str(self._log(host))))
        for shown, instead in changes:
            assert command.count(shown) == 1
            command = command.replace(shown, instead)
        return subprocess.Popen(
            host.command("bash", "-c", command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment if which == "head" else {**self._environment, "RAY_HEAD_IP": self.head.address},
        )

    @staticmethod
    def _await(started: subprocess.Popen[str]) -> None:
        output, _ = started.communicate(timeout=START_TIMEOUT_S)
        assert started.returncode == 0, output

    def _s3(self, verb: str, *arguments: str) -> None:
        """A verb of the file system, asked where storage can be reached."""
        program = "import sys, fsspec; getattr(fsspec.filesystem('s3'), sys.argv[1])(*sys.argv[2:], recursive=True)"
        program = program if verb == "get" else program.replace(", recursive=True", "")
        subprocess.run(
            self._storage.command(sys.executable, "-c", program, verb, *arguments),
            env=self._environment,
            check=True,
            timeout=60,
        )


@pytest.fixture
def cluster() -> Iterator[AwsLike]:
    """A head, and no worker node yet."""
    reason = namespaces.missing()
    if reason is None:
        try:
            binary()
        except SeaweedMissing as missing:
            reason = str(missing)
    if reason is not None:
        pytest.skip(reason)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="aws-", dir="/tmp"))  # paths of sockets
        hosts = stack.enter_context(Hosts())
        yield AwsLike(hosts, Path(folder), stack)
        while Command.started:
            Command.started.pop().end()


def test_a_submitted_run_outlives_its_hosts_and_ends_with_the_bits_of_one_that_nothing_happened_to(
    cluster: AwsLike,
) -> None:
    leaving, killed = cluster.add(2)
    run = cluster.submit("hosts", *JOB)
    story = Story(run)
    first = story.next_world(2)
    run.wait_for_step(5)

    # every process of a host is killed: the other goes on, and one that comes is taken in
    cluster.hosts.kill(killed)
    (survivor,) = story.next_world(1)
    assert survivor in first
    later = cluster.add(2)
    second = story.next_world(2)
    assert survivor in second

    # EC2 takes the oldest host back: it is left in time for the last one, and its node ends
    cluster.take_back(leaving, 60)
    run.wait_for(lambda line: "handed over" in line)
    third = story.next_world(2)
    assert set(third) & set(second) == set(second) - {survivor}
    assert cluster.watcher_said(leaving, "EC2 spot interruption: terminate: draining node")
    wait_until(lambda: cluster.watcher_said(leaving, "is gone"))

    # the link of a host is cut, nobody is told: the other goes on as it is, before and after Ray calls the node dead
    (silent,) = (host for host in later if third[1] in host.pids())
    cluster.hosts.cut(silent)
    cut_at = time.time()
    assert story.next_world(1) == third[:1]
    run.wait_for(lambda line: "has been marked dead" in line)
    run.wait_for_step(step_of(run) + 25)
    assert os.path.exists(f"/proc/{third[1]}")

    # and the zombie ends when the link is back
    cluster.hosts.heal(silent)
    run.wait_for_step(step_of(run) + 5)
    wait_until(lambda: not os.path.exists(f"/proc/{third[1]}"))

    # somebody on another host than the job's looks at it and stops it, which saves
    (other,) = (host for host in later if host != silent)
    seen: list[dict[str, Any]] = []

    def answered() -> bool:  # the server has 2 s for that, on processors that others use too
        seen.append(cluster.elastic(other, "status", "hosts", "--json"))
        return bool(seen[-1]["asked"])

    wait_until(answered)
    assert (seen[-1]["status"], [worker["pid"] for worker in seen[-1]["workers"]]) == ("running", third[:1])
    stopped = cluster.elastic(other, "stop", "hosts", "--json")
    assert run.wait() == 0, run.output
    assert "Job 'hosts' succeeded" in run.output
    assert stopped["status"] == "stopped"
    assert stopped["checkpoint"] == stopped["step"] > 5
    runs = cluster.runs()
    events = check_bits_and_samples(runs, "hosts", *JOB)
    kinds = [e["kind"] for e in events]
    assert kinds.count("handed_over") == 1
    rows = [row for row in read_records(Storage(str(runs / "hosts")), METRICS) if "sample_hash" in row]
    stall_s = next(row["time"] for row in rows if row["generation"] == story.generation) - cut_at
    print(f"cut to the survivors' next step: {stall_s:.2f} s")
    assert stall_s < SILENT_S + 3
    late = [e for e in events if e["kind"] == "checkpoint_committed" and e["time"] > cut_at + SILENT_S]
    assert {e["generation"] for e in late} == {story.generation}
    assert {e["detail"]["rung"] for e in events if e["kind"] == "restored"} == {"peer"}, "a step was redone"
    assert "controller_restarted" not in kinds
