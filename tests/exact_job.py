"""A job whose arithmetic never rounds, so that its weights are the same on every machine and every torch.

Features and weights are small multiples of powers of two, the loss is linear, and rates are powers of two. Runs of it
are stored under `tests/stored_runs`: what was written once must load for ever.
"""

from __future__ import annotations

import torch
from torch import nn

import elastic


class Constants(nn.Module):
    """Buffers of every dtype, with values that a wrong reader would change."""

    def __init__(self) -> None:
        super().__init__()
        values = torch.tensor([[1.5, -2.0, 0.0], [3.0, -0.0, 64.0]])
        for dtype in (
            torch.float32,
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.bool,
            torch.complex64,
            torch.complex128,
        ):
            self.register_buffer(f"as_{dtype}".replace("torch.", ""), values.to(dtype))
        self.register_buffer("as_uint8", torch.arange(6, dtype=torch.uint8).reshape(1, 6))
        self.register_buffer("scalar", torch.tensor(7))
        self.register_buffer("empty", torch.empty(0, 3))


class Network(nn.Module):
    """Two layers that are summed, one frozen, and the constants."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)
        self.frozen = nn.Linear(4, 3, bias=False).requires_grad_(False)
        self.constants = Constants()
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.copy_((torch.arange(parameter.numel()).reshape(parameter.shape) - i) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + 2 * self.second(x) + self.frozen(x)


class Exact(elastic.Job):
    """Momentum makes the weights depend on the optimizer's state, and the average on the job's own."""

    def model(self) -> nn.Module:
        network = Network()
        self.average, self.updates = network.first.weight.detach().clone(), 0
        return network

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=2**-5, momentum=0.5)

    def train_data(self):
        return [(torch.tensor([i % 3, i % 5, i % 7, -(i % 2)]).float(), torch.tensor(i % 3)) for i in range(64)]

    def loss(self, model, batch):
        x, chosen = batch
        return model(x).gather(1, chosen[:, None]).sum(), len(x), {}

    def after_step(self, model: nn.Module, step: int) -> None:
        self.average += (model.first.weight.detach() - self.average) / 2
        self.updates += 1

    def extra_state(self):
        return {"average": self.average, "updates": self.updates}

    def load_extra_state(self, values) -> None:
        self.updates = values["updates"]
