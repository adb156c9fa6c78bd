"""Optimizers that random jobs use: torch's, in all their variants, and some as people write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn, optim


class Lion(optim.Optimizer):
    """Signs of an average; its count of updates is a number in its state, another in its groups."""

    def __init__(self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95)):
        super().__init__(params, {"lr": lr, "betas": betas, "updates": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["updates"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["average"], state["count"] = torch.zeros_like(p), 0
                state["count"] += 1
                slow, fast = group["betas"]
                # tanh instead of the sign, which would turn last bits into first ones
                p.add_(torch.tanh(50 * state["average"].lerp(p.grad, 1 - slow)), alpha=-group["lr"])
                state["average"].lerp_(p.grad, 1 - fast)


class Remembering(optim.SGD):
    """SGD with what JSON does not keep: tuples and dictionaries by number, in groups and in the state of parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            seen = group.setdefault("seen", {})
            seen[len(seen)] = group["lr"]
            for p in (p for p in group["params"] if p.grad is not None):
                count, factor = self.state[p].get("history", (0, 1.0))
                self.state[p]["history"] = (count + 1, factor * 0.95)
                p.grad.mul_(factor + 0.1 * (len(seen) % 2))
        super().step(closure)


class Listing(optim.SGD):
    """SGD that keeps the newest gradients of a parameter in a list."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            kept = [*self.state[p].get("newest", []), p.grad.clone()][-2:]
            self.state[p]["newest"] = kept
            p.grad.copy_(sum(kept) / len(kept))  # type: ignore[arg-type]
        super().step(closure)


class Lookahead(optim.Optimizer):
    """Another optimizer with slow weights, in its own state."""

    def __init__(self, params: Any, lr: float = 1e-3):
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] = (group["k"] + 1) % 3
            for p in (p for p in group["params"] if p.grad is not None):
                slow = self.state[p].setdefault("slow", p.detach().clone())
                p.add_(p.grad, alpha=-group["lr"])
                if group["k"] == 0:
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)


class Wrapping(optim.Optimizer):
    """Keeps another optimizer, which does the work."""

    def __init__(self, params: Any, lr: float = 1e-3):
        super().__init__(params, {"lr": lr})
        self.inner = optim.Adam(self.param_groups, lr=lr)

    def step(self, closure: Any = None) -> None:
        self.inner.step()


Make = Callable[[Iterable[Any]], optim.Optimizer]

#: By name: what makes one of parameter groups. Rates are such that losses fall, and stay away from chaos.
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda g: optim.SGD(g, lr=0.1),
    "sgd_momentum": lambda g: optim.SGD(g, lr=0.05, momentum=0.9, dampening=0.1, foreach=True),
    "sgd_nesterov": lambda g: optim.SGD(g, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd_fused": lambda g: optim.SGD(g, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda g: optim.Adam(g, lr=0.01, betas=(0.8, 0.9)),
    "adam_amsgrad": lambda g: optim.Adam(g, lr=0.01, amsgrad=True, foreach=False),
    "adam_tensor_lr": lambda g: optim.Adam(g, lr=torch.tensor(0.01), foreach=False),
    "adamw": lambda g: optim.AdamW(g, lr=0.01, weight_decay=0.1),
    "adamw_foreach": lambda g: optim.AdamW(g, lr=0.01, foreach=True),
    "adamw_fused": lambda g: optim.AdamW(g, lr=0.01, fused=True),
    "adagrad": lambda g: optim.Adagrad(g, lr=0.05, initial_accumulator_value=0.1),
    "rmsprop": lambda g: optim.RMSprop(g, lr=0.005, centered=True, eps=1e-4),
    "rmsprop_momentum": lambda g: optim.RMSprop(g, lr=0.002, momentum=0.9, eps=1e-4),
    "nadam": lambda g: optim.NAdam(g, lr=0.01),
    "nadam_decoupled": lambda g: optim.NAdam(g, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, foreach=True),
    "radam": lambda g: optim.RAdam(g, lr=0.01),
    "adamax": lambda g: optim.Adamax(g, lr=0.01),
    "asgd": lambda g: optim.ASGD(g, lr=0.05, t0=2),
    "rprop": lambda g: optim.Rprop(g, lr=0.005),
    "adadelta": lambda g: optim.Adadelta(g, lr=1.0),
    "adafactor": lambda g: optim.Adafactor(g, lr=0.02),
    "lion": lambda g: Lion(g, lr=0.01),
    "lookahead": lambda g: Lookahead(g, lr=0.1),
    "remembering": lambda g: Remembering(g, lr=0.05, momentum=0.9),
    "wrapping": lambda g: Wrapping(g, lr=0.01),
    "listing": lambda g: Listing(g, lr=0.05),
}


def _all(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def _by_shape(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "lr": 0.004, "name": "vectors"},
    ]


def _by_mark(model: nn.Module) -> list[dict[str, Any]]:
    marked = [p for p in model.parameters() if getattr(p, "no_decay", False)]
    rest = [p for p in model.parameters() if not any(p is m for m in marked)]
    return [{"params": rest}, *([{"params": marked, "lr": 0.003}] if marked else [])]


def _trained(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [p for p in model.parameters() if p.requires_grad]}]


def _head_apart(model: nn.Module) -> list[dict[str, Any]]:
    head = {id(p) for p in model.head.parameters()}  # type: ignore[union-attr]
    return [
        {"params": [p for p in model.parameters() if id(p) not in head]},
        {"params": list(model.head.parameters()), "lr": 0.02, "layers": ["head"]},  # type: ignore[union-attr]
    ]


#: By name: how a model's parameters are grouped.
GROUPS: dict[str, Callable[[nn.Module], list[dict[str, Any]]]] = {
    "all": _all,
    "by_shape": _by_shape,
    "by_mark": _by_mark,
    "trained": _trained,
    "head_apart": _head_apart,
}
