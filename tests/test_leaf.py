"""The gradients of a microbatch, taken while the backward pass makes them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from elastic.compat.torch import gradient_hooks
from elastic.parallel.canonical import CanonicalSum, buckets_of
from elastic.parallel.leaf import GradientTooLate, Leaf

CPU = torch.device("cpu")


class Deep(nn.Module):
    """Layers one behind the other; `idle` is used in no pass, and `shared` twice, as torch computes it again."""

    def __init__(self, *, idle: int | None = None, reentrant: bool | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.idle, self.reentrant = idle, reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reentrant is not None:
            shared = self.layers[3]
            for _ in range(2):
                x = torch.tanh(checkpoint(shared, x, use_reentrant=self.reentrant))
            return x
        for i, layer in enumerate(self.layers):
            x = x if i == self.idle else torch.tanh(layer(x))
        return x


class Told(CanonicalSum):
    """A sum of one rank that tells when it was given a bucket: at which layer's gradients the pass was."""

    def __init__(self, buckets: list[slice], model: nn.Module):
        super().__init__([], [range(9)], buckets)
        self.seen: list[int] = []
        self.arrived = 0
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self._count)

    def _count(self, _: torch.Tensor) -> None:
        self.arrived += 1

    def push_last(self, microbatch: int, part: list[torch.Tensor]) -> None:
        self.seen.append(self.arrived)
        super().push_last(microbatch, part)


def batch(n: int) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(n)).requires_grad_()


def take(model: nn.Module, *, early: bool, passes: int = 3) -> tuple[list[torch.Tensor], list[int]]:
    """The sum of some microbatches, by parameter, and how many gradients there were as each bucket was given."""
    named = dict(reversed(list(model.named_parameters())))
    parameters = list(named.values())
    buckets = buckets_of([*parameters, torch.empty(len(parameters))], 90)
    assert len(buckets) == 5  # a layer each, and the mask
    leaf, total = Leaf(named, buckets, CPU), Told(buckets, model)
    for n in range(passes - 1):
        model(batch(n)).square().sum().backward()
        total.push(n, leaf.take())
    total.arrived = 0
    if early:
        with leaf.taking(total, passes - 1):
            model(batch(passes - 1)).square().sum().backward()
    else:
        model(batch(passes - 1)).square().sum().backward()
    leaf.take_rest(total, passes - 1)
    assert all(p.grad is None for p in parameters)
    return total.reduce(), total.seen


@pytest.mark.parametrize("idle", [None, 0, 2])
@pytest.mark.parametrize("passes", [1, 3])
def test_taken_early_or_late_the_sums_have_the_same_bits(idle, passes):
    torch.manual_seed(0)
    model = Deep(idle=idle)

    late, _ = take(model, early=False, passes=passes)
    early, _ = take(model, early=True, passes=passes)

    assert all(torch.equal(a, b) for a, b in zip(early, late, strict=True))
    *gradients, used = early
    assert used.tolist() == [float(i not in _of(idle)) * passes for i in range(8)]
    assert all(bool(g.any()) == (i not in _of(idle)) for i, g in enumerate(gradients))


def _of(layer: int | None) -> tuple[int, ...]:
    """The parameters of a layer, counted from the last one."""
    return () if layer is None else (2 * (3 - layer), 2 * (3 - layer) + 1)


def test_a_bucket_goes_when_its_gradients_are_there_and_those_before():
    assert take(Deep(), early=True)[1] == [2, 4, 6, 8, 8]
    assert take(Deep(), early=False)[1] == [8] * 5
    assert take(Deep(idle=2), early=True)[1] == [2, 6, 6, 6, 6]  # which nobody knows before the pass is over


def test_a_gradient_that_comes_in_parts_is_not_taken_for_a_whole_one():
    with pytest.raises(GradientTooLate, match=r"layers\.3\.bias comes in several parts"):
        take(Deep(reentrant=True), early=True)

    late, _ = take(Deep(reentrant=True), early=False)
    assert bool(late[0].any())


def test_what_torch_computes_again_in_the_same_pass_is_taken_whole():
    torch.manual_seed(0)
    model = Deep(reentrant=False)

    late, _ = take(model, early=False)
    early, _ = take(model, early=True)

    assert all(torch.equal(a, b) for a, b in zip(early, late, strict=True))


def test_nothing_is_left_at_the_parameters_by_a_pass_that_fails():
    model = Deep()
    leaf = Leaf(dict(model.named_parameters()), [slice(0, 9)], CPU)
    with pytest.raises(ZeroDivisionError), leaf.taking(CanonicalSum([], [range(1)], [slice(0, 9)]), 0):
        raise ZeroDivisionError

    assert not any(hook for p in model.parameters() for hook in gradient_hooks(p))
