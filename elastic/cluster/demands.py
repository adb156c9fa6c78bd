"""Where the runs of a cluster publish their demands: one key for each run in the key-value store of Ray's head."""

from __future__ import annotations

import itertools

from elastic.cluster.sharing import STALE_S, Demand
from elastic.compat.ray import delete_value, get_value, list_keys, put_value

_NAMESPACE = b"elastic"
_PREFIX = b"run/"


def withdraw_demand(run: str) -> None:
    """Remove the run's demand: the run has ended."""
    delete_value(_key(run), _NAMESPACE)


def _key(run: str) -> bytes:
    return _PREFIX + run.encode()


class Demands:
    """A run's view of all demands. Needs a connection to Ray.

    Clocks of machines differ, so the age of another run's demand counts from when it was first read here.
    """

    def __init__(self, run: str):
        self._key = _key(run)
        self._beats = itertools.count()
        self._read: dict[bytes, tuple[bytes, float]] = {}

    def exchange(self, mine: Demand, now: float) -> list[Demand]:
        """Publish this run's demand; returns those of the other living runs.

        Args:
            now: monotonic seconds.
        """
        put_value(self._key, mine.to_bytes(next(self._beats)), _NAMESPACE)
        read: dict[bytes, tuple[bytes, float]] = {}
        for key in list_keys(_PREFIX, _NAMESPACE):
            value = get_value(key, _NAMESPACE) if key != self._key else None
            if value is None:
                continue
            known = self._read.get(key)
            read[key] = known if known is not None and known[0] == value else (value, now)
            if now - read[key][1] > 6 * STALE_S:
                delete_value(key, _NAMESPACE)  # a driver that was killed left it behind
        self._read = read
        return [Demand.from_bytes(value) for value, since in read.values() if now - since < STALE_S]
