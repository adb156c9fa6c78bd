"""What is asked of a cluster, as far as it needs none."""

from __future__ import annotations

from elastic.cluster.capacity import excluded_nodes


def test_nodes_are_kept_out_by_host_name_address_or_the_beginning_of_their_id():
    nodes = [
        {"NodeID": f"{i}abc", "NodeManagerHostname": f"host-{i}", "NodeManagerAddress": f"10.0.0.{i}", "Alive": i != 4}
        for i in range(1, 6)
    ]
    assert excluded_nodes((), nodes) == []
    assert excluded_nodes(("host-1", "10.0.0.2", "3ab", "host-4", "nobody"), nodes) == ["1abc", "2abc", "3abc"]
    assert excluded_nodes(("host", "10.0.0", "abc"), nodes) == [], "but for ids, names are whole"
