"""Whether gradients of a batch are found to be, or not to be, the sums of those of its halves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from elastic.worker.gradients import add_up


def divided(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = model[0](x)
    h.register_hook(lambda g: g / g.norm())
    return model[1](h).square().sum()


def clamped(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = model[0](x)
    h.register_hook(lambda g: g.clamp(-0.1, 0.1))
    return model[1](h).square().sum()


def dropped(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return functional.dropout(model[1](model[0](x)), training=True).square().sum()


def failing(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model[1](model[0](x)).sum().detach()


@pytest.mark.parametrize(("loss", "sums"), [(divided, False), (clamped, True), (dropped, True), (failing, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_are_no_sums_are_found_and_chance_and_rounding_are_not(loss, sums, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2)).to(dtype)
    batch = torch.randn(6, 8, dtype=dtype)

    def function(x: torch.Tensor):
        return loss(model, x), len(x), {}

    assert add_up(function, model.parameters(), [batch, batch[:3], batch[3:]], 1) is sums
    assert all(p.grad is None for p in model.parameters())
