"""Several optimizers make one update: saved, restored, scheduled, compared and cut like one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elastic.errors import ConfigError
from elastic.job import Job
from elastic.parallel.optimizers import Together, kind_of, parts_of, together
from elastic.parallel.probe import state_share
from elastic.worker.comeback import check_comes_back
from elastic.worker.state import TrainState
from tests.forked import configure, fault, train
from tests.surface_jobs import Two

MOVED = {"checkpoint__every": "4st"}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def two(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() == 1]
    return [torch.optim.Muon(matrices, lr=0.1), torch.optim.Adam(rest, lr=0.01)]


def updated(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    for step in range(3):
        torch.manual_seed(step)
        model(torch.randn(5, 3)).square().sum().backward()
        for one in optimizers:
            one.step()
            one.zero_grad()


def test_they_update_as_each_does_by_itself_and_come_back():
    plain, model, again = network(), network(), network()
    one = together(two(model))
    state = TrainState(Job(), model, one)

    updated(plain, *two(plain))
    updated(model, one)
    tensors, values = state.tensors(), state.values()
    check_comes_back(state)
    other = TrainState(Job(), again, two(again))
    other.load({name: tensor.clone() for name, tensor in tensors.items()}, values)

    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters()))
    assert kind_of(one) == values["optimizer"] == "Muon+Adam"
    assert "optimizer/0.weight/momentum_buffer" in tensors
    assert "optimizer/0.bias/exp_avg" in tensors
    assert [len(group["params"]) for group in values["groups"]] == [2, 2]
    updated(model, one)
    updated(again, other.optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert state_share(one) == [1.0, 2.0]
    assert len(parts_of(one)) == 2
    assert len(one.state) == 4


def test_one_in_a_list_is_itself():
    only = torch.optim.SGD(network().parameters(), lr=0.1)

    assert together([only]) is together({"a": only}) is together(only) is only


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda ps: None, "optimizer() returned a NoneType, which is no torch.optim.Optimizer; return one with all"),
        (lambda ps: [], "optimizer() returned an empty list"),
        (lambda ps: [torch.optim.SGD(ps), torch.optim.SGD(ps[:1])], "a parameter of shape (4, 3) is in two of the opt"),
        (lambda ps: [torch.optim.LBFGS(ps), torch.optim.SGD(ps)], "returned LBFGS, whose step() computes the loss"),
        (
            lambda ps: (o := torch.optim.SGD(ps), torch.optim.lr_scheduler.StepLR(o, 1)),
            "returned a list or dict with a StepLR, which is no torch.optim.Optimizer; return a scheduler from sched",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ConfigError) as refused:
        together(make(list(network().parameters())))
    assert words in str(refused.value)


def test_a_group_that_is_added_to_one_of_them_is_refused():
    model = network()
    optimizers = two(model)
    state = TrainState(Job(), model, optimizers)

    optimizers[1].add_param_group({"params": [nn.Parameter(torch.ones(2))]})

    assert isinstance(state.optimizer, Together)
    with pytest.raises(ConfigError, match="groups cannot be added while training where optimizer\\(\\) returned sev"):
        state.rates.adopt_changes(1)


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_muon_and_adamw_have_the_same_bits_whole_and_cut_through_a_loss_and_a_resume(tmp_path):
    alone = train(Two(), configure(tmp_path, "alone"), workers=1)
    cut = {"parallel__strategy": "fsdp"}

    whole = train(Two(), configure(tmp_path, "whole", **MOVED), 3, faults=[fault("step.before_fence", step=6, rank=1)])
    train(Two(), configure(tmp_path, "cut", **cut, run__stop_after="5st"), workers=2)
    faults = [fault("step.after_fence", step=9, rank=1)]
    lost = train(Two(), configure(tmp_path, "cut", **cut), workers=3, faults=faults)

    assert whole.sha == alone.sha
    assert lost.sha == alone.sha
    assert len(lost.column("loss")) == 12
    assert lost.result["exactness_held"]
    assert {"optimizer/layers.0.up.weight/momentum_buffer", "optimizer/last.bias/exp_avg"} <= set(lost.state())
    fast = train(Two(), configure(tmp_path, "fast", **cut, run__exactness="fast"), workers=2)
    assert fast.column("loss")[-1] == pytest.approx(alone.column("loss")[-1], rel=0.2)  # other batches are normalised
