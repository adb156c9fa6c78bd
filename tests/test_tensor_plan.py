"""What a plan says of a model's modules, and what the workers of a cell draw: without process groups."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel
from torch.nn import functional

from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.parallel.tensor import Draws, check_plan, layouts, parts_of_plan, styles
from elastic.sections.operation import ScalingOptions
from elastic.sections.training import ParallelOptions
from elastic.seeds import seed_all
from jobs.codegpt import CodeGPT


class Passes(nn.Module):
    """Two modules between which a worker of a cell has a part of the activations."""

    def __init__(self, index: int):
        super().__init__()
        self.up, self.down = nn.Identity(), nn.Identity()
        self.draws = Draws(index)
        self.draws.watch("up", self.up, ColwiseParallel())
        self.draws.watch("down", self.down, RowwiseParallel())

    def forward(self, seed: int, *, interrupted: bool = False) -> list[torch.Tensor]:
        """The masks where activations are whole, cut, whole, cut, and whole."""
        seed_all(seed)
        found = []
        for module in (None, self.up, self.down, self.up, self.down):
            if module is not None:
                module(torch.zeros(()))
            found.append(functional.dropout(torch.ones(64), 0.5, training=self.training))
            if interrupted and module is self.up:
                break
        return found


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other)


def test_workers_of_a_cell_draw_alike_what_each_has_whole_and_apart_what_each_has_a_part_of() -> None:
    first, second = Passes(0)(7), Passes(1)(7)

    assert [same(a, b) for a, b in zip(first, second)] == [True, False, True, False, True]
    assert not any(same(first[i], first[j]) for i in range(5) for j in range(i))


def test_what_is_drawn_depends_on_the_seed_of_the_pass_and_not_on_passes_before() -> None:
    fresh, used = Passes(1), Passes(1)
    used(3)
    used(4, interrupted=True)

    assert all(map(same, fresh(7), used(7)))
    assert not same(fresh(8)[1], fresh(7)[1])


def test_an_evaluation_draws_nothing() -> None:
    passes = Passes(1).eval()
    seed_all(7)
    before = torch.get_rng_state()
    passes.up(torch.zeros(()))

    assert same(torch.get_rng_state(), before)


def test_words_of_a_plan_are_torchs_styles() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
    model["norm"], model["head"] = nn.LayerNorm(4), nn.Linear(4, 8)
    plan = {"embed": "rowwise", "up": "colwise", "down": "rowwise", "head": "colwise_gather_output"}
    found = {name: layouts(style) for name, style in styles(model, plan).items()}

    assert found == {
        "embed": (Replicate(), Replicate()),
        "up": (Replicate(), Shard(-1)),
        "down": (Shard(-1), Replicate()),
        "head": (Replicate(), Replicate()),
    }
    found = {name: layouts(style) for name, style in styles(model, {**plan, "norm": "sequence"}).items()}
    assert found == {
        "embed": (Replicate(), Shard(1)),
        "up": (Shard(1), Shard(-1)),
        "down": (Shard(-1), Shard(1)),
        "norm": (Shard(1), Shard(1)),
        "head": (Shard(1), Replicate()),
    }
    own = SequenceParallel(sequence_dim=2)
    assert styles(model, {"norm": own}) == {"norm": own}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "tensor_plan() names no module"),
        ({"blocks.*.q": "colwise"}, "no module of the model is called so; name its modules, such as up, down"),
        ({"up": "columns"}, "tensor_plan() says 'columns' of up, which is not known; say one of colwise, "),
        ({"norm": "colwise"}, "tensor_plan() says 'colwise' of norm, which is a LayerNorm; linear layers are cut so"),
        ({"down": "rowwise"}, "which does not divide the 10 of dimension 1 of down.weight (its shape is (4, 10))"),
        ({"up": "colwise"}, "which does not divide the 10 of dimension 0 of up.weight (its shape is (10, 4))"),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused_with_what_to_do(plan, message) -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"up": nn.Linear(4, 10), "down": nn.Linear(10, 4), "norm": nn.LayerNorm(4)})

    with pytest.raises(ConfigError) as refused:
        check_plan(model, plan, 4)
    assert message in str(refused.value)


def test_torchs_own_styles_are_taken_as_they_are() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4)})
    check_plan(model, {"norm": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())}, 4)


def test_the_plan_of_the_example_cuts_most_of_its_model() -> None:
    job = CodeGPT(size="5M")
    with torch.device("meta"):
        model = job.model()
    check_plan(model, job.tensor_plan(), 8)

    assert set(parts_of_plan(model, job.tensor_plan()).values()) == {0, 1}
    cut = sum(
        module.weight.numel() for name, module in model.named_modules() if name in styles(model, job.tensor_plan())
    )
    assert cut > 0.9 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("scaling", "parallel", "message"),
    [
        (
            {"max_workers": 7},
            {"tensor": 2},
            "--scaling.max-workers is 7, no multiple of --parallel.tensor 2, the workers of a cell; give 6 or 8",
        ),
        ({"max_workers": 2}, {"tensor": 4}, "the workers of a cell; give 4"),
        (
            {"max_workers": 8, "workers_per_node": 3},
            {"tensor": 2},
            "--scaling.workers-per-node is 3, no multiple of --parallel.tensor 2",
        ),
        ({}, {"tensor": 2, "compile": True}, "--parallel.compile is True, which --parallel.tensor 2 does not go with"),
        ({}, {"tensor": 0}, "--parallel.tensor"),
    ],
)
def test_options_that_do_not_go_with_cells_are_refused(scaling, parallel, message) -> None:
    with pytest.raises(ConfigError) as refused:
        TrainConfig(scaling=ScalingOptions(**scaling), parallel=ParallelOptions(**parallel))
    assert message in str(refused.value)


def test_numbers_of_workers_are_told_in_cells() -> None:
    config = TrainConfig(scaling=ScalingOptions(min_workers=3, max_workers=8), parallel=ParallelOptions(tensor=2))

    assert (config.least_workers, config.most_cells) == (4, 4)
    assert config.parallel.sharded
