"""Two runs on one cluster of three nodes, which leave nothing in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.bench.nodes import LocalCluster, result
from tests.ray_cluster import Story, check_bits_and_samples, slow_job, stop, wait_until
from tests.ray_held import Held

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(480)]
FOREVER = ("--run.duration", "100000st")
WHOLE_NODES = ("--scaling.cpus-per-worker", "2")  # those of a node of the cluster


def test_a_run_of_higher_priority_gets_its_least_and_gives_it_back_and_both_have_their_bits(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    held = Held(cluster)
    low_options = (
        *FOREVER,
        *WHOLE_NODES,
        "--scaling.min-workers",
        "1",
        "--scaling.max-workers",
        "3",
        "--scaling.request-timeout",
        "2s",
    )
    low = slow_job(cluster, tmp_path, "low", *low_options)
    story = Story(low)
    first = story.next_world(3)
    low.wait_for_step(5)

    # a run that needs two of the three nodes: the first shrinks at a step boundary, nobody is lost
    high_options = ("--run.duration", "25st", *WHOLE_NODES)
    high = slow_job(cluster, tmp_path, "high", *high_options, "--scaling.min-workers", "2", "--scaling.priority", "5")
    second = story.next_world(1)
    assert set(second) < set(first)
    assert len(Story(high).next_world(2)) == 2
    yielded = low.wait_for(lambda line: "yielded" in line)
    assert "high" in yielded

    # it asks for more in vain, and after a while no longer; when the other has finished, it grows again
    wait_until(lambda: not held.groups("elastic/low/", "PENDING"))
    assert high.process.poll() is None, high.output
    assert high.wait(120) == 0, high.output
    assert set(second) < set(story.next_world(3))

    stop(low, 10)
    low_events = check_bits_and_samples(tmp_path, "low", *low_options)
    high_events = check_bits_and_samples(tmp_path, "high", *high_options)
    assert result(tmp_path / "high")["status"] == "finished"
    assert not {"member_lost", "member_late"} & {e["kind"] for e in (*low_events, *high_events)}
    assert [e["detail"]["max_workers"] for e in low_events if e["kind"] == "yielded"] == [1, None]
    held.check_nothing_is_left()  # of one that was finished, and of one that was stopped
