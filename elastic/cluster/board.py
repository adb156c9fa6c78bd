"""Where the runs of a cluster tell each other how they stand: a key for each run in the store of Ray's head."""

from __future__ import annotations

import itertools

from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from elastic.cluster.sharing import STALE_S, Standing

_NAMESPACE = b"elastic"
_PREFIX = b"run/"


def leave_board(run: str) -> None:
    """The run has ended: it says nothing any more."""
    _internal_kv_del(_key(run), namespace=_NAMESPACE)


def _key(run: str) -> bytes:
    return _PREFIX + run.encode()


class Board:
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
        _internal_kv_put(self._key, mine.to_bytes(next(self._beats)), overwrite=True, namespace=_NAMESPACE)
        heard: dict[bytes, tuple[bytes, float]] = {}
        for key in _internal_kv_list(_PREFIX, namespace=_NAMESPACE):
            value = _internal_kv_get(key, namespace=_NAMESPACE) if key != self._key else None
            if value is None:
                continue
            known = self._heard.get(key)
            heard[key] = known if known is not None and known[0] == value else (value, now)
            if now - heard[key][1] > 6 * STALE_S:
                _internal_kv_del(key, namespace=_NAMESPACE)  # what a killed driver left behind
        self._heard = heard
        return [Standing.from_bytes(value) for value, since in heard.values() if now - since < STALE_S]
