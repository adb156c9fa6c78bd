"""What every worker must know of a step besides gradients: loss, weight, metrics and sample hash of each microbatch.

Each rank contributes one row of int64 a microbatch (float64 values as their bits), one small all-gather brings all
rows to all ranks, and everyone sums them in the same tree. The gather is started before the last backward pass, so
it hides under it.

A row has a column for each metric, and how many there are is the job's to say, on each rank by itself. So rows have
columns for those that everyone has agreed upon, and a hash of the names that this rank has. If all have others, as in
the first step of a world, a second gather brings those; if they differ, everyone sees it in the same step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from elastic.compat.torch_groups import all_gather_flat
from elastic.errors import ConfigError
from elastic.parallel.tree import tree_sum_of_rows

OWN_WEIGHT = "\0weight"  # ends the name of the column that a metric is divided by


def names_of(columns: Iterable[str]) -> list[str]:
    """The metrics among columns, without their weights."""
    return [name for name in columns if not name.endswith(OWN_WEIGHT)]


@dataclass(frozen=True)
class StepRecord:
    """Sums over a whole step or evaluation: identical on every rank, and at every world size in bitwise.

    Args:
        attached: what each rank attached, by rank.
        said: of what ranks said, the largest of each number.
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
        return self.loss_sum / self.weight if self.weight else float("nan")

    def mean_metrics(self) -> dict[str, float]:
        """Each metric divided by the weight, or by its own."""
        found = {}
        for name in names_of(self.metrics):
            weight = self.metrics.get(name + OWN_WEIGHT, self.weight)
            found[name] = self.metrics[name] / weight if weight else float("nan")
        return found


_MIXED = -1  # in place of the hash of a rank's names: its microbatches do not agree


@dataclass
class Metrics:
    """The names of the metrics that all ranks of a world agreed upon; `source` is what gives them, for people."""

    source: str = "loss()"
    names: list[str] = field(default_factory=list)


@dataclass
class Records:
    """Collects the rows of one rank's microbatches, then gathers those of all.

    Args:
        runs: the microbatches of each rank, as dealt; together they are all, each once.
        rank: this rank.
        buffer_words: 64-bit words of the mask of what passes changed or used.
        metrics: kept from step to step by whoever makes these; brought up to date by `PendingRecord.result`.
        check: raises where what a gather brought is no result, since it was aborted.
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
    _others: list[str] | None = None  # those of a microbatch that has other ones than the first
    _attached: tuple[torch.Tensor | float, ...] = ()
    _said: tuple[int, ...] = ()

    def add(
        self, loss: torch.Tensor, weight: Any, metrics: Mapping[str, Any], digests: tuple[int, ...], changed: int = 0
    ) -> None:
        """One forward pass over `len(digests)` microbatches; the sums go into the row of the first."""
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
        """Set further bits of the mask."""
        for i in range(self.buffer_words):
            self._words[-1][1 + i] |= _signed(mask >> (64 * i))

    def attach(self, *values: torch.Tensor | float) -> None:
        """Numbers of this rank (scalars on its device, or here), which all ranks are to know. All tell as many."""
        self._attached = values

    def say(self, numbers: Sequence[int]) -> None:
        """Whole numbers of 64 bits, of each of which all ranks are to know the largest. All say as many."""
        self._said = tuple(numbers)

    def gather(self, group: dist.ProcessGroup | None) -> PendingRecord:
        """Start the all-gather; call `result` on what comes back after the backward pass."""
        assert self._names is not None
        assert len(self._words) == len(self.runs[self.rank])
        mine = self._matrix(max(map(len, self.runs)))
        if len(self.runs) == 1:
            return PendingRecord(self, mine.unsqueeze(0), None)
        everyone = torch.empty(len(self.runs), *mine.shape, dtype=torch.int64, device=self.device)
        work = all_gather_flat(everyone.view(-1), mine.view(-1), group=group, async_op=True)
        return PendingRecord(self, everyone, work, mine, group)

    def _matrix(self, height: int) -> torch.Tensor:
        """This rank's rows on its device, int64. Nothing here waits for a device: the numbers go there in one copy from
        pinned memory, and what the model computed is there already."""
        agreed = self.metrics.names
        values = self._rows if self._names == agreed else [[*v[:2], *(0.0 for _ in agreed)] for v in self._rows]
        mark = _MIXED if self._others is not None else _mark(self._names or [])
        said = self._said
        mine = self._table(height, [[*words, mark] for words in self._words], values, len(self._attached), said)
        width = mine.shape[1] - len(said)
        for column, given in enumerate(self._attached, width - len(self._attached)):
            value = given.detach() if isinstance(given, torch.Tensor) else torch.tensor(given, dtype=torch.float64)
            mine[0, column] = value.double().view(torch.int64)
        return mine

    def _table(
        self, height: int, words: list[list[int]], values: list[list[Any]], more: int, last: tuple[int, ...] = ()
    ) -> torch.Tensor:
        """A row for each microbatch: words, then values; zeros below, and in `more` columns. The first row has `last`
        at its end."""
        first, count = len(words[0]), len(values)
        shape = height, first + len(values[0]) + more + len(last)
        host = torch.zeros(shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        integers = host.numpy()
        integers[:count, :first] = words
        integers[0, shape[1] - len(last) :] = last
        floats, computed = integers.view(np.float64), []
        for column, here in enumerate(zip(*values), first):
            if any(isinstance(v, torch.Tensor) for v in here):
                computed.append((column, here))
            else:
                floats[:count, column] = here
        mine = host.to(self.device, non_blocking=True)
        for column, here in computed:
            zero = torch.zeros((), dtype=torch.float64, device=self.device)
            found = [v if isinstance(v, torch.Tensor) else zero + v for v in here]
            mine[:count, column] = torch.stack(found).view(torch.int64)
        return mine


def _detached(value: Any) -> Any:
    """A number, or a float64 scalar where the model computed it."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    value = value.detach()
    return value.double().reshape(()) if value.device.type != "cpu" else value.item()


