"""What model() makes is what trains: the objects themselves, their hooks and references, modules beside the model, and
the modes that it left them in."""

from __future__ import annotations

import copy
import functools
import gc
import json
import re
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import elastic
from elastic.errors import ConfigError
from elastic.garbage import freeze_imported
from elastic.parallel import modes
from elastic.parallel.deferred import CannotDefer, DeferredModel, build, build_eagerly
from elastic.parallel.device import prepare_process
from elastic.parallel.recording import Made
from elastic.parallel.references import check_references
from elastic.parallel.wrapping import place_whole
from elastic.worker.placing import Placing
from tests.building_jobs import (
    Building,
    Container,
    Copying,
    Following,
    FollowingInLoss,
    Lazy,
    Listed,
    Mixing,
    Noising,
    Scripted,
)
from tests.forked import configure, train

CPU = torch.device("cpu")


class Mark(nn.Parameter):
    """A parameter by another name, with something of its own."""


def whole(make) -> tuple[DeferredModel, nn.Module]:
    """Built without memory where that goes, and filled."""
    try:
        built = build(make, 0)
    except CannotDefer:
        built = build_eagerly(make, 0)
    return built, place_whole(built, CPU)


# ---- parameters and buffers stay the objects that model() made -------------------------------------------------------


def test_hooks_references_classes_and_marks_of_parameters_stay_true():
    kept: dict[str, object] = {}

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        weight, bias = Mark(torch.ones(2, 3)), model[0].bias
        weight.group, model[0].weight = "heavy", weight
        bias.requires_grad_(True).register_post_accumulate_grad_hook(lambda p: kept["after"].append(p is bias))
        bias.requires_grad_(False)
        handle = weight.register_hook(lambda gradient: gradient * 10)
        weight.register_hook(lambda gradient: gradient + 1)
        model.watched, model.pair = [weight], (model[1].running_mean, {"bias": bias})
        kept.update(
            weight=weight, after=[], handle=handle, norm=lambda: weight.detach().norm(), mean=model[1].running_mean
        )
        return model

    _, model = whole(make)
    weight, bias = model[0].weight, model[0].bias

    assert weight is kept["weight"]
    assert weight is model.watched[0]
    assert (type(weight), weight.group) == (Mark, "heavy")
    assert model[1].running_mean is kept["mean"] is model.pair[0]
    assert model.pair[1]["bias"] is bias
    assert not bias.requires_grad
    assert float(kept["norm"]()) == pytest.approx(6**0.5)
    bias.requires_grad_(True)
    model[0](torch.ones(1, 3)).sum().backward()
    assert weight.grad.tolist() == [[11.0] * 3] * 2
    assert kept["after"] == [True]
    kept["handle"].remove()
    weight.grad = None
    model[0](torch.ones(1, 3)).sum().backward()
    assert weight.grad.tolist() == [[2.0] * 3] * 2


def test_tensors_that_share_memory_still_do():
    def make() -> nn.Module:
        model = nn.Linear(3, 3)
        model.rows, model.initial = model.weight.data[1:], model.weight.detach().clone()
        model.register_buffer("expanded", torch.ones(1).expand(4))
        return model

    _, model = whole(make)

    assert torch.equal(model.initial, model.weight)
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(model.rows, model.weight[1:])
    assert torch.equal(model.initial + 1, model.weight)
    assert model.expanded.add_(1).tolist() == [2.0] * 4


@functools.cache
def table() -> torch.Tensor:
    return torch.arange(4.0) * 2


