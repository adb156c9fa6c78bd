"""How tests are dealt to the processes that run them side by side (pytest-xdist)."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling


def shares_cluster(test: str) -> bool:
    """Whether this test, by its id, may need the session's Ray cluster."""
    return test.rpartition("/")[2].startswith("test_ray_")


class Scheduler(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
    """One process begins with all tests that share a Ray cluster; the others are dealt one by one.

    (The groups of xdist 3.8 are suffixes of ids that pytest 9.2 does not let a plugin change.)
    """

    def _split_scope(self, nodeid: str) -> str:
        return "the cluster" if shares_cluster(nodeid) else nodeid
