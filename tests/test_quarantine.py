"""Nodes on which one worker after another cannot get ready take no more of them, where it is the node's fault."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elastic.cluster.quarantine import MOST_FAILURES, Quarantine


def fail(found: Quarantine, node: str, running: list[str], times: int = MOST_FAILURES) -> Quarantine:
    for _ in range(times):
        found = found.after_failure(node, running)
    return found


def test_a_node_is_closed_after_three_failures_in_a_row_while_others_train_elsewhere() -> None:
    assert fail(Quarantine(), "a", ["b"], MOST_FAILURES - 1).nodes == set()
    assert fail(Quarantine(), "a", ["b"]).nodes == {"a"}
    assert fail(Quarantine(), "a", ["a"]).nodes == set(), "it trains there: the fault is not the node's"
    assert fail(Quarantine(), "a", []).nodes == set(), "nobody trains anywhere: the fault may be the job's"
    assert fail(Quarantine(), "", ["b"]).nodes == set(), "the node is not known"


def test_a_worker_that_gets_ready_clears_its_node_but_opens_none_that_was_closed() -> None:
    found = fail(Quarantine(), "a", ["b"], MOST_FAILURES - 1).after_success("a")
    assert fail(found, "a", ["b"], MOST_FAILURES - 1).nodes == set()
    assert fail(found, "a", ["b"]).after_success("a").nodes == {"a"}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans())))
def test_at_least_one_node_that_trains_stays_open(story: list[tuple[str, bool]]) -> None:
    """Whoever fails wherever: workers train on open nodes only, and one of these is never closed by failures."""
    found = Quarantine()
    for node, ready in story:
        running = [n for n in "abc" if n not in found.nodes][:1]
        found = found.after_success(node) if ready else found.after_failure(node, running)
        assert running[0] not in found.nodes
