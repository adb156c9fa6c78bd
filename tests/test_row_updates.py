"""Updates of cut parameters on plain rows: the bits of the update on DTensors, and nothing else is left behind."""

from __future__ import annotations

import functools
import types

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from elastic.parallel import row_updates
from elastic.parallel.optimizers import together
from elastic.parallel.row_updates import on_rows, update
from elastic.parallel.wrapping import local

STEPS = 4
MAKE = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "adam with foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "asgd": torch.optim.ASGD,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5, centered=True),
    "rprop": torch.optim.Rprop,
    "two": lambda p: together([torch.optim.AdamW(p[:1]), torch.optim.SGD(p[1:], lr=0.1, momentum=0.9)]),
}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    dist.destroy_process_group()


def parameters_of(mesh):
    """Three of them, cut over a mesh, or whole."""
    torch.manual_seed(0)
    values = [torch.randn(*shape) for shape in ((5, 3), (4,), (2, 2))]
    return [nn.Parameter(as_cut(v, mesh)) for v in values]


def as_cut(value, mesh):
    return value if mesh is None else distribute_tensor(value, mesh, [Shard(0)])


def train(mesh, make):
    """Returns the parameters and the optimizer; the last parameter has a gradient from the third step on only."""
    parameters = parameters_of(mesh)
    optimizer = make(parameters)
    for step in range(STEPS):
        for i, p in enumerate(parameters):
            gradient = torch.full(tuple(p.shape), 0.1 * (step + 1 + i))
            p.grad = as_cut(gradient, mesh) if i < 2 or step >= 2 else None
        update(optimizer, cut=mesh is not None)
    return parameters, optimizer


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_the_update_and_the_state_have_the_bits_of_whole_parameters(mesh, make):
    parameters, optimizer = train(mesh, make)
    others, other = train(None, make)

    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in parameters]
    for p, whole in zip(parameters, others, strict=True):
        assert torch.equal(p.to_local(), whole)
        assert isinstance(p.grad, DTensor)
        mine, theirs = optimizer.state.get(p, {}), other.state.get(whole, {})
        assert list(mine) == list(theirs)
        for a, b in zip(mine.values(), theirs.values(), strict=True):
            assert isinstance(a, DTensor) == (isinstance(b, torch.Tensor) and b.shape == p.shape)
            assert torch.equal(torch.as_tensor(local(a) if isinstance(a, DTensor) else a), torch.as_tensor(b))


def test_no_operation_of_the_update_sees_a_dtensor(mesh):
    parameters = parameters_of(mesh)
    optimizer = torch.optim.AdamW(parameters)
    with on_rows(optimizer):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert not any(isinstance(p, DTensor) for p in held)
        assert [p.data_ptr() for p in held] == [p.to_local().data_ptr() for p in parameters]


def own_class(parameters):
    class Own(torch.optim.AdamW):
        pass

    return Own(parameters)


def hooked(parameters):
    optimizer = torch.optim.AdamW(parameters)
    optimizer.register_step_pre_hook(lambda *_: None)
    return optimizer


def replaced(parameters):
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step = lambda: None
    return optimizer


def replaced_under_a_scheduler(parameters):
    optimizer = replaced(parameters)
    optimizer.step = types.MethodType(lambda self: None, optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return optimizer


def wrapped_around_a_scheduler(parameters):
    optimizer = torch.optim.AdamW(parameters)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step = functools.wraps(optimizer.step)(lambda: None)
    return optimizer


@pytest.mark.parametrize("make", [own_class, hooked, replaced, replaced_under_a_scheduler, wrapped_around_a_scheduler])
def test_what_a_job_does_inside_of_a_step_sees_what_it_would_see_without_this(mesh, make):
    parameters = parameters_of(mesh)
    optimizer = make(parameters)
    with on_rows(optimizer):
        assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in parameters]


def test_a_scheduler_changes_nothing_about_it(mesh):
    optimizer = torch.optim.AdamW(parameters_of(mesh))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with on_rows(optimizer):
        assert not any(isinstance(p, DTensor) for p in optimizer.param_groups[0]["params"])


def test_state_of_a_shard_has_the_shape_of_the_whole_but_what_the_job_keeps_beside_it_stays_as_it_is(mesh):
    rows = torch.arange(8.0)
    p = nn.Parameter(DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=(16,), stride=(1,)))
    optimizer = torch.optim.SGD([p], lr=0.5, momentum=0.9)
    optimizer.state[p]["recent"] = recent = torch.zeros(8)
    for _ in range(2):
        p.grad = DTensor.from_local(torch.ones(8), mesh, [Shard(0)], run_check=False, shape=(16,), stride=(1,))
        update(optimizer, cut=True)
    assert optimizer.state[p]["recent"] is recent
    assert optimizer.state[p]["momentum_buffer"].shape == (16,)
    assert torch.equal(p.to_local().detach(), torch.arange(8.0) - 0.5 - 0.95)


def test_rows_elsewhere_than_their_mesh_are_left_to_torch(mesh, monkeypatch):
    """As with --parallel.offload: on the host, while the mesh is of GPUs."""
    optimizer = torch.optim.AdamW(parameters_of(mesh))
    monkeypatch.setattr(type(mesh), "device_type", property(lambda self: "cuda"))
    with on_rows(optimizer):
        assert all(isinstance(p, DTensor) for p in optimizer.param_groups[0]["params"])


def test_an_error_inside_leaves_the_dtensors(mesh):
    parameters = parameters_of(mesh)
    optimizer = torch.optim.AdamW(parameters)
    with pytest.raises(ZeroDivisionError), on_rows(optimizer):
        raise ZeroDivisionError
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in parameters]


def test_every_optimizer_of_torch_is_known_or_does_not_work_element_by_element():
    kinds = {k for k in vars(torch.optim).values() if isinstance(k, type) and issubclass(k, torch.optim.Optimizer)}
    others = {"Optimizer", "Adafactor", "LBFGS", "Muon", "SparseAdam"}
    assert {k.__name__ for k in kinds - row_updates._ELEMENTWISE} == others