def test_what_is_kept_anywhere_gets_its_value():
    """In lists, tuples, dictionaries, closures, copies, caches of functions; as teachers of the model or of the job."""
    job: dict[str, object] = {}

    def make() -> nn.Module:
        model, hidden = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 2)), nn.Linear(3, 1)
        teacher = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval().requires_grad_(False)
        job.update(ema=copy.deepcopy(model), teacher=(teacher,), table=table())
        model.old, model.by_name = [copy.deepcopy(teacher)], {"hidden": hidden}
        model[0].register_forward_hook(lambda module, args, out: out + hidden(args[0]))
        return model

    built, model = whole(make)

    assert not built.others or all(not t.is_meta for m in built.others for t in m.state_dict().values())
    for name, value in job["ema"].state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    teacher, x = job["teacher"][0], torch.ones(2, 3)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert torch.equal(model.old[0](x), teacher(x))
    assert float(teacher[0].weight.abs().sum()) > 0
    assert job["table"].tolist() == [0.0, 2.0, 4.0, 6.0]
    assert table() is job["table"]
    expected = nn.functional.linear(x, model[0].weight, model[0].bias) + model.by_name["hidden"](x)
    assert torch.equal(model[0](x), expected)


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrised_weights_have_the_values_that_torch_would_give(wrap):
    _, model = whole(lambda: wrap(nn.Linear(6, 5)))

    again = wrap(nn.Linear(6, 5))
    again.load_state_dict(model.state_dict())
    x = torch.ones(2, 6)
    assert torch.equal(model.eval()(x), again.eval()(x))
    weight = model.weight
    if wrap is parametrizations.spectral_norm:  # its estimate has been iterated fifteen times
        assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(1.0, rel=0.05)
    if wrap is parametrizations.orthogonal:  # torch goes on where it finds no values to begin from
        torch.testing.assert_close(weight @ weight.T, torch.eye(5))


# ---- what needs values is built with values -------------------------------------------------------------------------


def swallows() -> nn.Module:
    model = nn.Linear(2, 2)
    try:
        model.scale = 1 / float(model.weight.abs().max())
    except Exception:
        model.scale = 1.0
    return model


def as_numpy() -> nn.Module:
    model = nn.Linear(2, 2)
    try:
        model.first = model.weight.detach().numpy()[0]
    except Exception:
        model.first = None
    return model


def by_address() -> nn.Module:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.tied = model[0].weight.data_ptr() == model[1].weight.data_ptr()
    return model


def with_a_graph() -> nn.Module:
    model = nn.Linear(2, 2)
    model.doubled = model.weight * 2
    return model


def on_accumulation() -> nn.Module:
    model = nn.Linear(2, 2)
    model.node = model.weight.expand_as(model.weight).grad_fn.next_functions[0][0]
    return model


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return torch.nn.utils.weight_norm(nn.Linear(2, 2))


@pytest.fixture(params=[False, True], ids=["", "frozen"])
def frozen(request: pytest.FixtureRequest):
    """The job has frozen its objects for the garbage collector, as one does before processes are forked; or not."""
    if request.param:
        gc.freeze()
    yield
    freeze_imported()  # as tests.conftest does


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("make", [swallows, as_numpy, by_address, with_a_graph, on_accumulation, old_weight_norm])
def test_what_asks_for_values_or_keeps_a_graph_is_built_in_real_memory(make):
    with pytest.raises(CannotDefer):
        build(make, 0)

    model = place_whole(build_eagerly(make, 0), CPU)

    if make is swallows:
        assert model.scale == 1 / float(model.weight.abs().max())
    if make is as_numpy:
        assert model.first.tolist() == model.weight[0].tolist()
    if make is by_address:
        assert not model.tied


@pytest.mark.usefixtures("frozen")
def test_what_is_made_is_found_across_collections_and_lives_no_longer_for_it():
    kept = [nn.Linear(1, 1)]
    with Made(nn.Module, torch.Tensor) as made:
        for generation in (0, 1, 2):
            kept.append(nn.Linear(2, 2))
            gone = weakref.ref(nn.Linear(3, 3))
            gc.collect(generation)
        kept.append(nn.Linear(2, 2))
        swapped = swap_module_params_on_conversion(kept[1].double)
        modules, tensors = ({id(o) for o in made.find(kind)} for kind in (nn.Module, torch.Tensor))

    assert modules == {id(m) for m in kept[1:]}
    assert tensors == {id(p) for m in kept[1:] for p in m.parameters()}
    assert swapped is kept[1]
    assert gone() is None


