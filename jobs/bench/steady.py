"""A job with steps of a chosen length, for measuring stalls: a small multi-layer perceptron on made-up numbers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import elastic
from elastic import BatchOptions, ObserveOptions, TrainConfig

WIDTH = 256
CONFIG = TrainConfig(batch=BatchOptions(global_size=24, microbatches=12), observe=ObserveOptions(tensorboard=False))


def build_model(width: int = WIDTH):
    from torch import nn

    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 8))


@dataclass
class Steady(elastic.Job):
    """A multi-layer perceptron whose forward passes take a given time."""

    pause: float = field(default=0.05, metadata={"help": "seconds that a forward pass waits"})
    width: int = field(default=WIDTH, metadata={"help": "of the hidden layers"})

    def model(self):
        return build_model(self.width)

    def tensor_plan(self):
        return {"0": "colwise", "2": "rowwise"}

    def stages(self, model):
        return list(model)

    def optimizer(self, model):
        import torch

        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train_data(self):
        return range(100_000)

    def collate_fn(self, samples):
        import torch

        numbers = torch.tensor(samples, dtype=torch.float32).unsqueeze(1)
        return torch.sin(numbers * torch.arange(1, 65) * 0.01), torch.tensor(samples) % 8

    def loss(self, model, batch):
        from torch.nn import functional

        time.sleep(self.pause)
        x, y = batch
        return functional.cross_entropy(model(x), y, reduction="sum"), len(y), {}


if __name__ == "__main__":
    elastic.main(Steady, CONFIG)
