"""The order of samples that lie in shards: random, but such that each shard is read once, whoever trains.

The shards are permuted, and the line of their samples is cut into V stretches, one for each microbatch of a step, as
long as that microbatch needs samples in this epoch. A stretch is cut into windows, and the samples of a window are
permuted. So a microbatch reads its own stretch of the data from begin to end, window by window, and workers, which are
dealt microbatches, read no byte that another one reads. All of it is a pure function of (seed, epoch, position).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elastic.data.order import permute
from elastic.job import Plan
from elastic.seeds import derive


@dataclass(frozen=True)
class Piece:
    """Rows `[begin, end)` of a shard."""

    shard: int
    begin: int
    end: int


@dataclass(frozen=True)
class Window:
    """The samples of one window: in what pieces they lie, and their ids in the order in which they are trained."""

    pieces: tuple[Piece, ...]
    ids: np.ndarray


KEPT = 3
Key = tuple[int, int, int]  # (epoch, microbatch, number of the window in its stretch)


class Windows:
    """
    Args:
        starts: int64 [shards + 1], the id of each shard's first sample, and the number of all samples.
        window: the most samples of one window.
    """

    def __init__(self, starts: np.ndarray, window: int):
        self.starts, self.window = starts, window
        self._epochs: dict[tuple[int, ...], _Epoch] = {}
        self._windows: dict[int, dict[Key, Window]] = {}  # the newest of each microbatch
        self._plan: Plan | None = None

    def __call__(self, positions: np.ndarray, plan: Plan) -> np.ndarray:
        """The ids at some positions (int64 arrays of one dimension)."""
        found = np.empty_like(positions)
        for key, where, places in self.split(positions, plan):
            found[where] = self.at(key, plan).ids[places]
        return found

    def split(self, positions: np.ndarray, plan: Plan) -> list[tuple[Key, np.ndarray, np.ndarray]]:
        """The windows that positions are in: for each its key, a mask of the positions, and their places in it."""
        epochs = positions // plan.samples
        slots = positions // plan.microbatch_size % (plan.batch_size // plan.microbatch_size)
        before = _count(slots, positions, plan) - _count(slots, epochs * plan.samples, plan)
        numbers, places = np.divmod(before, self.window)
        keys = np.stack([epochs, slots, numbers])
        found = []
        for key in np.unique(keys, axis=1).T:
            where = (keys == key[:, None]).all(0)
            found.append(((int(key[0]), int(key[1]), int(key[2])), where, places[where]))
        return found

    def following(self, key: Key, plan: Plan) -> Key:
        """The window that comes after one for the same microbatch."""
        epoch, slot, number = key
        ends = self._epoch(epoch, plan).bounds
        more = (number + 1) * self.window < ends[slot + 1] - ends[slot]
        return (epoch, slot, number + 1) if more else (epoch + 1, slot, 0)

    def at(self, key: Key, plan: Plan) -> Window:
        """One window; the newest KEPT of each microbatch stay."""
        if plan != self._plan:
            self._plan, self._epochs, self._windows = plan, {}, {}
        kept = self._windows.setdefault(key[1], {})
        if key not in kept:
            while len(kept) >= KEPT:
                kept.pop(next(iter(kept)))
            kept[key] = self._made(key, plan)
        return kept[key]

    def _made(self, key: Key, plan: Plan) -> Window:
        epoch, slot, number = key
        whole = self._epoch(epoch, plan)
        begin = int(whole.bounds[slot]) + number * self.window
        end = min(begin + self.window, int(whole.bounds[slot + 1]))
        pieces, ids, at = [], [], begin
        place = int(np.searchsorted(whole.ends, begin, side="right"))
        while at < end:
            shard, upto = int(whole.shards[place]), min(end, int(whole.ends[place]))
            first = at - (int(whole.ends[place]) - int(self.starts[shard + 1] - self.starts[shard]))
            pieces.append(Piece(shard, first, first + upto - at))
            ids.append(np.arange(first, first + upto - at, dtype=np.int64) + self.starts[shard])
            at, place = upto, place + 1
        chosen = permute(derive("window", plan.seed, slot, number), epoch, end - begin, np.arange(end - begin))
        return Window(tuple(p for p in pieces if p.end > p.begin), np.concatenate(ids)[chosen])

    def _epoch(self, epoch: int, plan: Plan) -> _Epoch:
        key = (epoch, plan.seed, plan.samples, plan.batch_size, plan.microbatch_size)
        if key not in self._epochs:
            while len(self._epochs) > 2:
                self._epochs.pop(next(iter(self._epochs)))
            count = len(self.starts) - 1
            shards = permute(derive("shards", plan.seed), epoch, count, np.arange(count))
            slots = np.arange(plan.batch_size // plan.microbatch_size)
            taken = [_count(slots, np.full_like(slots, (epoch + more) * plan.samples), plan) for more in (0, 1)]
            bounds = np.concatenate([[0], np.cumsum(taken[1] - taken[0])])
            self._epochs[key] = _Epoch(shards, np.cumsum(np.diff(self.starts)[shards]), bounds)
        return self._epochs[key]


@dataclass(frozen=True)
class _Epoch:
    """`ends`: where the samples of each of the permuted shards end in their line; `bounds`: where stretches begin, and
    the end."""

    shards: np.ndarray
    ends: np.ndarray
    bounds: np.ndarray


def _count(slots: np.ndarray, before: np.ndarray, plan: Plan) -> np.ndarray:
    """How many of the positions below `before` are of these microbatches."""
    steps, rest = np.divmod(before, plan.batch_size)
    size = plan.microbatch_size
    return steps * size + np.clip(rest - slots * size, 0, size)
