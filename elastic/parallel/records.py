"""What every worker must know of a step besides gradients: loss, weight, metrics and sample hash of each microbatch.

Each rank contributes one row of int64 per microbatch (float64 values as their bits). One small all-gather brings all
rows to all ranks, and every rank sums them in the same tree. The gather starts before the last backward pass, which
hides it. With DDP the rows travel in its sum of gradients instead (see `carrier`).

A row has a column for each metric, but each rank learns the number of metrics from the job by itself. So rows have
columns for the names on which all ranks agreed before, and a hash of the names that this rank has now. If all ranks
have the same new names, as in the first step of a world, a second gather brings their values. If the names differ, all
ranks see that in the same step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import isfinite
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from elastic.compat.torch_groups import all_gather_flat
from elastic.errors import ConfigError
from elastic.parallel.carrier import Carrier
from elastic.parallel.tree import tree_sum_of_rows

OWN_WEIGHT = "\0weight"  # ends the name of the column with the weight that a metric is divided by


def names_of(columns: Iterable[str]) -> list[str]:
    """Return the metrics among columns, without their weights."""
    return [name for name in columns if not name.endswith(OWN_WEIGHT)]


@dataclass(frozen=True)
class StepRecord:
    """Sums over a whole step or evaluation: identical on every rank, and in bitwise at every world size.

    Args:
        loss_sum, weight: of all samples.
        metrics: sums by name.
        sample_hash: a hash of the samples of all microbatches, in their order.
        changed_buffers: the union of all masks.
        nonfinite_microbatch: the first whose loss or weight is not finite.
        attached: the numbers that each rank attached, by rank.
        said: the largest of each number that ranks said.
    """

    loss_sum: float
    weight: float
    metrics: dict[str, float]
    sample_hash: str
    changed_buffers: int = 0
    nonfinite_microbatch: int | None = None
    attached: tuple[tuple[float, ...], ...] = ()
    said: tuple[int, ...] = ()

    @property
    def loss(self) -> float:
        """The mean loss; NaN if no sample has a weight."""
        return self.loss_sum / self.weight if self.weight else float("nan")

    def mean_metrics(self) -> dict[str, float]:
        """Return each metric divided by the weight, or by a weight of its own."""
        found = {}
        for name in names_of(self.metrics):
            weight = self.metrics.get(name + OWN_WEIGHT, self.weight)
            found[name] = self.metrics[name] / weight if weight else float("nan")
        return found


_MIXED = -1  # instead of the hash of a rank's names, if its microbatches have different names


@dataclass
class Metrics:
    """The names of the metrics on which all ranks of a world agreed.

    Args:
        source: the function that returns them, for messages.
    """

    source: str = "loss()"
    names: list[str] = field(default_factory=list)


@dataclass
class Records:
    """Collects the rows of one rank's microbatches, then gathers those of all ranks.

    Args:
        runs: the microbatches of each rank, as dealt: each microbatch exactly once.
        rank: of this process, in `runs`.
        buffer_words: the size of the mask that a pass may set bits of, in 64-bit words.
        metrics: kept from step to step by the caller; `PendingRecord.result` brings the names up to date.
        check: raises if the group was aborted, so that what a gather brought is no result.
    """

    runs: list[range]
    rank: int
    device: torch.device
    buffer_words: int = 0
    metrics: Metrics = field(default_factory=Metrics)
    check: Callable[[], None] = lambda: None
    _words: list[list[int]] = field(default_factory=list)
    _rows: list[list[Any]] = field(default_factory=list)
    _names: list[str] | None = None
    _others: list[str] | None = None  # the names of a microbatch that has other metrics than the first
    _attached: tuple[torch.Tensor | float, ...] = ()
    _said: tuple[int, ...] = ()

    def add(
        self, loss: torch.Tensor, weight: Any, metrics: Mapping[str, Any], digests: tuple[int, ...], changed: int = 0
    ) -> None:
        """Add one forward pass.

        Args:
            loss, weight: sums over the pass.
            digests: a hash of the samples of each of its microbatches. The sums go into the row of the first.
            changed: a mask, for example of the buffers that the pass changed.
        """
        names = sorted(metrics)
        if self._names is None:
            self._names = names
        elif names != self._names:
            self._others = names
        values = [loss, weight, *(metrics.get(n, 0.0) for n in self._names)]
        rest = [0] * len(values)
        for i, digest in enumerate(digests):
            words = [_signed(changed >> (64 * w)) if i == 0 else 0 for w in range(self.buffer_words)]
            self._words.append([digest, *words])
            self._rows.append([_detached(v) for v in values] if i == 0 else rest)

    def __len__(self) -> int:
        return len(self._words)

    def mark(self, mask: int) -> None:
        """Set further bits of the mask of the last pass."""
        for i in range(self.buffer_words):
            self._words[-1][1 + i] |= _signed(mask >> (64 * i))

    def attach(self, *values: torch.Tensor | float) -> None:
        """Set numbers of this rank which all ranks shall know: scalars on its device or on the host, as many on every
        rank."""
        self._attached = values

    def say(self, numbers: Sequence[int]) -> None:
        """Set whole numbers of 64 bits, as many on every rank: all ranks get the largest of each."""
        self._said = tuple(numbers)

    def gather(self, group: dist.ProcessGroup | None, carrier: Carrier | None = None) -> PendingRecord:
        """Start the all-gather, or load the carrier if that has room, and return what is pending; call its `result`
        after the backward pass."""
        assert self._names is not None
        assert len(self._words) == len(self.runs[self.rank])
        mine = self._matrix(max(map(len, self.runs)))
        if len(self.runs) == 1:
            return PendingRecord(self, mine.unsqueeze(0), None)
        if carrier is not None and carrier.has_room(mine):
            return PendingRecord(self, carrier.load(mine), None, group=group)
        everyone = torch.empty(len(self.runs), *mine.shape, dtype=torch.int64, device=self.device)
        work = all_gather_flat(everyone.view(-1), mine.view(-1), group=group, async_op=True)
        return PendingRecord(self, everyone, work, mine, group)

    def _matrix(self, height: int) -> torch.Tensor:
        """Make this rank's rows on its device: int64 [height, columns].

        Nothing here waits for the device: numbers of the host go there in one copy from pinned memory, and what the
        model computed is there already.
        """
        agreed = self.metrics.names
        values = self._rows if self._names == agreed else [[*v[:2], *(0.0 for _ in agreed)] for v in self._rows]
        mark = _MIXED if self._others is not None else _mark(self._names or [])
        return self._table(height, [[*words, mark] for words in self._words], values, self._attached, self._said)

    def _table(
        self,
        height: int,
        words: list[list[int]],
        values: list[list[Any]],
        attached: Sequence[torch.Tensor | float] = (),
        said: Sequence[int] = (),
    ) -> torch.Tensor:
        """Make a table with one row per microbatch: words, then values; zeros below. Further columns of the first row
        have what is attached and said."""
        first, count, behind = len(words[0]), len(values), len(words[0]) + len(values[0])
        shape = height, behind + len(attached) + len(said)
        host = torch.zeros(shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        integers = host.numpy()
        integers[:count, :first] = words
        integers[0, shape[1] - len(said) :] = said
        floats, computed = integers.view(np.float64), []
        for column, here in enumerate(zip(*values), first):
            if any(isinstance(v, torch.Tensor) for v in here):
                computed.append((column, here))
            else:
                floats[:count, column] = here
        for column, one in enumerate(attached, behind):
            if isinstance(one, torch.Tensor):
                computed.append((column, (one.detach().double(),)))
            else:
                floats[0, column] = one
        mine = host.to(self.device, non_blocking=True)
        for column, here in computed:
            zero = torch.zeros((), dtype=torch.float64, device=self.device)
            found = [v if isinstance(v, torch.Tensor) else zero + v for v in here]
            mine[: len(here), column] = torch.stack(found).view(torch.int64)
        return mine


def _detached(value: Any) -> Any:
    """Return a number, or a float64 scalar on the device if the model computed it there."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    return value.item() if value.device.type == "cpu" else value.detach().double().reshape(())