@dataclass
class PendingRecord:
    """An all-gather under way."""

    records: Records
    everyone: torch.Tensor
    work: Any
    _keep: torch.Tensor | None = None
    group: dist.ProcessGroup | None = None

    def result(self) -> StepRecord:
        """Wait, and sum in tree order over the microbatches of the whole step.

        Raises:
            ConfigError: on every rank, where metrics differ by name, or a weight is negative.
            WorldBroken: the gather was aborted, as `Records.check` says.
        """
        if self.work is not None:
            self.work.wait()
        gathered = self.everyone.cpu()
        self.records.check()
        host = gathered.numpy()  # numpy costs a tenth of torch for arrays as small as these
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
        with np.errstate(all="ignore"):  # who looks at the sum finds what is not finite
            total = tree_sum_of_rows(sums).tolist()
        changed = 0
        for i in range(self.records.buffer_words):
            changed |= int(np.bitwise_or.reduce(rows[:, 1 + i]).view(np.uint64)) << (64 * i)
        names = self.records.metrics.names
        digest = xxhash.xxh3_64_hexdigest(rows[:, 0].astype("<i8").tobytes())
        finite = np.isfinite(sums[:, :2]).all(1)
        first_bad = None if finite.all() else int(finite.argmin())
        metrics = dict(zip(names, total[2:]))
        return StepRecord(
            total[0], total[1], metrics, digest, changed, first_bad, tuple(map(tuple, attached)), tuple(said)
        )

    def _in_order(self, host: np.ndarray) -> np.ndarray:
        """The rows of the whole step, by microbatch."""
        order = [microbatch for run in self.records.runs for microbatch in run]
        rows = np.empty((len(order), host.shape[2]), np.int64)
        rows[order] = np.concatenate([host[rank, : len(run)] for rank, run in enumerate(self.records.runs)])
        return rows

    def _check_weights(self, weights: np.ndarray) -> None:
        negative = (weights < 0) & np.isfinite(weights)
        if negative.any():
            bad = int(negative.argmax())
            raise ConfigError(
                f"the weight that {self.records.metrics.source} returned is {weights[bad]:g} in microbatch {bad}; "
                "return the number of samples or tokens that the loss was summed over"
            )

    def _agree(self, marks: list[int]) -> np.ndarray:
        """All ranks have other metrics than in the step before: the values of those, float64, by microbatch."""
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
        table = records._table(height, [[] for _ in values], values, 0)
        gathered = self._gather(table).cpu()
        records.check()
        return self._in_order(gathered.numpy()).view(np.float64)

    def _gather(self, mine: torch.Tensor) -> torch.Tensor:
        """Tensors of one shape, of all ranks."""
        if len(self.records.runs) == 1:
            return mine.unsqueeze(0)
        everyone = torch.empty(len(self.records.runs), *mine.shape, dtype=mine.dtype, device=mine.device)
        all_gather_flat(everyone.view(-1), mine.view(-1), group=self.group)
        return everyone

    def _gather_objects(self, value: Any) -> list[Any]:
        """A JSON value of each rank."""
        device, data = self.records.device, json.dumps(value).encode()
        lengths = self._gather(torch.tensor([len(data)], device=device)).view(-1).tolist()
        self.records.check()
        mine = torch.zeros(max(lengths), dtype=torch.uint8)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        gathered = self._gather(mine.to(device)).cpu()
        self.records.check()
        return [json.loads(row[:length].tobytes()) for row, length in zip(gathered.numpy(), lengths)]


def _mark(names: list[str]) -> int:
    """A hash of names that no `_MIXED` is."""
    return xxhash.xxh3_64_intdigest(json.dumps(names).encode()) >> 1


def _listed(names: list[str]) -> str:
    return ", ".join(names_of(names)) or "none"


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >= 1 << 63 else word
