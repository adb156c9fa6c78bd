"""Models cut by FSDP2, in a world of one: what stays of them, and what the options do. Unions of shards are tested with
runs of several processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor

from elastic.errors import ConfigError
from elastic.parallel import wrapping
from elastic.parallel.blocks import find_blocks
from elastic.parallel.canonical import CanonicalSum, canonical_norm, row_sums, sums_per_row
from elastic.parallel.deferred import META, build
from elastic.parallel.fitness import check_shardable
from elastic.parallel.layout import lay_out
from elastic.parallel.mesh import Mesh, make_mesh
from elastic.parallel.probe import check_elementwise
from elastic.parallel.reduce_scatter import Leaves
from elastic.parallel.used import Used
from elastic.parallel.wrapping import Sharding, cut_of, lay_out_as_cut, local, place_sharded, place_whole

CPU = torch.device("cpu")


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield make_mesh(lay_out(["n"], "fsdp", None), 0, CPU, "1-1")
    dist.destroy_process_group()


class Layer(nn.Module):
    def __init__(self, scale: torch.Tensor):
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(4, 4))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        scale = torch.full((1,), 2.0)
        self.embed, self.head = nn.Embedding(4, 4), nn.Linear(4, 4)
        self.head.weight = self.embed.weight
        self.head.bias.no_decay = True
        self.layers = nn.ModuleList(Layer(scale) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def cut(mesh: Mesh, device: torch.device = CPU, **how: object) -> Stack:
    built = build(Stack, 0)
    return place_sharded(built, find_blocks(built.model), device, mesh, Sharding(**how), fill=True)


def is_gathered(layer: nn.Module) -> bool:
    return not isinstance(layer.linear[0].weight, DTensor)


def test_values_ties_shared_buffers_and_marks_are_those_of_the_whole_model(mesh):
    whole, model = place_whole(build(Stack, 0), CPU), cut(mesh)

    assert [n for n, _ in model.named_parameters()] == [n for n, _ in whole.named_parameters()]
    for (name, p), q in zip(model.named_parameters(), whole.parameters()):
        assert torch.equal(local(p), q), name
        assert getattr(p, "no_decay", False) == (name == "head.bias")
    assert model.head.weight is model.embed.weight
    assert [n for n, _ in model.named_buffers()] == ["layers.0.scale"], "one, that all layers have"
    assert all(layer.scale is model.layers[0].scale for layer in model.layers)
    x = torch.tensor([0, 3])
    assert torch.equal(model(x), whole(x))


@pytest.mark.parametrize("reshard", [True, False])
def test_blocks_are_freed_after_forward_or_stay_gathered_until_backward(mesh, reshard):
    model = cut(mesh, reshard_after_forward=reshard)

    out = model(torch.tensor([0, 3])).sum()
    assert [is_gathered(layer) for layer in model.layers] == [not reshard] * 4
    out.backward()
    assert [is_gathered(layer) for layer in model.layers] == [False] * 4


def test_blocks_are_gathered_as_far_ahead_as_asked_for(mesh):
    found = {}
    for ahead in (0, 1, 2):
        model, seen = cut(mesh, prefetch=ahead), []
        groups = [layer._get_fsdp_state()._fsdp_param_group for layer in model.layers]
        for layer in model.layers:
            layer.register_forward_pre_hook(
                lambda *_, seen=seen, groups=groups: seen.append([g._all_gather_result is not None for g in groups])
            )
        model(torch.tensor([0, 3])).sum().backward()
        found[ahead] = [row.count(True) for row in seen]

    assert found == {0: [0, 0, 0, 0], 1: [1, 1, 1, 0], 2: [2, 2, 1, 0]}


def test_what_was_gathered_ahead_for_a_block_that_did_not_run_is_dropped(mesh):
    model = cut(mesh)
    model(torch.tensor([0, 3]))
    (group,) = model.layers[1]._get_fsdp_state()._fsdp_param_groups
    model.layers[1].unshard(async_op=True)
    assert group._all_gather_result is not None

    wrapping.reshard(model)

    assert group._all_gather_result is None
    assert not any(map(is_gathered, model.layers))


class Crossing(nn.Module):
    """A block that takes one input twice, does not use another, and hands both on."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor, memory: torch.Tensor, unused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x + self.query(x).sigmoid() * self.value(memory) + self.key(memory).tanh(), memory, unused


