"""Where the runs of a cluster tell each other how they stand: a key for each run in the store of Ray's head."""

from __future__ import annotations

import itertools

from elastic.cluster.sharing import STALE_S, Standing
from elastic.compat.ray import delete_value, get_value, list_keys, put_value

_NAMESPACE = b"elastic"
_PREFIX = b"run/"


def withdraw_standing(run: str) -> None:
    """The run has ended: it says nothing any more."""
    delete_value(_key(run), _NAMESPACE)


def _key(run: str) -> bytes:
    return _PREFIX + run.encode()


class Standings:
    """A run's view of it. Needs a connection to Ray.

    Clocks of machines differ, so how old a word of another is counts from when it was first read here.
    """

    def __init__(self, run: str):
        self._key = _key(run)
        self._beats = itertools.count()
        self._heard: dict[bytes, tuple[bytes, float]] = {}

    def exchange(self, mine: Standing, now: float) -> list[Standing]:
        """Say how this run stands; returns how the other living ones do.

        Args:
            now: monotonic seconds.
        """
        put_value(self._key, mine.to_bytes(next(self._beats)), _NAMESPACE)
        heard: dict[bytes, tuple[bytes, float]] = {}
        for key in list_keys(_PREFIX, _NAMESPACE):
            value = get_value(key, _NAMESPACE) if key != self._key else None
            if value is None:
                continue
            known = self._heard.get(key)
            heard[key] = known if known is not None and known[0] == value else (value, now)
            if now - heard[key][1] > 6 * STALE_S:
                delete_value(key, _NAMESPACE)  # what a killed driver left behind
        self._heard = heard
        return [Standing.from_bytes(value) for value, since in heard.values() if now - since < STALE_S]
