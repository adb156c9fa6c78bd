"""The processes that hold a run together are killed or stand still: controller, driver, host; and two drivers meet."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from elastic.observe.ledger import METRICS, read_records
from elastic.storage import Storage
from jobs.bench.nodes import LocalCluster
from tests.ray_cluster import Story, actor_pids, check_bits_and_samples, slow_job, step_of, stop, wait_until
from tests.ray_held import Held

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(480)]
OPTIONS = (
    "--run.duration",
    "100000st",
    "--checkpoint.every",
    "20st",
    "--scaling.max-workers",
    "2",
    "--recovery.lease",
    "10s",  # is waited for where nobody knows that workers have ended
    "--recovery.hang-timeout",
    "10s",
)


def living(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_controller_driver_and_host_are_killed_or_stand_still_and_two_drivers_meet(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    # the controller is killed, and its workers with it: another one takes its place, and the run goes on
    held = Held(cluster)
    run = slow_job(cluster, tmp_path, "run", *OPTIONS)
    story = Story(run)
    workers = story.next_world(2)
    run.wait_for_step(25)
    (controller,) = actor_pids("Controller")
    os.kill(controller, signal.SIGKILL)
    run.wait_for(lambda line: "controller restarted" in line)
    assert not set(story.next_world(2)) & set(workers)
    wait_until(lambda: not living(workers))

    # its driver is killed: nothing of it is left running, and nothing held
    during = held.look()
    assert during["actors"].count("Controller") == during["actors"].count("HostActor") == 1
    assert during["actors"].count("WorkerActor") == len(during["groups"]) == 2
    assert during["demands"] == ["run/run"]
    second = slow_job(cluster, tmp_path, "run", *OPTIONS)
    assert second.wait() == 2, second.output
    assert f"(process {run.process.pid})" in second.lines[-1]
    run.end()
    assert run.process.poll() == -signal.SIGKILL
    held.check_nothing_is_left(crashed="run")

    # the next one goes on at once from the newest checkpoint
    run = slow_job(cluster, tmp_path, "run", *OPTIONS)
    story = Story(run, epoch=2)
    workers = story.next_world(2)

    # its host stands still: another one takes its place, and the workers train on as they are
    (host,) = actor_pids("HostActor")
    rows = Storage(str(tmp_path / "run"))
    wait_until(lambda: any(row["generation"] == story.generation for row in read_records(rows, METRICS)))
    before = step_of(run)
    os.kill(host, signal.SIGSTOP)
    run.wait_for(lambda line: "the host of the run did not answer for 5 s and was ended" in line)
    run.wait_for_step(before + 40)
    assert not living([host])
    assert living(workers) == workers
    assert story.generation in [line for line in run.lines if "world formed" in line][-1]

    # a driver that takes over: the one before it ends, and says why
    usurper = slow_job(cluster, tmp_path, "run", *OPTIONS, "--run.take-over")
    assert run.wait(60) == 1, run.output
    assert "claim" in run.lines[-1], run.lines[-1]
    story = Story(usurper, epoch=3)
    workers = story.next_world(2)
    usurper.wait_for_step(5)

    # its controller stands still: the workers, which end with it, save what they have before, and others go on
    (controller,) = actor_pids("Controller")
    os.kill(controller, signal.SIGSTOP)
    usurper.wait_for(lambda line: "did not answer for 10 s and was ended" in line)
    assert not set(story.next_world(2)) & set(workers)
    assert "checkpoint committed" in usurper.output.split("controller restarted")[0].rpartition("world formed")[2]
    stop(usurper, step_of(usurper))
    check_bits_and_samples(tmp_path, "run", *OPTIONS, redone=True)