class Decoder(nn.Module):
    """Blocks that share tensors among each other and with what is around them; some run more than once."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.unused, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        self.layers = nn.ModuleList(Crossing() for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory, unused = self.encoder(x).tanh(), self.unused(x)
        h = x * 0.5 + memory
        skipped = h
        for i in (0, 1, 1, 2, 0, 3):
            h, memory, unused = self.layers[i](h, memory, unused)
            h = h + skipped
        return self.head(h + memory + self.layers[3](skipped, memory.detach(), unused)[0])


def test_gradients_have_the_bits_of_the_whole_model_also_of_what_several_blocks_take_or_none_uses(mesh):
    whole, built = place_whole(build(Decoder, 0), CPU), build(Decoder, 0)
    model = place_sharded(built, list(built.model.layers), CPU, mesh, Sharding(), fill=True)
    used, ended = Used(model), []
    for i, layer in enumerate(model.layers):
        (group,) = layer._get_fsdp_state()._fsdp_param_groups
        group.post_backward = partial(lambda own, i: (ended.append(i), own()), group.post_backward, i)
    for step in range(2):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        for each in (whole, model):
            each.zero_grad(set_to_none=True)
            each(x).square().sum().backward()
        for i, ((name, mine), its) in enumerate(zip(model.named_parameters(), whole.parameters())):
            assert (i in used.seen) is (its.grad is not None), name
            assert its.grad is None or torch.equal(local(mine.grad), its.grad), name
        assert ended == [3, 3, 0, 2, 1, 1, 0], "each call ends before the next one begins"
        ended.clear()


def test_offloaded_parameters_are_on_the_host_and_buffers_where_the_model_runs(mesh, monkeypatch):
    monkeypatch.setattr(wrapping, "CPUOffloadPolicy", lambda: CPUOffloadPolicy(pin_memory=False))  # which takes a GPU
    model = cut(mesh, META, offload=True)  # in place of a GPU

    assert {p.device for p in model.parameters()} == {CPU}
    assert {b.device for b in model.buffers()} == {META}
    assert all(layer.scale is model.layers[0].scale for layer in model.layers)


# ---- what cannot be cut ----------------------------------------------------------------------------------------------


class Last(nn.Module):
    def __init__(self, weight: torch.Tensor, trained: bool = True):
        super().__init__()
        self.first, self.weight = nn.Linear(2, 2), nn.Parameter(weight, requires_grad=trained)
        self.norm = nn.BatchNorm1d(2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Last(torch.ones(())), r"parameter weight has no dimensions.*give it the shape \(1,\)"),
        (Last(torch.ones(5, 0)), r"parameter weight has no elements \(its shape is \(5, 0\)\)"),
        (Last(torch.ones(2, 3).t()), r"parameter weight is not contiguous in memory \(strides \(1, 3\)\)"),
        (
            Last(torch.ones(2, dtype=torch.float64)),
            r"parameter weight is torch.float64 and first.weight is torch.float32; .* freeze it",
        ),
    ],
    ids=["scalar", "empty", "strides", "dtypes"],
)
def test_what_cannot_be_cut_is_refused_by_name(model, message):
    with pytest.raises(ConfigError, match=message):
        check_shardable(model)


def test_frozen_parameters_may_have_another_dtype():
    check_shardable(Last(torch.ones(2, dtype=torch.bfloat16), trained=False))


def test_state_that_is_neither_whole_nor_cut_by_rows_is_refused_by_name(mesh):
    weight = cut(mesh).head.weight.detach()

    assert cut_of("w", weight) == (("shard", 0),)
    assert not cut_of("w", weight.full_tensor())
    assert not cut_of("w", DTensor.from_local(torch.ones(2), mesh.rows, run_check=False))
    for strange in (weight.sum(), weight.t()):
        with pytest.raises(ConfigError, match=r"optimizer/w/mean lies over the workers as .*; use an optimizer that"):
            cut_of("optimizer/w/mean", strange)


# ---- the norm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3,), (5, 0), (0, 5), (2, 3), (2, 40_000), (1, 2, 3)])
def test_each_row_has_as_many_sums_as_announced(shape):
    rows = shape[0] if shape else 1

    assert len(row_sums([torch.ones(shape)])) == rows * sums_per_row(shape)
    assert canonical_norm([torch.ones(shape), torch.ones(1)]) ** 2 == pytest.approx(torch.ones(shape).numel() + 1)


# ---- leaves of microbatches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs_once", [True, False])
def test_the_leaves_of_a_block_that_runs_once_are_summed_as_they_come_and_go(mesh, runs_once):
    """Else a worker keeps the gradients of the whole model until the pass is over."""
    width, shards = 1013, 4
    total, leaves = CanonicalSum([], [range(4)], 1 << 20), Leaves(shards)
    leaves.begin(0, shards, runs_once=runs_once)
    given = leaves.allocate((shards * width,), dtype=torch.float32, device=CPU)
    output = leaves.allocate((width,), dtype=torch.float32, device=CPU)
    given.copy_(torch.randn(shards * width, generator=torch.Generator().manual_seed(0)))
    a, b, c, d = given.clone().view(shards, width)

    leaves(output, given, mesh.row_group, None)
    whole = [held for held in vars(leaves).values() if isinstance(held, torch.Tensor) and held.numel() > width]
    leaves.push(total, keep=True)
    leaves.put(total, 1)

    assert len(whole) == (0 if runs_once else 1)
    assert torch.equal(output, (a + b) + (c + d))


class Clips(torch.optim.SGD):
    """It clips the gradients by their norm."""

    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.2)
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "dtype", "words"),
    [
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.float32, None),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), torch.bfloat16, "SGD gives other bits .* in bfloat16 is cut"),
        (partial(torch.optim.Adam, weight_decay=0.1), torch.bfloat16, "Adam gives other bits"),
        (torch.optim.AdamW, torch.bfloat16, None),
        (partial(Clips, lr=0.1), torch.float32, "Clips gives other bits when a parameter is cut"),
    ],
)
def test_an_optimizer_whose_bits_go_by_the_cut_is_refused_also_where_only_the_dtype_makes_it_so(make, dtype, words):
    """In 16 bits kernels of CPUs round the elements that do not fill a register in another way."""
    optimizer = make(nn.Linear(5, 3).to(dtype).parameters())
    with pytest.raises(ConfigError, match=words) if words else nullcontext():
        check_elementwise(optimizer)


def test_whole_parameters_have_the_strides_that_cut_ones_have():
    model = nn.Conv2d(1, 4, 2).to(memory_format=torch.channels_last)
    before = model.weight.detach().clone(memory_format=torch.contiguous_format)
    assert model.weight.stride() != (4, 4, 2, 1)

    lay_out_as_cut(model)

    assert model.weight.stride() == (4, 4, 2, 1)
    assert torch.equal(model.weight, before)
