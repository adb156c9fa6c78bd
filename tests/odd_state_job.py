"""A job whose weights depend on state of every kind that training codes keep, so that nothing may be lost of it."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import elastic
from tests.tiny_jobs import FEATURES, Plain


class Pace(enum.Enum):
    SLOW = 0.5
    FULL = 1.0


@dataclass(frozen=True)
class Limits:
    low: float = -math.inf
    steps: tuple[int, ...] = (2, 4)


class Halved(nn.Linear):
    """Saves a copy of half the precision, as quantised layers do."""

    def _save_to_state_dict(self, found, prefix, keep_vars):
        super()._save_to_state_dict(found, prefix, keep_vars)
        found[prefix + "weight"] = found[prefix + "weight"].half()

    def _load_from_state_dict(self, found, prefix, *rest):
        raise AssertionError("restoring goes into live tensors")


class Scaled(nn.Module):
    """Has scales by step number, and a tensor, in its own state."""

    def __init__(self) -> None:
        super().__init__()
        self.scales: dict[int, float] = {0: 1.0}
        self.history = torch.ones(1)

    def forward(self, x):
        return x * self.scales[max(self.scales)] * float(self.history.mean())

    def get_extra_state(self):
        return {"scales": self.scales, "history": self.history}

    def set_extra_state(self, state):
        self.scales, self.history = state["scales"], state["history"]


class Remembering(torch.optim.SGD):
    """Keeps the last gradients' sums of a parameter in a list, and counts in a tuple."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                seen, (steps, kind) = state.get("seen", []), state.get("count", (0, "n"))
                state["seen"] = [*seen[-2:], p.grad.detach().clone()]
                state["count"] = (steps + 1, kind)
                assert isinstance(steps, int)
                for old in seen:
                    p.data.add_(old, alpha=-0.01 / (1 + steps))
                p.data.mul_(1 - 1e-3 * len(group.get("by", {3: 1})))


@dataclass
class OddState(Plain):
    """Everything at once."""

    most: float = math.inf
    pace: Pace = Pace.FULL
    limits: Limits = field(default_factory=Limits)
    folder: Path = Path("/tmp")
    sizes: tuple[int, ...] = (3, 2)

    def __post_init__(self) -> None:
        self.kept: dict[Any, Any] = {1: (1.0, float("inf")), "x": Pace.SLOW}
        self.scheduled = False

    def model(self):
        assert isinstance(self.folder, Path)
        assert isinstance(self.limits, Limits)
        assert self.limits.low == -math.inf < self.most == math.inf
        assert isinstance(self.sizes, tuple)
        w = self.width
        submodule, last = Halved(FEATURES, w), nn.Linear(w, 3)
        net = nn.Sequential()
        net.add_module("submodule", submodule)
        net.add_module("norm", nn.BatchNorm1d(w))
        net.add_module("scaled", Scaled())
        net.add_module("module", last)
        submodule.requires_grad_(False)
        return net

    def optimizer(self, model):
        self.scheduler = None
        self.made = Remembering([p for p in model.parameters() if p.requires_grad], lr=self.lr, momentum=0.5)
        self.average = [p.detach().clone() for p in model.module.parameters()]
        return self.made

    def after_step(self, model, step):
        group = self.made.param_groups[0]
        group["by"] = dict.fromkeys(range(step), step)
        if step == 2:  # unfrozen, in a group of its own
            model.submodule.requires_grad_(True)
            self.made.add_param_group({"params": list(model.submodule.parameters()), "lr": self.lr / 2})
        if step == 4:
            group["initial_lr"] = group["initial_lr"] * self.pace.value * 0.5
            model.norm.eval()
        first, limit = self.kept[1]
        assert limit == self.most
        self.kept = {1: (first * 1.125, limit), 10 + step: (Pace.SLOW, Limits(steps=(step,)))}
        model.scaled.scales = {**model.scaled.scales, step: 1.0 + step / 64}
        model.scaled.history = torch.cat([model.scaled.history, torch.full((1,), first)])
        for mine, theirs in zip(self.average, model.module.parameters()):
            mine.lerp_(theirs.detach(), 0.25)
            theirs.data.lerp_(mine, 0.125)

    def extra_state(self):
        return {"kept": self.kept, "average": self.average}

    def load_extra_state(self, values):
        self.kept = values["kept"]

    def sample(self, model, step):
        return f"scales {len(model.scaled.scales)}"


class Counting(nn.Linear):
    """Counts its passes, in state of its own."""

    seen = 0

    def forward(self, x):
        self.seen += self.training
        return super().forward(x)

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        self.seen = state["seen"]


class Counted(Plain):
    """A module that counts."""

    def model(self):
        return Counting(FEATURES, 3)

    def sample(self, model, step):
        return f"seen {model.seen}"


class Scheduled(Plain):
    """A scheduler of torch's."""

    def optimizer(self, model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=13)
        return optimizer

    def after_step(self, model, step):
        self.scheduler.step()


class NotSaved(Plain):
    """An average that nobody saves."""

    def optimizer(self, model):
        self.average = [p.detach().clone() for p in model.parameters()]
        return super().optimizer(model)

    def after_step(self, model, step):
        for mine, theirs in zip(self.average, model.parameters()):
            mine.lerp_(theirs.detach(), 0.25)


class NotSaveable(Plain):
    """State of the optimizer that no checkpoint can hold."""

    def optimizer(self, model):
        self.made = super().optimizer(model)
        return self.made

    def after_step(self, model, step):
        self.made.state[next(model.parameters())]["how"] = {"call": [len]}


class Ends(Plain):
    """Raises what is not retried."""

    def after_step(self, model, step):
        self.step = step

    def loss(self, model, batch):
        if getattr(self, "step", 0) == 5:
            raise elastic.errors.ConfigError("--job.x is 5, which cannot be")
        return super().loss(model, batch)
