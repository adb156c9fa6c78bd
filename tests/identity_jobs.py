"""Small jobs whose data, batches or models are what others might be, or differ from part to part of a run."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset

import elastic

FEATURES, CLASSES = 6, 2


class Noisy:
    """Samples with noise of three generators, that is drawn when they are fetched."""

    def __init__(self, count: int = 100):
        rows = torch.arange(count * FEATURES, dtype=torch.float64).reshape(count, FEATURES)
        self.x = (rows * 0.37 % 2 - 1).float()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        noise = torch.randn(FEATURES) + random.random() + float(np.random.rand())
        return self.x[i] + 0.3 * noise, int(self.x[i, 0] > 0)


class NoisyOnce(Noisy):
    """The same, drawn once for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, tuple[torch.Tensor, int]] = {}

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if i not in self.kept:
            self.kept[i] = super().__getitem__(i)
        return self.kept[i]


class NoisyTogether(Noisy):
    """The same, several in one call."""

    def __getitems__(self, ids: list[int]) -> list[tuple[torch.Tensor, int]]:
        noise = torch.randn(len(ids), FEATURES)
        return [(self.x[i] + 0.3 * n, int(self.x[i, 0] > 0)) for i, n in zip(ids, noise)]


class NoisyBatches(Noisy):
    """The same, as whole batches that need no collate_fn."""

    def __getitems__(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[ids] + 0.3 * torch.randn(len(ids), FEATURES), (self.x[ids, 0] > 0).long()


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    y: torch.Tensor
    note: str = ""


class Mover:
    """Moves itself, and returns nothing, as many a hand-written batch does."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor):
        self.x, self.y, self.moved = x, y, False

    def to(self, device: Any) -> None:
        self.x, self.y, self.moved = self.x.to(device), self.y.to(device), True


@dataclass
class Augmented(elastic.Job):
    """Trains on random samples, of a dataset or a collate_fn of this kind."""

    kind: str = field(default="items", metadata={"help": "items, keeps, together, batches, subset, split, mixup"})

    def model(self) -> nn.Module:
        return nn.Linear(FEATURES, CLASSES)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def _splits(self) -> list[Any]:
        ids = np.random.permutation(130).tolist()  # numpy seeds itself anew in every process
        return [Subset(Noisy(130), ids[:100]), Subset(Noisy(130), ids[100:])]

    def train_data(self) -> Any:
        if self.kind == "split":
            return self._splits()[0]
        if self.kind == "subset":
            return Subset(NoisyTogether(130), list(range(129, 29, -1)))
        return {"keeps": NoisyOnce, "together": NoisyTogether, "batches": NoisyBatches}.get(self.kind, Noisy)()

    def eval_data(self) -> Any:
        return self._splits()[1] if self.kind == "split" else Noisy(20)

    def collate_fn(self, samples: Any) -> Any:
        if self.kind == "batches" and isinstance(samples, tuple):
            return Pair(*samples)
        x, y = torch.utils.data.default_collate(samples)
        if self.kind == "mixup":
            share = random.random()
            x = share * x + (1 - share) * x[torch.randperm(len(x))]
        return Record(x, y)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(model(batch.x), batch.y, reduction="sum"), len(batch.x), {}


@dataclass
class Differing(elastic.Job):
    """Of which some environment variable makes another thing on one machine, or in one part of a run."""

    lr: float = field(default=0.1, metadata={"help": "learning rate"})

    def __post_init__(self) -> None:
        self.teacher = [nn.Linear(FEATURES, CLASSES + int(os.environ.get("TAUGHT", "0")))]

    def model(self) -> nn.Module:
        width = int(os.environ.get("WIDTH", "4"))
        return nn.Sequential(nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, CLASSES))

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=float(os.environ.get("RATE", self.lr)))

    def train_data(self) -> Any:
        return Changing(int(os.environ.get("SAMPLES", "100")), float(os.environ.get("CONTENT", "0.5")))

    def extra_state(self) -> dict[str, Any]:
        return {"number": 1}

    def load_extra_state(self, values: Any) -> None:
        if os.environ.get("REFUSES"):
            raise ValueError(f"{values} do not fit here")

    def eval_data(self) -> Any:
        return Changing(int(os.environ.get("HELD_OUT", "10")), 0.7)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        metrics = {os.environ.get("METRIC", "right"): 0.0}
        with torch.no_grad():
            taught = self.teacher[0](batch["x"])[:, :CLASSES]
        loss = F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum") + F.mse_loss(
            model(batch["x"]), taught, reduction="sum"
        )
        return loss, len(batch["y"]), metrics


class Changing:
    """Samples that go by one number. UNSEEDED makes them others each time, BROKEN is one that cannot be fetched."""

    def __init__(self, count: int, number: float):
        self.count, self.number = count, number

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i == int(os.environ.get("BROKEN", "-1")):
            raise OSError(f"sample {i} cannot be read")
        x = torch.tensor([(i * self.number * (k + 1)) % 2 - 1 for k in range(FEATURES)])
        if os.environ.get("UNSEEDED"):
            x = x + float(np.random.default_rng().random())
        return {"x": x, "y": int(x[0] > 0)}
