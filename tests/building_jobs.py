"""Small jobs whose models are used as strangers use them; see tests/test_cases_building.py."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import elastic

WIDTH = 8


class Points:
    def __init__(self, count: int = 64):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(count, 4, generator=generator), torch.randn(count, 2, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        return self.x[index], self.y[index]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 11), nn.Linear(11, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Network(nn.Module):
    def __init__(self, uses_place: bool = False) -> None:
        super().__init__()
        self.uses_place = uses_place
        self.first, self.norm = nn.Linear(4, WIDTH), nn.BatchNorm1d(WIDTH)
        self.norm.eval().requires_grad_(False)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = parametrizations.weight_norm(nn.Linear(WIDTH, 2))
        self.teachers = [nn.Linear(4, 2).eval().requires_grad_(False)]
        self.where = self.first.weight.device

    def encode(self, x):
        h = self.norm(self.first(x))
        for block in self.blocks:
            h = block(h)
        return h

    def forward(self, x):
        places = torch.arange(2.0, device=self.where) if self.uses_place else 0
        return self.last(self.encode(x)) + self.first.bias.sum() - self.teachers[0](x) + places


def keep_row_0(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gradient[0] = 0
    return gradient


@dataclass
class Building(elastic.Job):
    """Frozen normalisation, teachers on model and job, a copy of the model, parametrised weights."""

    parts: bool = field(default=False, metadata={"help": "use methods, parts and parameters, not the model"})
    hook: bool = field(default=False, metadata={"help": "a hook keeps a row of the first weight"})
    bank: bool = field(default=False, metadata={"help": "a buffer gets longer with each step"})
    place: bool = field(default=False, metadata={"help": "forward passes use the device that model() saw"})

    def model(self):
        model = Network(self.place)
        nn.init.ones_(model.first.weight)
        self.teacher = (nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.Linear(3, 2)).eval(),)
        if self.hook:
            model.first.weight.register_hook(keep_row_0)
        if self.bank:
            model.register_buffer("bank", torch.zeros(1))
        return model

    def optimizer(self, model):
        return torch.optim.Adam(model.parameters(), lr=0.05)

    def train_data(self):
        return Points()

    def eval_data(self):
        return Points(16)

    def loss(self, model, batch):
        x, y = batch
        with torch.no_grad():
            y = y + self.teacher[0](x)
        out = model.last(model.encode(x)) + model.first.bias.sum() - model.teachers[0](x) if self.parts else model(x)
        return functional.mse_loss(out, y, reduction="sum"), len(x), {}

    def after_step(self, model, step):
        if self.bank:
            model.bank = torch.cat([model.bank, model.last.bias.detach()])

    def sample(self, model):
        told = [f"seen {int(model.norm.num_batches_tracked)}", f"mean {float(model.norm.running_mean.abs().sum())}"]
        if self.hook:
            moved = (model.first.weight - 1).abs().sum(1)
            told += [f"row 0 moved {float(moved[0])}", f"row 1 {bool(moved[1] > 0)}"]
        if self.bank:
            told.append(f"bank of {len(model.bank)}")
        return ", ".join(told)


@torch.jit.script
def fused(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))) * gain + torch.sigmoid(x * 1.7)


class Scripted(Building):
    """A scripted function and a scripted module."""

    def model(self):
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.gain = nn.Linear(4, WIDTH), nn.Parameter(torch.ones(WIDTH))
                self.second = torch.jit.script(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 2)))

            def forward(self, x):
                return self.second(fused(self.first(x), self.gain))

        return Model()

    def loss(self, model, batch):
        x, y = batch
        return functional.mse_loss(model(x), y, reduction="sum"), len(x), {}

    def sample(self, model, step):
        return None


class Listed(Building):
    """Keeps a parameter of the model in a list that it has had from its beginning."""

    def __init__(self):
        self.watched = []

    def model(self):
        model = Network()
        self.watched[:] = [model.first.weight]
        return model


class Lazy(Building):
    """A layer that takes its size from the first batch."""

    def model(self):
        return nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))


class Container(Building):
    """Returns a container of modules, which has no forward pass."""

    def model(self):
        return nn.ModuleDict({"first": nn.Linear(4, 2)})


class Copying(Building):
    """Copies the model that is to be trained."""

    def optimizer(self, model):
        self.ema = copy.deepcopy(model)
        return super().optimizer(model)

    def extra_state(self):
        return {"ema": list(self.ema.parameters())}


class Mixing(Building):
    """Regularises parameters of blocks beside forward()."""

    def loss(self, model, batch):
        found, count, metrics = super().loss(model, batch)
        return found + sum(p.square().sum() for p in model.blocks.parameters()), count, metrics


class Noising(Building):
    """Its updates add noise to the parameters, as Langevin dynamics do."""

    def after_step(self, model, step):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))


class FollowingBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.up).requires_grad_(False)

    def forward(self, x):
        follow(self.teacher, self.up)
        return super().forward(x)


class Following(Building):
    """A teacher of a block follows in its forward pass."""

    def model(self):
        model = super().model()
        model.blocks[0] = FollowingBlock()
        return model


class FollowingInLoss(Building):
    """A teacher follows in the loss."""

    def model(self):
        model = super().model()
        model.copy = copy.deepcopy(model.first).requires_grad_(False)
        return model

    def loss(self, model, batch):
        follow(model.copy, model.first)
        return super().loss(model, batch)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module) -> None:
    for mine, its in zip(teacher.parameters(), student.parameters()):
        mine.data.lerp_(its, 0.01)
