"""Which node `elastic node-watch` watches, and what it refuses. On a cluster: tests.test_ray_survivors."""

from __future__ import annotations

import pytest

from elastic import cli
from elastic.cluster.gcs import own_node
from elastic.errors import ConfigError


def test_the_node_of_this_machine_is_the_one_whose_process_is_here_or_whose_address_is_its_own() -> None:
    alive = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.2"}

    assert own_node(alive, {"b"}, "10.0.0.2") == "b"
    assert own_node(alive, {"a", "b", "c"}, "10.0.0.1") == "a"  # hosts that share process ids
    assert own_node(alive, set(), "10.0.0.1") == "a"  # a container beside the node's
    assert own_node(alive, {"a"}, "127.0.0.1") == "a"  # an address that the head does not know
    assert own_node(alive, {"d"}, "10.0.0.3") is None
    with pytest.raises(ConfigError, match="2 nodes of the cluster run on this machine; say which with --node-id"):
        own_node(alive, {"b", "c"}, "10.0.0.2")


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--poll", "5st", "--poll is '5st'; give a time in s, min or h"),
        ("--grace", "soon", "--grace is 'soon'"),
        ("--rebalance", "0s", "--rebalance is '0s'"),
    ],
)
def test_bad_input_is_one_sentence(option: str, value: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["node-watch", option, value]) == 2

    assert text in capsys.readouterr().err
