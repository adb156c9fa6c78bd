"""What every worker must know of a step besides gradients: loss, weight, metrics and sample hash of each microbatch.

Each rank contributes one row of int64 a microbatch (float64 values as their bits), one small all-gather brings all
rows to all ranks, and everyone sums them in the same tree. The gather is started before the last backward pass, so
it hides under it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from elastic.parallel.device import all_gather_flat
from elastic.parallel.tree import tree_sum


@dataclass(frozen=True)
class StepRecord:
    """Sums over a whole step or evaluation: identical on every rank, and at every world size in bitwise.

    Args:
        told: what each rank told beside, by rank.
    """

    loss_sum: float
    weight: float
    metrics: dict[str, float]
    sample_hash: str
    changed_buffers: int = 0
    nonfinite_microbatch: int | None = None
    told: tuple[tuple[float, ...], ...] = ()

    @property
    def loss(self) -> float:
        return self.loss_sum / self.weight if self.weight else float("nan")

    def mean_metrics(self) -> dict[str, float]:
        """Each metric divided by the weight."""
        return {name: value / self.weight if self.weight else float("nan") for name, value in self.metrics.items()}


@dataclass
class Records:
    """Collects the rows of one rank's microbatches, then gathers those of all.

    Args:
        runs: the microbatches of each rank, as dealt; together they are all, each once.
        rank: this rank.
        buffer_words: 64-bit words of the mask of what passes changed or used.
    """

    runs: list[range]
    rank: int
    device: torch.device
    buffer_words: int = 0
    _words: list[list[int]] = field(default_factory=list)
    _values: list[list[Any]] = field(default_factory=list)
    _names: list[str] | None = None
    _told: tuple[torch.Tensor | float, ...] = ()

    def add(
        self, loss: torch.Tensor, weight: Any, metrics: Mapping[str, Any], digests: tuple[int, ...], changed: int = 0
    ) -> None:
        """One forward pass over `len(digests)` microbatches; the sums go into the row of the first."""
        names = sorted(metrics)
        if self._names is None:
            self._names = names
        elif names != self._names:
            raise ValueError(f"loss() returned metrics {names}, but {self._names} for the microbatch before")
        values = [loss, weight, *(metrics[n] for n in names)]
        rest = [0] * len(values)
        for i, digest in enumerate(digests):
            words = [_signed(changed >> (64 * w)) if i == 0 else 0 for w in range(self.buffer_words)]
            self._words.append([digest, *words])
            self._values.append([_detached(v) for v in values] if i == 0 else rest)

    def __len__(self) -> int:
        return len(self._words)

    def mark(self, mask: int) -> None:
        """Set further bits of the mask."""
        for i in range(self.buffer_words):
            self._words[-1][1 + i] |= _signed(mask >> (64 * i))

    def tell(self, *values: torch.Tensor | float) -> None:
        """Numbers of this rank (scalars on its device, or here), which all ranks are to know. All tell as many."""
        self._told = values

    def gather(self, group: dist.ProcessGroup | None) -> PendingRecord:
        """Start the all-gather; call `result` on what comes back after the backward pass."""
        assert self._names is not None
        assert len(self._words) == len(self.runs[self.rank])
        mine = self._matrix(max(map(len, self.runs)))
        if len(self.runs) == 1:
            return PendingRecord(self, mine.unsqueeze(0), None)
        everyone = torch.empty(len(self.runs), *mine.shape, dtype=torch.int64, device=self.device)
        work = all_gather_flat(everyone.view(-1), mine.view(-1), group=group, async_op=True)
        return PendingRecord(self, everyone, work, mine)

    def _matrix(self, height: int) -> torch.Tensor:
        """This rank's rows on its device, int64. Nothing here waits for a device: the numbers go there in one copy from
        pinned memory, and what the model computed is there already."""
        first, count = 1 + self.buffer_words, len(self._values)
        width = first + len(self._values[0]) + len(self._told)
        host = torch.zeros(height, width, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        words = host.numpy()
        words[:count, :first] = self._words
        floats, computed = words.view(np.float64), []
        for column, values in enumerate(zip(*self._values), first):
            if any(isinstance(v, torch.Tensor) for v in values):
                computed.append((column, values))
            else:
                floats[:count, column] = values
        mine = host.to(self.device, non_blocking=True)
        for column, values in computed:
            zero = torch.zeros((), dtype=torch.float64, device=self.device)
            found = [v if isinstance(v, torch.Tensor) else zero + v for v in values]
            mine[:count, column] = torch.stack(found).view(torch.int64)
        for column, told in enumerate(self._told, width - len(self._told)):
            value = told.detach() if isinstance(told, torch.Tensor) else torch.tensor(told, dtype=torch.float64)
            mine[0, column] = value.double().view(torch.int64)
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

    def result(self) -> StepRecord:
        """Wait, and sum in tree order over the microbatches of the whole step."""
        if self.work is not None:
            self.work.wait()
        host = self.everyone.cpu().numpy()  # numpy costs a tenth of torch for arrays as small as these
        order = [microbatch for run in self.records.runs for microbatch in run]
        rows = np.empty((len(order), host.shape[2]), np.int64)
        rows[order] = np.concatenate([host[rank, : len(run)] for rank, run in enumerate(self.records.runs)])
        words = 1 + self.records.buffer_words
        end = rows.shape[1] - len(self.records._told)
        sums = rows[:, words:end].copy().view(np.float64)
        told = tuple(map(tuple, host[:, 0, end:].copy().view(np.float64).tolist())) if self.records._told else ()
        with np.errstate(all="ignore"):  # who looks at the sum finds what is not finite
            total = tree_sum(list(sums), np.add).tolist()
        changed = 0
        for i in range(self.records.buffer_words):
            changed |= int(np.bitwise_or.reduce(rows[:, 1 + i]).view(np.uint64)) << (64 * i)
        names = self.records._names or []
        digest = xxhash.xxh3_64_hexdigest(rows[:, 0].astype("<i8").tobytes())
        finite = np.isfinite(sums[:, :2]).all(1)
        first_bad = None if finite.all() else int(finite.argmin())
        return StepRecord(total[0], total[1], dict(zip(names, total[2:])), digest, changed, first_bad, told)


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >= 1 << 63 else word