def swap_module_params_on_conversion(convert):
    """Torch swaps the parameters' contents, as it does to those of quantised tensors: nobody may refer to them
    weakly."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return convert()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_what_is_made_while_another_thread_makes_objects_is_found():
    ended = threading.Event()

    def make_garbage():
        while not ended.is_set():
            [[] for _ in range(1000)]

    other = threading.Thread(target=make_garbage)
    other.start()
    try:
        with Made(nn.Module) as made:
            kept = [nn.Identity() for _ in range(3000)]
            assert {id(m) for m in made.find(nn.Module)} == {id(m) for m in kept}
    finally:
        ended.set()
        other.join()


# ---- modes ----------------------------------------------------------------------------------------------------------


class Merging(nn.Linear):
    """An adapter that is merged into the weights in evaluation mode, and taken out of them in training."""

    def train(self, mode: bool = True):
        if mode != self.training:
            self.weight.data.add_(-1.0 if mode else 1.0)
        return super().train(mode)


def test_each_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)), Merging(2, 2), nn.Dropout())
    model[0].eval()
    model[0][0].train()
    kept, weight = modes.of(model), model[1].weight.detach().clone()

    model.eval()
    assert torch.equal(model[1].weight, weight + 1)
    modes.restore(model, kept)

    assert modes.of(model) == kept
    assert [m.training for m in model.modules()] == [True, False, True, False, True, True]
    torch.testing.assert_close(model[1].weight.detach(), weight)
    modes.restore(model, {"2": False, "gone": True})
    assert [m.training for m in model.modules()] == [True, False, True, False, True, False]


# ---- what is refused before training ---------------------------------------------------------------------------------


def warm_up(job: elastic.Job, strategy: str) -> None:
    config = configure("unused", None, parallel__strategy=strategy)
    Placing(job, config, CPU).warm_up()


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize(
    ("job", "strategies", "message"),
    [
        (Lazy(), ["ddp", "fsdp"], r"0.weight \(LazyLinear\) takes its size from the first batch"),
        (Building(hook=True), ["fsdp"], r"parameter first.weight has a hook on its gradient"),
        (Listed(), ["fsdp"], r"job.watched keeps the parameter first.weight of the model"),
        (Container(), ["fsdp"], r"model\(\) returns a ModuleDict, which has no forward\(\)"),
        (Scripted(), ["fsdp"], r"second \(Sequential\) is a ScriptModule, whose parameters cannot be sharded"),
    ],
)
def test_what_cannot_train_right_is_refused_by_name(job, strategies, message):
    for strategy in ("ddp", "fsdp"):
        if strategy in strategies:
            with pytest.raises(ConfigError, match=message):
                warm_up(job, strategy)
        else:
            warm_up(job, strategy)


def test_recurrent_tied_and_parametrised_layers_keep_no_parameter_that_fsdp_would_miss():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.first = nn.LSTM(4, 3), nn.Linear(3, 3)
            self.tied = nn.Linear(3, 3)
            self.tied.weight = self.first.weight
            self.attention = nn.MultiheadAttention(4, 2)
            self.listed = nn.ParameterList([nn.Parameter(torch.ones(2))])
            self.norm = parametrizations.spectral_norm(nn.Linear(3, 3))
            self.transformer = nn.TransformerEncoderLayer(4, 2, 8)

    for built in (build(Model, 0), build_eagerly(Model, 0)):
        check_references(built.model, object())


# ---- runs ------------------------------------------------------------------------------------------------------------

RUN = {
    "run__duration": "6st",
    "batch__global_size": 8,
    "batch__microbatches": 4,
    "optim__schedule": "constant",
    "optim__warmup": None,
    "optim__clip_norm": None,
    "eval__every": "2st",
}
RIGHT = "seen 0, mean 0.0"


def ran(tmp_path, name: str, job: elastic.Job, workers: int, strategy: str = "ddp", **options):
    found = train(job, configure(tmp_path, name, **RUN, parallel__strategy=strategy, **options), workers)
    assert found.failure is None
    return found


def resumed(tmp_path, name: str, job: elastic.Job, workers: tuple[int, int], strategies: tuple[str, str], **options):
    ran(tmp_path, name, job, workers[0], strategies[0], run__stop_after="3st", **options)
    return ran(tmp_path, name, job, workers[1], strategies[1], **options)


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.usefixtures("fork_server")
def test_hooks_modes_and_teachers_are_the_same_at_every_world_size_and_after_a_pause(tmp_path):
    job = Building(hook=True, bank=True)
    one, two = ran(tmp_path, "one", job, 1), resumed(tmp_path, "two", job, (2, 1), ("ddp", "ddp"))
    fast = resumed(tmp_path, "fast", job, (1, 2), ("ddp", "ddp"), run__exactness="fast")

    right = f"{RIGHT}, row 0 moved 0.0, row 1 True, bank of 13"
    assert {found.result["sample"] for found in (one, two, fast)} == {right}
    assert one.sha == two.sha
    assert fast.column("loss") == pytest.approx(one.column("loss"), rel=1e-4)


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.usefixtures("fork_server")
def test_methods_parts_and_parameters_train_alike_where_the_model_is_cut(tmp_path):
    whole = ran(tmp_path, "whole", Building(), 1)
    parts = resumed(tmp_path, "parts", Building(parts=True), (3, 2), ("fsdp", "fsdp"))
    fast = ran(tmp_path, "fast", Building(parts=True), 2, "fsdp", run__exactness="fast")

    assert {found.result["sample"] for found in (whole, parts, fast)} == {RIGHT}
    assert parts.sha == whole.sha
    assert parts.result["metrics"] == whole.result["metrics"]
    assert fast.column("loss") == pytest.approx(whole.column("loss"), rel=1e-4)


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize(
    ("job", "sentence"),
    [
        (Copying(), r"the model is copied with deepcopy, which with .* does not go; keep copies of its parameters"),
        (
            Noising(),
            r"optimizer.step\(\) or after_step\(\) draws random numbers for sharded parameters \(randn_like\), of",
        ),
        (Mixing(), r"whole tensors are mixed with parameters of the model, of which each worker has rows only"),
        (
            Following(),
            r"loss\(\) changes .* \(blocks.0.teacher.bias, blocks.0.teacher.weight\) while they are gathered, and",
        ),
        (FollowingInLoss(), r"loss\(\) changes .* \(copy.bias, copy.weight\) while they are gathered, and with"),
    ],
)
def test_what_a_cut_model_cannot_do_is_told_in_a_sentence(tmp_path, job, sentence):
    found = train(job, configure(tmp_path, "run", **RUN, parallel__strategy="fsdp"), 2)

    assert found.failure is not None
    assert re.search(sentence, found.failure)
    assert "Traceback" not in found.failure


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.usefixtures("fork_server")
def test_a_pass_that_meets_no_memory_builds_the_model_with_memory_and_goes_on(tmp_path):
    runs = [ran(tmp_path, f"{s}-{w}", Building(place=True), w, s) for s, w in (("ddp", 1), ("ddp", 2), ("fsdp", 2))]

    assert len({found.sha for found in runs}) == 1
    for found in runs:
        told = [*found.events("built_whole"), *found.events("worker_warm")]
        assert any("Tensor on device meta" in json.dumps(event) for event in told)
        assert found.result["sample"] == RIGHT


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.usefixtures("fork_server")
def test_scripted_functions_and_modules_have_the_same_bits_at_every_world_size(tmp_path):
    one, two = ran(tmp_path, "one", Scripted(), 1), resumed(tmp_path, "two", Scripted(), (2, 1), ("ddp", "ddp"))

    assert one.sha == two.sha


def test_what_torch_jit_makes_of_a_function_does_not_depend_on_how_often_it_ran(monkeypatch):
    """Its profiling executor takes other kernels from the second run on: in the worker that had more microbatches."""

    def gradients(function) -> list[torch.Tensor]:
        found = []
        for _ in range(3):
            x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
            function(x, torch.linspace(0.1, 1.0, 16)).square().sum().backward()
            found.append(x.grad)
        return found

    def scripted_alike(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return (torch.softmax(x * gain, -1) * x).sum(-1) + torch.log_softmax(x, -1).mean(-1)

    def scripted_otherwise(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return (torch.softmax(x * gain, -1) * x).sum(-1) + torch.log_softmax(x, -1).mean(-1)

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    first, second, _ = gradients(torch.jit.script(scripted_otherwise))
    assert not torch.equal(first, second)
    try:
        prepare_process(bitwise=True, threads=torch.get_num_threads())
        first, second, third = gradients(torch.jit.script(scripted_alike))
    finally:
        torch.use_deterministic_algorithms(False)
        torch._C._jit_set_profiling_executor(True)
        torch._C._set_graph_executor_optimize(True)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
