"""What every worker must know of a step besides gradients: loss, weight, metrics and sample hash of each microbatch.

Each rank contributes one row of int64 a microbatch (float64 values as their bits), one small all-gather brings all
rows to all ranks, and everyone sums them in the same tree. The gather is started before the last backward pass, so
it hides under it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from elastic.parallel.device import all_gather_flat
from elastic.parallel.tree import tree_sum


@dataclass(frozen=True)
class StepRecord:
    """Sums over a whole step or evaluation: identical on every rank, and at every world size in bitwise."""

    loss_sum: float
    weight: float
    metrics: dict[str, float]
    sample_hash: str
    changed_buffers: int = 0
    nonfinite_microbatch: int | None = None

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
    _rows: list[torch.Tensor] = field(default_factory=list)
    _names: list[str] | None = None

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
        sums = torch.stack(
            [torch.as_tensor(v, dtype=torch.float64).detach().to(self.device).reshape(()) for v in values]
        ).view(torch.int64)
        words = [_signed(changed >> (64 * i)) for i in range(self.buffer_words)]
        self._rows.append(torch.cat([torch.tensor([digests[0], *words], device=self.device), sums]))
        for digest in digests[1:]:
            self._rows.append(torch.tensor([digest] + [0] * (self.buffer_words + len(values)), device=self.device))

    def __len__(self) -> int:
        return len(self._rows)

    def mark(self, mask: int) -> None:
        """Set further bits of the mask."""
        for i in range(self.buffer_words):
            self._rows[-1][1 + i] |= _signed(mask >> (64 * i))

    def gather(self, group: dist.ProcessGroup | None) -> PendingRecord:
        """Start the all-gather; call `result` on what comes back after the backward pass."""
        assert self._names is not None
        assert len(self._rows) == len(self.runs[self.rank])
        mine = torch.stack(self._rows)
        if len(self.runs) == 1:
            return PendingRecord(self, mine.unsqueeze(0), None)
        longest = max(map(len, self.runs))
        padded = torch.zeros(longest, mine.shape[1], dtype=torch.int64, device=self.device)
        padded[: len(mine)] = mine
        everyone = torch.empty(len(self.runs), *padded.shape, dtype=torch.int64, device=self.device)
        work = all_gather_flat(everyone.view(-1), padded.view(-1), group=group, async_op=True)
        return PendingRecord(self, everyone, work, padded)


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
        host = self.everyone.cpu()
        rows = torch.cat([host[rank, : len(run)] for rank, run in enumerate(self.records.runs)])
        order = [microbatch for run in self.records.runs for microbatch in run]
        rows[order] = rows.clone()
        words = 1 + self.records.buffer_words
        sums = rows[:, words:].contiguous().view(torch.float64)
        total = tree_sum(list(sums.unbind(0)), torch.add).tolist()
        changed = 0
        for i in range(self.records.buffer_words):
            for word in rows[:, 1 + i].tolist():
                changed |= (word & (1 << 64) - 1) << (64 * i)
        names = self.records._names or []
        digest = xxhash.xxh3_64_hexdigest(rows[:, 0].contiguous().numpy().astype("<i8").tobytes())
        bad = (~torch.isfinite(sums[:, :2]).all(1)).nonzero()
        first_bad = int(bad[0]) if len(bad) else None
        return StepRecord(total[0], total[1], dict(zip(names, total[2:])), digest, changed, first_bad)


def _signed(word: int) -> int:
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >= 1 << 63 else word