@dataclass
class PendingRecord:
    """An all-gather under way.

    Args:
        everyone: the rows of all ranks, int64 [ranks, height, columns]; or a function that returns them on the host
            when the backward pass is over.
        work: the handle to wait for; None if there is none.
    """

    records: Records
    everyone: torch.Tensor | Callable[[], np.ndarray]
    work: Any
    _keep: torch.Tensor | None = None
    group: dist.ProcessGroup | None = None

    def result(self) -> StepRecord:
        """Wait for the gather, and sum in tree order over the microbatches of the whole step.

        Raises:
            ConfigError: on every rank: ranks have metrics with different names, or a weight is negative.
            WorldBroken: the gather was aborted, as `Records.check` says.
        """
        if self.work is not None:
            self.work.wait()
        # for arrays as small as these numpy takes a tenth of torch's time
        host = self.everyone.cpu().numpy() if isinstance(self.everyone, torch.Tensor) else self.everyone()
        self.records.check()
        rows = self._in_order(host)
        words = 2 + self.records.buffer_words
        said_from = rows.shape[1] - len(self.records._said)
        end = said_from - len(self.records._attached)
        sums = rows[:, words:end].copy().view(np.float64)
        attached = host[:, 0, end:said_from].copy().view(np.float64).tolist() if self.records._attached else []
        said = host[:, 0, said_from:].max(0).tolist() if self.records._said else []
        if (host[:, 0, words - 1] != _mark(self.records.metrics.names)).any():
            sums = np.concatenate([sums[:, :2], self._agree(host[:, 0, words - 1].tolist())], 1)
        self._check_weights(sums[:, 1])
        with np.errstate(all="ignore"):  # the caller looks at the sums for what is not finite
            total = tree_sum_of_rows(sums).tolist()
        changed = 0
        for i in range(self.records.buffer_words):
            changed |= int(np.bitwise_or.reduce(rows[:, 1 + i]).view(np.uint64)) << (64 * i)
        names = self.records.metrics.names
        digest = xxhash.xxh3_64_hexdigest(rows[:, 0].astype("<i8", copy=False).tobytes())
        first_bad = None
        if not (isfinite(total[0]) and isfinite(total[1])):  # a sum that is finite has only finite terms
            finite = np.isfinite(sums[:, :2]).all(1)
            first_bad = None if finite.all() else int(finite.argmin())
        metrics = dict(zip(names, total[2:]))
        return StepRecord(
            total[0], total[1], metrics, digest, changed, first_bad, tuple(map(tuple, attached)), tuple(said)
        )

    def _in_order(self, host: np.ndarray) -> np.ndarray:
        """Return the rows of the whole step, by microbatch: int64 [microbatches, columns]."""
        flat: np.ndarray = host.reshape(-1, host.shape[2])
        return flat[_places(tuple(self.records.runs), host.shape[1])]

    def _check_weights(self, weights: np.ndarray) -> None:
        if weights.min() >= 0:
            return
        negative = (weights < 0) & np.isfinite(weights)
        if negative.any():
            bad = int(negative.argmax())
            raise ConfigError(
                f"the weight that {self.records.metrics.source} returned is {weights[bad]:g} in microbatch {bad}; "
                "return the number of samples or tokens that the loss was summed over"
            )

    def _agree(self, marks: list[int]) -> np.ndarray:
        """Return the values of new metrics on which all ranks agree: float64 [microbatches, metrics].

        Raises:
            ConfigError: the ranks, or the microbatches of one rank, have different names.
        """
        records = self.records
        if marks.count(marks[0]) < len(marks) or marks[0] == _MIXED:
            mine = [records._names, *([records._others] if records._others is not None else [])]
            found = [names for names_of_rank in self._gather_objects(mine) for names in names_of_rank]
            one, other = found[0], next(names for names in found if names != found[0])
            raise ConfigError(
                f"{records.metrics.source} returned the metrics {_listed(one)} for some microbatches and "
                f"{_listed(other)} for others; return the same names for every batch, 0 where there is nothing to count"
            )
        records.metrics.names = list(records._names or [])
        height, values = max(map(len, records.runs)), [v[2:] for v in records._rows]
        if not records.metrics.names:
            return np.zeros((sum(map(len, records.runs)), 0))
        table = records._table(height, [[] for _ in values], values)
        gathered = self._gather(table).cpu()
        records.check()
        return self._in_order(gathered.numpy()).view(np.float64)

    def _gather(self, mine: torch.Tensor) -> torch.Tensor:
        """Gather tensors of one shape from all ranks: [ranks, *shape]."""
        if len(self.records.runs) == 1:
            return mine.unsqueeze(0)
        everyone = torch.empty(len(self.records.runs), *mine.shape, dtype=mine.dtype, device=mine.device)
        all_gather_flat(everyone.view(-1), mine.view(-1), group=self.group)
        return everyone

    def _gather_objects(self, value: Any) -> list[Any]:
        """Gather a JSON value of each rank."""
        device, data = self.records.device, json.dumps(value).encode()
        lengths = self._gather(torch.tensor([len(data)], device=device)).view(-1).tolist()
        self.records.check()
        mine = torch.zeros(max(lengths), dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        gathered = self._gather(mine.to(device)).cpu()
        self.records.check()
        return [json.loads(row[:length].tobytes()) for row, length in zip(gathered.numpy(), lengths)]


@lru_cache(maxsize=8)  # the same in every step of a world
def _places(runs: tuple[range, ...], height: int) -> np.ndarray:
    """Where the row of each microbatch is, in the order of microbatches, if each rank's rows are `height` long."""
    order = [microbatch for run in runs for microbatch in run]
    places = np.empty(len(order), np.intp)
    places[order] = [rank * height + i for rank, run in enumerate(runs) for i in range(len(run))]
    return places


def _mark(names: Sequence[str]) -> int:
    """Hash names to a number that is never `_MIXED`."""
    return _mark_of(tuple(names))


@lru_cache(maxsize=64)  # a job has the same names in every step
def _mark_of(names: tuple[str, ...]) -> int:
    return xxhash.xxh3_64_intdigest(json.dumps(names).encode()) >> 1


def _listed(names: list[str]) -> str:
    return ", ".join(names_of(names)) or "none"


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >= 1 << 63 else word
