"""Models without memory: what initialises them is recorded, and done for each tensor by its name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from elastic.parallel.deferred import CannotDefer, build, build_eagerly
from elastic.parallel.wrapping import place_whole

CPU = torch.device("cpu")


class Zoo(nn.Module):
    """Every way to give a tensor its first value that jobs use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.tied = nn.Linear(5, 7), nn.Linear(5, 7)
        self.tied.weight = self.linear.weight
        self.orthogonal, self.truncated = nn.Linear(6, 6), nn.Linear(50, 40)
        nn.init.orthogonal_(self.orthogonal.weight)
        nn.init.trunc_normal_(self.truncated.weight, std=0.02)
        with torch.no_grad():
            self.linear.bias[:3].fill_(5)
            self.linear.bias.data[3:].zero_()
        self.drawn = nn.Parameter(torch.randn(3, 2) * 0.5 + 10)
        self.counted = nn.Parameter(torch.arange(6.0).view(2, 3))
        self.given = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.norm = nn.BatchNorm1d(4)
        self.rnn = nn.LSTM(3, 3)
        self.embedding = nn.Embedding(9, 4, padding_idx=2)
        self.copied = copy.deepcopy(self.truncated)
        self.register_buffer("mask", torch.tril(torch.ones(3, 3)), persistent=False)
        self.plain = torch.ones(3) * 2
        self.unset = nn.Parameter(torch.empty(2))


def values(seed: int = 0, kind=Zoo) -> dict[str, torch.Tensor]:
    built = build(kind, seed)
    return {name: built.value(name) for name in built.names()}


def test_values_are_those_that_the_code_says():
    found = values()

    q = found["orthogonal.weight"]
    torch.testing.assert_close(q @ q.T, torch.eye(6))
    assert 0.015 < float(found["truncated.weight"].std()) < 0.025
    assert float(found["truncated.weight"].abs().max()) <= 2
    assert found["linear.bias"].tolist() == [5.0, 5.0, 5.0, 0.0, 0.0, 0.0, 0.0]
    assert float(found["linear.weight"].detach().abs().max()) <= 5**-0.5
    assert float((found["drawn"] - 10).abs().max()) < 3
    assert found["counted"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert found["given"].tolist() == [1.0, 2.0]
    assert found["norm.running_var"].tolist() == [1.0] * 4
    assert found["embedding.weight"][2].tolist() == [0.0] * 4
    assert torch.equal(found["copied.weight"], found["truncated.weight"])
    assert torch.equal(found["mask"], torch.tril(torch.ones(3, 3)))
    assert found["unset"].tolist() == [0.0, 0.0], "memory that nobody wrote to"
    assert "tied.weight" not in found


def test_values_depend_on_seed_and_name_and_on_nothing_else():
    class More(Zoo):
        def __init__(self) -> None:
            self.before = None
            super().__init__()
            self.another = nn.Linear(5, 5)

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.linear = nn.Linear(3, 3), nn.Linear(5, 7)

    first, again, other, more = values(), values(), values(seed=1), values(kind=More)

    assert all(torch.equal(first[n], again[n]) and torch.equal(first[n], more[n]) for n in first)
    assert not torch.equal(first["linear.weight"], other["linear.weight"])
    assert torch.equal(values(kind=Shifted)["linear.weight"], first["linear.weight"])
    built = build(Zoo, 0)
    assert torch.equal(built.value("rnn.weight_hh_l0"), first["rnn.weight_hh_l0"]), "asked for alone"


def test_nothing_has_memory_before_it_is_asked_for():
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(1 << 17, 1 << 17) for _ in range(4))  # 256 GiB

    assert all(p.is_meta for p in build(Huge, 0).model.parameters())


def test_a_whole_model_keeps_ties_flags_marks_and_plain_tensors():
    def make() -> nn.Module:
        model = Zoo()
        model.truncated.requires_grad_(False)
        model.linear.weight.no_decay = True
        return model

    built = build(make, 0)
    expected = {name: built.value(name) for name in built.names()}

    model = place_whole(built, CPU)

    assert model.tied.weight is model.linear.weight
    assert isinstance(model.linear.weight, nn.Parameter)
    assert model.linear.weight.no_decay
    assert not model.truncated.weight.requires_grad
    assert model.plain.tolist() == [2.0, 2.0, 2.0]
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert {n: p.tolist() for n, p in model.named_parameters()} == {
        n: expected[n].tolist() for n, _ in model.named_parameters()
    }


class Reader(nn.Module):
    """Looks at a value while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.scale = float(self.linear.weight.sum())


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", [Reader, OwnGenerator])
def test_what_needs_real_values_is_built_whole_instead(kind):
    with pytest.raises(CannotDefer):
        build(kind, 0)

    torch.manual_seed(5)
    expected = kind()
    torch.manual_seed(5)
    built = build_eagerly(kind, 0)
    assert torch.equal(built.value("linear.weight"), expected.linear.weight)
    assert torch.equal(place_whole(built, CPU).linear.bias, expected.linear.bias)


def test_loaded_weights_are_taken_over():
    loaded = nn.Linear(3, 2)

    def make() -> nn.Module:
        model = nn.Linear(3, 2)
        model.load_state_dict(loaded.state_dict())
        return model

    found = values(kind=make)

    assert torch.equal(found["weight"], loaded.weight)
    assert torch.equal(found["bias"], loaded.bias)


def test_a_source_that_changes_after_it_was_copied_is_refused():
    def make() -> nn.Module:
        model, source = nn.Linear(3, 2), torch.zeros(2, device="cpu")
        with torch.no_grad():
            model.bias.copy_(source)
        source += 1
        return model

    with pytest.raises(CannotDefer, match="was changed afterwards"):
        build(make, 0)
