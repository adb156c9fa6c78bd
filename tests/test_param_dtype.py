"""Parameters computed with in another number format: the values of a model converted whole, kept as they were."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn

from elastic.parallel.blocks import checkpoint_activations, find_blocks
from elastic.parallel.param_dtype import cast_parameters
from tests.forked import COMPILING_S, configure, train
from tests.test_sharded import sharded
from tests.tiny_jobs import Plain


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.inner(self.norm(x))) * scale


class Tied(nn.Module):
    """Blocks, a tied weight, a frozen one, a whole number, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.memory = nn.LSTM(8, 8, batch_first=True)
        self.count = nn.Parameter(torch.ones(1, dtype=torch.int64), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, scale=torch.ones(8) / 2)  # which comes in the format of nothing here
        return self.last(self.memory(x)[0]) * self.count


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_of_a_converted_model(dtype: torch.dtype, checkpointed: bool):
    torch.manual_seed(0)
    kept = Tied()
    converted = copy.deepcopy(kept).to(dtype)
    for layer in converted.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {"scale": kwargs["scale"].to(dtype)}), with_kwargs=True
        )
    blocks = find_blocks(kept, ("Layer",))
    cast_parameters(kept, blocks, dtype)
    if checkpointed:
        checkpoint_activations(blocks)
    before = {name: p.detach().clone() for name, p in kept.named_parameters()}
    x = torch.randn(4, 3, 8)

    values, expected = kept(x), converted(x.to(dtype))
    values.float().sum().backward()
    expected.float().sum().backward()

    assert torch.equal(values, expected)
    assert values.dtype == dtype
    for (name, p), other in zip(kept.named_parameters(), converted.parameters()):
        assert p.dtype == before[name].dtype
        assert torch.equal(p, before[name])
        assert (p.grad is None) == (other.grad is None)
        if p.grad is not None:
            assert torch.equal(p.grad, other.grad.float())
    assert kept.memory._flat_weights[0] is kept.memory.weight_ih_l0


def test_an_error_in_a_forward_pass_leaves_the_parameters_as_they_are():
    model = Tied()
    cast_parameters(model, find_blocks(model, ("Layer",)), torch.bfloat16)

    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.zeros(1, 1, 3))

    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.int64}


@pytest.mark.long
@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_compute_in_another_format_too(tmp_path):
    options = {"run__exactness": "fast", "precision__param_dtype": "bf16", "run__duration": "4st"}
    plain = train(Plain(), configure(tmp_path, "plain", **options), 1)

    compiled = {**options, "parallel__compile": True, "parallel__blocks": ("Linear",)}
    found = train(Plain(), configure(tmp_path, "run", **compiled), 1, COMPILING_S)  # a second would compile the same

    assert found.failure is None
    assert found.column("loss") == pytest.approx(plain.column("loss"), rel=0.02)
    assert found.column("sample_hash") == plain.column("sample_hash")


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_whole_and_cut_models_compute_alike_in_another_format(tmp_path):
    options = {"run__exactness": "fast", "precision__param_dtype": "bf16"}

    whole = train(Plain(), sharded(tmp_path, "ddp", "ddp", **options), 2)
    cut = train(Plain(), sharded(tmp_path, "fsdp", "fsdp", **options), 2)

    assert whole.failure is None
    assert cut.failure is None
    assert whole.column("loss") == pytest.approx(cut.column("loss"), rel=1e-5)
    assert whole.column("grad_norm") == pytest.approx(cut.column("grad_norm"), rel=1e-3)
