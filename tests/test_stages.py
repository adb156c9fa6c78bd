"""How layers are cut into stages, and workers into pipelines: pure. What the job's loss gets in place of a model."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from elastic.data.deal import batch_table
from elastic.errors import ConfigError
from elastic.parallel.layout import lay_out
from elastic.parallel.stage_costs import costs_of, counted, parameters_of
from elastic.parallel.stage_memory import LayerSize, ModelSize, fewest_stages, fewest_workers, need, needs
from elastic.parallel.stages import Chain, chained, check_layers, cut, handed, layers_of, seed_behind, seed_each
from elastic.parallel.standin import Standin, calls_of
from elastic.placement import pipelines
from elastic.seeds import seed_all

costs = st.lists(st.integers(0, 100), min_size=1, max_size=9)


@given(costs, st.data())
def test_a_cut_has_every_layer_once_in_order_and_no_empty_stage(costs, data):
    stages = data.draw(st.integers(1, len(costs)))
    found = cut(costs, stages)

    assert [i for run in found for i in run] == list(range(len(costs)))
    assert len(found) == stages
    assert all(found)


@given(costs, st.data())
def test_no_other_cut_has_a_cheaper_costliest_stage(costs, data):
    stages = data.draw(st.integers(1, len(costs)))
    found = max(sum(costs[i] for i in run) for run in cut(costs, stages))

    for places in combinations(range(1, len(costs)), stages - 1):
        bounds = [0, *places, len(costs)]
        assert found <= max(sum(costs[a:b]) for a, b in pairwise(bounds))


def test_a_cut_by_cost_is_not_one_by_number():
    assert cut([8, 1, 1, 1, 1], 2) == [range(1), range(1, 5)]
    assert cut([1, 1, 1, 1], 2) == [range(2), range(2, 4)]


def test_a_layer_costs_its_products_for_the_tokens_of_a_microbatch_and_keeps_what_its_backward_pass_needs():
    class Job:
        def stages(self, model):
            return [*model]

        def loss(self, model, batch):
            return model(batch.float()).sum(), 1, {}

    model = nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 8, 5))
    batch, before = torch.ones(4, 2, 8, dtype=torch.int64), torch.random.get_rng_state()
    found = counted(Job(), model, layers_of(Job(), model), batch)

    assert found is not None
    assert [one.flops for one in found] == [2 * 4 * 8 * 3 * (2 * 3), 0, 0, 2 * 4 * 24 * 5]
    assert [one.kept for one in found] == [4 * 4 * 2 * 8, 4 * 4 * 3 * 8, 0, 0]
    assert costs_of(Job(), model, Chain([*model]), batch) == [1153, 1, 1, 961]
    assert torch.equal(before, torch.random.get_rng_state())


def test_where_operations_cannot_be_counted_a_layer_costs_its_parameters():
    class Looks(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    class Job:
        def loss(self, model, batch):
            return model(batch).sum(), 1, {}

    model = nn.Sequential(Looks(2, 2), nn.Linear(2, 3))
    assert counted(Job(), model, Chain([*model]), torch.ones(1, 2)) is None
    assert costs_of(Job(), model, Chain([*model]), torch.ones(1, 2)) == [7, 10]
    assert costs_of(Job(), model, Chain([*model]), None) == [7, 10]


def test_parameters_that_are_only_looked_up_cost_nothing():
    assert parameters_of(nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 4))) == 1 + 8 * 4 + 4
    assert parameters_of(nn.Dropout()) == 1


@given(st.integers(1, 40), st.integers(2, 8), st.integers(2, 12))
def test_pipelines_have_at_least_the_stages_that_are_asked_for_where_workers_suffice(workers, least, most):
    count, each = pipelines(workers, least, max(least, most))

    assert 1 <= count * each <= workers
    assert each >= least or (count == 1 and each == workers)
    assert each == max(least, most) or workers - count * each < count, "another stage would fit"


@given(st.integers(1, 12), st.integers(2, 4), st.sampled_from(["ddp", "fsdp"]))
def test_what_workers_hold_is_laid_out_over_pipelines_or_over_all(workers, least, strategy):
    found = lay_out(["n"] * workers, strategy, None, stages=(least, 100))

    assert found.pipelines * found.stages == found.size == found.replicas * found.shards
    assert found.replicas == (1 if strategy == "fsdp" else found.pipelines)
    assert sorted((*found.ranks, *found.spares)) == list(range(workers))


def test_the_table_counts_what_waits_while_a_pipeline_fills():
    assert batch_table(8, 4, stages=2)[3] == (4, 4, 0.8)
    assert batch_table(8, 3, stages=2)[2] == (3, 8, 0.8)


layer_sizes = st.lists(st.builds(LayerSize, *[st.integers(1, 50)] * 4), min_size=1, max_size=6)


@given(layer_sizes, st.integers(0, 500), st.integers(1, 8), st.sampled_from(["ddp", "fsdp"]), st.data())
def test_the_stages_that_auto_chooses_are_the_fewest_whose_workers_have_the_memory(
    layers, state, cells, strategy, data
):
    size, memory, v = ModelSize(state, layers), data.draw(st.integers(0, 2000)), data.draw(st.integers(1, 20))
    found = fewest_stages(size, cells, strategy, v, memory)

    for least in range(1, found or min(cells, len(layers)) + 1):
        assert pipelines(cells, least)[0] > v or need(size, cells, least, strategy, v) > memory
    if found is not None:
        assert need(size, cells, found, strategy, v) <= memory
        fewest = fewest_workers(size, cells, found, strategy, v, memory)
        assert all(need(size, n, found, strategy, v) <= memory for n in range(fewest, cells + 1))
        assert fewest == 1 or need(size, fewest - 1, found, strategy, v) > memory


def test_what_a_worker_of_a_pipeline_needs():
    size = ModelSize(60, [LayerSize(1, 5, 10, 10)] * 2)

    assert need(size, 1, 1, "ddp", 4) == 60 + 20 + (1 + 3) * 20 + 10
    assert need(size, 2, 1, "fsdp", 4) == (60 + 20 + (1 + 2) * 20) // 2 + 10 + 20
    compared = 2 * 10 + 2 * 5 + 20
    assert needs(size, 2, 2, "ddp", 4) == [60 // 2 + 10 + compared] * 2
    assert needs(size, 4, 2, "fsdp", 4) == [60 // 4 + 10 + compared] * 2
    deep = ModelSize(60, [LayerSize(1, 50, 10, 10)] * 2)
    assert needs(deep, 2, 2, "ddp", 8) == [60 // 2 + 10 + 4 * 10 + 2 * 50, 60 // 2 + 10 + 2 * 10 + 2 * 50 + 20]
    several = ModelSize(60, [LayerSize(1, 1, 0, 10)] * 2)
    first = 60 // 2 + 5 * 10
    assert needs(several, 2, 2, "ddp", 8)[0] == first, "before the last: three partial sums, the leaf and its copy"


def test_layers_draw_the_same_whichever_ran_before_in_this_process():
    layers = [nn.Dropout(0.5) for _ in range(3)]
    seed_each(layers)
    seed_all(5)
    x = torch.ones(50)
    whole = [layer(x) for layer in layers]
    seed_all(5)
    seed_all(seed_behind(2))

    assert torch.equal(layers[2](x), whole[2])
    assert not torch.equal(whole[1], whole[2])
    layers[0].eval()
    seed_all(5)
    layers[0](x)
    assert torch.initial_seed() == 5, "nothing is seeded where nothing is trained"


def test_what_is_no_module_is_no_layer():
    class Job:
        def stages(self, model):
            return [*model, torch.relu]

    with pytest.raises(ConfigError, match="stages\\(\\) returns a builtin_function_or_method, which is no"):
        layers_of(Job(), nn.Sequential(nn.Linear(2, 3)))


def test_what_is_no_list_of_modules_is_refused_in_one_sentence():
    class Job:
        def stages(self, model):
            return model if model is not None else model.blocks

    with pytest.raises(ConfigError, match="stages\\(\\) returns a Linear, which is no list; return"):
        layers_of(Job(), nn.Linear(2, 3))
    with pytest.raises(ConfigError, match="stages\\(\\) raised AttributeError: 'NoneType' object has no attribute"):
        layers_of(Job(), None)


def test_saved_buffers_of_two_layers_are_refused_by_name():
    norm = nn.BatchNorm1d(2, affine=False)
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), norm), nn.Sequential(nn.Linear(2, 2), norm))

    with pytest.raises(ConfigError, match=r"0 and 1 share the buffer .*running_mean, and stages"):
        check_layers(model, Chain([*model]), 2)
    for name in list(norm._buffers):
        norm._non_persistent_buffers_set.add(name)
    check_layers(model, Chain([*model]), 2)  # such as a table that each layer reads


def test_a_layer_may_return_none_twice_but_no_tensor_twice():
    class Twice(nn.Module):
        def forward(self, x, *_):
            return x, None, None

    x = torch.ones(2)
    assert chained([Twice(), Twice()], (x,)) == (x, None, None)
    with pytest.raises(ConfigError, match="a Twins of stages\\(\\) returns one tensor twice"):
        chained([type("Twins", (nn.Module,), {"forward": lambda self, x: (x, x)})()], (x,))


def test_a_layer_may_write_to_what_another_stage_sent():
    sent = torch.tensor([-1.0, 2.0], requires_grad=True)
    torch.relu_(handed((sent,))[0]).sum().backward()

    assert sent.grad is not None
    assert sent.grad.tolist() == [0, 1]


def test_a_stand_in_has_what_the_model_has_and_is_called_once():
    model = nn.Linear(2, 3)
    stand = Standin(model, lambda x: x + 1)

    assert stand.weight is model.weight
    assert [name for name, _ in stand.named_parameters()] == ["weight", "bias"]
    assert [*stand.modules()] == [model]
    assert stand.state_dict().keys() == model.state_dict().keys()
    assert not stand.eval().training
    assert not model.training
    assert stand(1) == 2
    with pytest.raises(ConfigError, match="several times"):
        stand(1)
    with pytest.raises(ConfigError, match="named inputs"):
        Standin(model, lambda x: x)(x=1)


def test_the_inputs_of_a_model_are_known_without_running_it():
    assert calls_of(lambda model, batch: model(batch, 2).sum(), nn.Linear(2, 3), 1) == ((1, 2), {})
    with pytest.raises(ConfigError, match="without a call of the model"):
        calls_of(lambda model, batch: batch, nn.Linear(2, 3), 1)
