"""The blocks of a model: by name, by what repeats, or by size; what checkpointing and compiling them does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from elastic.compat.torch import AUTOTUNING
from elastic.errors import ConfigError
from elastic.parallel import blocks
from elastic.parallel.blocks import check_compiler, checkpoint_activations, compile_blocks, find_blocks

KIB = 1 << 10


class Layer(nn.Module):
    def __init__(self, width: int = 4):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.runs = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.inner(x)


class Other(Layer):
    pass


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.embed, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def names(model: nn.Module, found: list[nn.Module]) -> list[str]:
    return [next(name for name, module in model.named_modules() if module is block) for block in found]


# ---- which they are --------------------------------------------------------------------------------------------------


def test_what_repeats_in_a_container_is_a_block_and_nothing_inside_it():
    model = Stack(Layer(), Other(), Layer())

    assert names(model, find_blocks(model)) == ["layers.0", "layers.2"]
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == [], "too small to be gathered alone"


def test_named_classes_are_blocks_the_outermost_of_them():
    model = Stack(Layer(), Other(), Layer())

    assert names(model, find_blocks(model, ["Other"])) == ["layers.1"]
    assert names(model, find_blocks(model, ["Linear", "Layer"])) == [
        "embed",
        "head",
        "layers.0",
        "layers.1.inner.0",
        "layers.2",
    ]


def test_where_nothing_repeats_modules_of_a_fitting_size_are(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 40 * KIB)  # and so no block of less than 2.5 KiB
    model = nn.Module()
    model.large = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 192))  # 16 and 48 KiB
    model.small, model.fits = nn.Linear(8, 8), nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))  # 0.3 and 12 KiB

    assert names(model, find_blocks(model)) == ["large.0", "large.2", "fits"]
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100 * KIB)
    assert find_blocks(model) == [], "the whole model fits"


def test_a_module_that_shares_a_parameter_with_others_is_found_to_be_no_block_and_refused_by_name():
    model = Stack(Layer(), Layer(), Layer())
    model.layers[1].inner[0].weight = model.head.weight

    assert names(model, find_blocks(model)) == ["layers.0", "layers.2"]
    with pytest.raises(ConfigError, match=r"names 'Layer', which shares the parameter head\.weight with modules"):
        find_blocks(model, ["Layer"])


def test_a_class_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ConfigError, match=r"names 'Blok', but .* no module of that class; it has Layer, Linear, Mod"):
        find_blocks(Stack(Layer()), ["Layer", "Blok"])


# ---- what is done with them ------------------------------------------------------------------------------------------


def test_a_checkpointed_block_runs_again_in_backward_and_keeps_less():
    kept: list[list[int]] = []
    for again in (False, True):
        torch.manual_seed(0)
        model, sizes = Stack(Layer(), Layer()), []
        if again:
            checkpoint_activations(find_blocks(model))

        def pack(t: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(torch.ones(3, 4)).sum()
        kept.append(sizes)
        out.backward()
        assert [layer.runs for layer in model.layers] == [2 if again else 1] * 2
        with torch.no_grad():
            model(torch.ones(3, 4))
        assert [layer.runs for layer in model.layers] == [3 if again else 2] * 2

    assert len(kept[1]) < len(kept[0])


@pytest.mark.processes
def test_compiled_blocks_keep_their_names_and_the_rest_is_not_compiled():
    model = Stack(Layer(), Other(), Layer())
    before = list(model.state_dict())

    compile_blocks(find_blocks(model), exact=False)

    assert list(model.state_dict()) == before
    compiled = [name for name, m in model.named_modules() if m._compiled_call_impl is not None]
    assert compiled == ["layers.0", "layers.2"]


@pytest.mark.parametrize("setting", AUTOTUNING)
def test_kernels_that_are_chosen_by_their_speed_are_refused_by_name(setting):
    import torch._inductor.config as inductor  # takes seconds

    check_compiler()

    with (
        inductor.patch({setting: True}),
        pytest.raises(ConfigError, match=rf"torch\._inductor\.config\.{setting} is on.*bitwise turn it off"),
    ):
        check_compiler()


class Averaging(nn.Module):
    """Reads the buffer that it has just written to."""

    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(size, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.2)
        return torch.tanh(self.linear(x - self.mean[0]))


@pytest.mark.parametrize("rows", [1, 8192])
def test_a_block_that_is_called_twice_is_computed_again_with_the_buffers_of_each_call(rows: int) -> None:
    torch.manual_seed(0)
    plain = Averaging(rows)
    again = copy.deepcopy(plain)
    checkpoint_activations([again])
    assert (plain.mean.numel() * 4 > blocks.SMALL_BUFFER_BYTES) == (rows > 1)
    for step in range(3):
        x = torch.randn(5, 4)
        for block in (plain, again):
            block.zero_grad()
            block(block(x)).square().sum().backward(retain_graph=step == 2)

        assert torch.equal(plain.linear.weight.grad, again.linear.weight.grad)
        assert torch.equal(plain.mean, again.mean)
