"""What is asked of a cluster, as far as it needs none."""

from __future__ import annotations

import pytest

from elastic.cluster.autoscaler import failures, reasons_in, types_in, unserved
from elastic.cluster.capacity import awaited, check_fits, choose_accelerator, excluded_nodes, may_share
from elastic.compat.ray import Autoscaling
from elastic.errors import ConfigError


def test_nodes_are_kept_out_by_host_name_address_or_the_beginning_of_their_id():
    nodes = [
        {"NodeID": f"{i}abc", "NodeManagerHostname": f"host-{i}", "NodeManagerAddress": f"10.0.0.{i}", "Alive": i != 4}
        for i in range(1, 6)
    ]
    assert excluded_nodes((), nodes) == []
    assert excluded_nodes(("host-1", "10.0.0.2", "3ab", "host-4", "nobody"), nodes) == ["1abc", "2abc", "3abc"]
    assert excluded_nodes(("host", "10.0.0", "abc"), nodes) == [], "but for ids, names are whole"


GPUS, CPUS, HEAD = {"GPU": 4.0, "CPU": 48.0}, {"CPU": 8.0}, {"object_store_memory": 1.0}


@pytest.mark.parametrize(
    ("wish", "nodes", "chosen"),
    [
        ("auto", [HEAD], "cpu"),
        ("auto", [HEAD, CPUS], "cpu"),
        ("auto", [HEAD, CPUS, GPUS], "gpu"),
        ("gpu", [HEAD], "gpu"),
        ("cpu", [GPUS], "cpu"),
    ],
)
def test_gpus_are_taken_where_they_are_or_can_be_and_believed_in_where_they_are_asked_for(wish, nodes, chosen):
    assert choose_accelerator(wish, nodes) == chosen


def test_what_no_node_could_hold_is_refused_and_what_may_come_is_waited_for():
    for wish in ("gpu", "cpu"):
        check_fits(wish, wish, 8, 1000, [HEAD])
        assert awaited(wish, [HEAD]) == f"the cluster's first node with a {wish.upper()}"
    assert awaited("cpu", [HEAD, CPUS]) == ""
    check_fits("auto", "gpu", 4, 12, [HEAD, CPUS, GPUS])
    with pytest.raises(ConfigError, match="give gpu or cpu, and the first such node is waited for"):
        check_fits("auto", "cpu", None, 1, [HEAD])
    with pytest.raises(ConfigError, match="asks for 49 CPU for one worker, but no node has more than 48"):
        check_fits("gpu", "gpu", None, 49, [CPUS, GPUS])
    with pytest.raises(ConfigError, match="workers-per-node is 5, but no node has room for more than 4"):
        check_fits("gpu", "gpu", 5, 1, [CPUS, GPUS])


def test_node_types_are_those_that_may_be_started_and_whose_resources_are_known():
    cluster = {
        "max_workers": 4,
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "max_workers": 0},
            "spot": {"resources": {"CPU": 8, "GPU": 1}, "node_config": {}},
            "unknown": {"resources": {}, "max_workers": 2},
        },
    }
    assert types_in(cluster) == [{"CPU": 8.0, "GPU": 1.0}]
    assert types_in({}) == []


def test_why_nodes_could_not_be_started_is_read_from_the_autoscaler_s_log():
    log = (
        "INFO node_provider.py:491 -- Failed to launch 2 nodes of type spot: InsufficientInstanceCapacity: old\n"
        "INFO reconciler.py:1 -- Failed to launch 2 nodes of type spot with request id 1-2: \n"
        "INFO node_provider.py:491 -- Failed to launch 1 nodes of type other: UnauthorizedOperation: iam:PassRole\n"
        "INFO node_provider.py:491 -- Failed to launch 2 nodes of type spot: InsufficientInstanceCapacity: new\n"
    )
    assert reasons_in(log) == {
        "spot": "InsufficientInstanceCapacity: new",
        "other": "UnauthorizedOperation: iam:PassRole",
    }


def test_what_an_autoscaler_could_not_and_never_can_start_is_told_once_for_each_kind():
    big, small = {"GPU": 1.0, "CPU": 8.0}, {"CPU": 1.0}
    told = Autoscaling(
        failed=(("spot", "wrapped"), ("spot", "wrapped"), ("other", "no room"), ("third", "")),
        unserved=((small,), (big,), (big,), (big,) * 4),
    )

    assert failures(told, {"spot": "no capacity in zone a"}) == [
        "nodes of type spot could not be started: no capacity in zone a",
        "nodes of type other could not be started: no room",
        "nodes of type third could not be started: its log on the head says why",
    ]
    why = "no type of node has as much, or as many as it may start are there"
    everyone = [
        f"it can start no node for 1 CPU, asked for once: {why}",
        f"it can start no node for 8 CPU, 1 GPU, asked for 2 times: {why}",
        f"it can start no node for 4 x (8 CPU, 1 GPU), asked for once: {why}",
    ]
    assert unserved(told) == everyone
    assert unserved(told, big) == everyone[1:]
    assert failures(Autoscaling(), {}) == unserved(Autoscaling()) == []


def test_a_node_has_no_more_workers_than_it_may():
    assert may_share(5, 1, None)
    assert [may_share(there, 1, 2) for there in (0, 1, 2)] == [True, True, False]
    assert [may_share(there, 2, 2) for there in (0, 1, 2)] == [True, False, False], "who is placed together is alone"
