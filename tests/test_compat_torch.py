"""What `elastic.compat` relies on in torch, name by name, so that a new torch fails here first, in seconds."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from elastic.compat import torch as compat
from elastic.compat import torch_groups as groups
from elastic.compat import torch_sharded as sharded
from elastic.compat.torch_checkpoint import PICKLED, StorageInfo
from elastic.compat.torch_world import ANSWERS, HOMES, hide_world
from elastic.parallel.replicated import norm_of_all
from elastic.worker.alone import wants_process_group

#: Bare groups of gloo, for as long as this process lives: taking one apart waits for gloo's thread and holds the
#: interpreter meanwhile, which that thread may be waiting for, to drop a tensor.
_kept: list[object] = []


@contextmanager
def world_of_one() -> Iterator[dist.HashStore]:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    _kept.append(dist.group.WORLD)
    try:
        yield store
    finally:
        dist.destroy_process_group()


# ---- tensors -------------------------------------------------------------------------------------------------------


def test_every_write_in_place_moves_the_counter_also_that_of_a_view_and_none_through_data() -> None:
    tensor = torch.zeros(4)
    counts = [compat.version_of(tensor)]
    for write in (lambda: tensor.add_(1), lambda: tensor[:2].zero_(), lambda: tensor.copy_(torch.ones(4))):
        write()
        counts.append(compat.version_of(tensor))
    tensor.data.add_(1)
    compat.norm_of_each([tensor])
    assert counts == sorted(set(counts)), "a write in place moved no counter"
    assert compat.version_of(tensor) == counts[-1], "what is no write, or goes through .data, moved the counter"


def test_writes_through_data_move_the_counter_where_that_is_asked_for() -> None:
    one, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    with compat.counting_data(but={id(other)}):
        counts = [compat.version_of(one)]
        for write in (lambda: one.data.mul_(2), lambda: one.data[:1].zero_(), lambda: setattr(one, "data", other + 1)):
            write()
            counts.append(compat.version_of(one))
        assert one.data.tolist() == [2.0, 2.0, 2.0]
        assert not one.data.requires_grad
        one.data = one.data
        other.data.mul_(2)
        other.data = other.detach() * 2
        assert compat.version_of(one) == counts[-1], "what is no write moved the counter"
    one.data.add_(1)
    assert counts == sorted(set(counts)), "a write moved no counter"
    assert (compat.version_of(one), compat.version_of(other)) == (counts[-1], 0)


def test_an_update_of_the_optimizer_moves_the_counters_of_parameters() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    before = compat.version_of(parameter)
    torch.optim.AdamW([parameter], foreach=True).step()
    assert compat.version_of(parameter) > before, "savers could not see that an update wrote into what they copy"


def test_statistics_of_normalisation_layers_are_written_to_and_the_layers_are_known_as_such() -> None:
    layers = [nn.BatchNorm1d(2), nn.SyncBatchNorm(2), nn.InstanceNorm1d(2, track_running_stats=True)]
    assert all(isinstance(layer, compat.NormWithStatistics) for layer in layers)
    assert not isinstance(nn.LayerNorm(2), compat.NormWithStatistics)
    layer = layers[0]
    layer(torch.randn(5, 2))
    assert layer.running_mean.any()


def test_many_tensors_are_added_multiplied_and_measured_with_the_bits_of_a_loop() -> None:
    torch.manual_seed(0)
    left, right = ([torch.randn(n) for n in (1, 7, 1000)] for _ in range(2))
    sums = [(a + b) * 0.3 for a, b in zip(left, right)]
    compat.add_each_(left, right)
    compat.multiply_each_(left, 0.3)
    assert all(map(torch.equal, left, sums)), "sums in one kernel have other bits"
    assert all(map(torch.equal, compat.norm_of_each(left), [torch.linalg.vector_norm(t) for t in left]))


def test_norms_of_tensors_in_16_bits_have_more_digits_and_are_finite() -> None:
    assert float(norm_of_all([])) == 0.0
    torch.manual_seed(0)
    short = [torch.randn(1000).to(torch.bfloat16), torch.full((9,), 6e4, dtype=torch.float16)]
    for tensors in (
        short,
        short[:1],
        [*short, torch.ones(3, dtype=torch.float64), torch.ones(2, dtype=torch.complex64)],
    ):
        right = [float(t.double().norm()) if not t.is_complex() else 2**0.5 for t in tensors]
        assert [float(n) for n in compat.norm_of_each(tensors)] == pytest.approx(right, rel=1e-6)
        assert float(norm_of_all(tensors)) == pytest.approx(sum(n * n for n in right) ** 0.5, rel=1e-6)


def test_a_view_knows_what_it_is_a_view_of_and_both_share_a_storage_also_on_meta() -> None:
    tensor = torch.zeros(4, device="meta")
    assert compat.base_of(tensor[1:]) is tensor
    assert compat.base_of(tensor) is None
    assert compat.storage_identity(tensor[1:]) == compat.storage_identity(tensor)
    assert compat.storage_identity(torch.zeros(4, device="meta")) != compat.storage_identity(tensor)


def test_values_of_a_sparse_gradient_are_those_of_each_row_once() -> None:
    rows, values = torch.tensor([[2, 0, 2]]), torch.tensor([[1.0], [2.0], [3.0]])
    gradient = torch.sparse_coo_tensor(rows, values, (4, 1), check_invariants=True)
    assert compat.values_of_sparse(gradient).tolist() == [[2.0], [4.0]]


def test_hooks_on_a_gradient_are_seen_and_can_be_given_to_another_tensor() -> None:
    first, second = (torch.ones(2, requires_grad=True) for _ in range(2))
    assert not any(compat.gradient_hooks(first))
    called: list[str] = []
    first.register_hook(lambda g: called.append("before"))
    first.register_post_accumulate_grad_hook(lambda p: called.append("after"))
    hooks = compat.gradient_hooks(first)
    assert all(hooks), "a hook on a gradient is not seen, so a model with one would be cut"
    compat.set_gradient_hooks(second, hooks)
    second.sum().backward()
    assert called == ["before", "after"]


def test_views_and_nodes_of_the_graph_count_as_uses_of_a_tensor() -> None:
    tensor = torch.ones(2, requires_grad=True)
    assert compat.use_count(tensor) == 1
    view = tensor.detach()[:1], tensor[:1]
    assert compat.use_count(tensor) > 1, view


# ---- operations ----------------------------------------------------------------------------------------------------


def test_functions_that_make_tensors_are_known_and_those_that_take_some_are_not() -> None:
    assert all(map(compat.makes_tensors, (torch.empty, torch.randn, torch.arange, torch.tensor)))
    assert not any(map(compat.makes_tensors, (torch.add, torch.Tensor.to)))


def test_an_operation_tells_what_it_writes_to_and_is_seen_by_a_dispatch_mode() -> None:
    seen: list[tuple[str, list[Any]]] = []

    class Look(compat.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((str(function), compat.written_arguments(function, args, kwargs or {})))
            return function(*args, **(kwargs or {}))

    tensor, out = torch.ones(2, device="meta"), torch.ones(2, device="meta")
    with Look():
        tensor.mul_(2)
        torch.add(tensor, 1, out=out)
        tensor + 1
    written = [targets for _, targets in seen]
    assert [len(targets) for targets in written] == [1, 1, 0], seen
    assert written[0][0] is tensor
    assert written[1][0] is out, "an argument by name that is written to is not seen"


def test_the_initialiser_that_looks_at_what_it_draws_is_wrapped_under_every_name_of_it() -> None:
    from torch.nn.init import trunc_normal_

    called: list[tuple[Any, ...]] = []

    def wrap(inside: Any) -> Any:
        def wrapped(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            called.append((tensor, *args))
            return inside(tensor, *args, **kwargs)

        return wrapped

    tensor = torch.empty(3)
    before = trunc_normal_(tensor.clone())
    with compat.trunc_normal_wrapped(wrap):
        trunc_normal_(tensor, 0.5)
    trunc_normal_(before)
    assert len(called) == 1, "trunc_normal_ is made of other parts: models that use it would not be deferred"
    assert called[0][0] is tensor
    assert called[0][1:] == (0.5, 1.0, -2.0, 2.0)


def test_trees_are_mapped_and_flattened_and_wrapper_subclasses_are_known() -> None:
    assert compat.tree_flatten({"a": [1, (2,)]})[0] == [1, 2]
    assert compat.tree_map(lambda x: x + 1, [1, {"b": 2}]) == [2, {"b": 3}]
    assert compat.tree_map_only(int, lambda x: -x, (1, "c")) == (-1, "c")
    assert not compat.is_traceable_wrapper_subclass(nn.Parameter(torch.ones(1)))


def test_torch_jit_can_be_told_not_to_specialise() -> None:
    kept = torch._C._get_graph_executor_optimize()
    compat.stop_script_from_specialising()
    try:
        assert torch._C._get_graph_executor_optimize() is False
        profiled = torch._C._jit_set_profiling_executor(False)
        assert profiled is False, "the setting is not what the call before made it"
    finally:
        torch._C._jit_set_profiling_executor(True)
        torch._C._set_graph_executor_optimize(kept)


# ---- modules -------------------------------------------------------------------------------------------------------


def test_a_module_has_its_parameters_buffers_and_modules_in_dicts_and_looks_into_them() -> None:
    module = nn.Module()
    module.weight, module.none = nn.Parameter(torch.ones(1)), None
    module.register_buffer("saved", torch.ones(1))
    module.register_buffer("scratch", torch.ones(1), persistent=False)
    module.inner = module.again = nn.Linear(1, 1)
    module.register_parameter("bias", None)
    assert compat.own_parameters(module) == {"weight": module.weight, "bias": None}
    assert list(compat.own_buffers(module)) == ["saved", "scratch"]
    assert compat.unsaved_buffers(module) == {"scratch"}
    assert list(compat.own_children(module)) == ["inner", "again"]
    other = torch.zeros(1)
    compat.own_parameters(module)["weight"] = other  # type: ignore[assignment]
    assert module.weight is other, "what is put into the dict is not what the module computes with"
    assert [vars(module)[name] for name in compat.OWN_DICTS] == [
        compat.own_parameters(module),
        compat.own_buffers(module),
        compat.own_children(module),
    ]


def test_extra_state_is_in_a_state_dict_under_the_last_part_of_its_key() -> None:
    class Own(nn.Module):
        def get_extra_state(self) -> int:
            return 7

    assert nn.Sequential(Own()).state_dict() == {f"0.{compat.EXTRA_STATE}": 7}


def test_wrappers_have_the_module_that_they_wrap_under_the_names_that_we_know() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    inner = nn.Linear(1, 1)
    with world_of_one():
        wrapped: list[Any] = [
            nn.parallel.DistributedDataParallel(inner),
            nn.DataParallel(inner),
            torch.compile(inner),
            checkpoint_wrapper(inner),
        ]
    for one, name in zip(wrapped, compat.WRAPPERS.values(), strict=True):
        assert compat.own_children(one)[name] is inner
        assert {(c.__module__, c.__name__) for c in type(one).__mro__} & compat.WRAPPERS.keys(), type(one).__mro__


def test_a_recurrent_layer_computes_with_the_list_of_its_parameters_and_makes_its_weak_ones_again() -> None:
    layer, inputs = nn.GRU(1, 1), torch.ones(1, 1, 1)
    before = layer(inputs)[0]
    kept = compat.own_parameters(layer)["weight_ih_l0"]
    assert compat.flat_weights(layer)[0] is kept
    compat.own_parameters(layer)["weight_ih_l0"] = torch.full((3, 1), 9.0)  # type: ignore[assignment]
    compat.list_weights_again(layer)
    assert not torch.equal(layer(inputs)[0], before)
    compat.own_parameters(layer)["weight_ih_l0"] = kept
    compat.list_weights_again(layer)
    compat.forget_weak_weights(layer)
    assert torch.equal(layer.to("cpu")(inputs)[0], before)
    assert len(layer._flat_weight_refs) == len(layer._flat_weights)


def test_compiled_modules_are_known_as_such() -> None:
    module = nn.Linear(1, 1)
    assert not compat.is_compiled(module)
    assert compat.is_compiled(torch.compile(module))
    module.compile()
    assert compat.is_compiled(module)
    assert compat.is_compiler_loaded()


def test_what_the_first_step_of_an_optimizer_imports_can_be_imported_before() -> None:
    compat.load_compiler()
    assert compat.is_compiler_loaded()
    assert "import torch._dynamo" in inspect.getsource(inspect.getmodule(torch.optim.Optimizer))  # type: ignore[arg-type]


def test_an_optimizer_with_a_scheduler_is_known_as_such() -> None:
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    assert not compat.has_scheduler(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert compat.has_scheduler(optimizer), scheduler


def test_hooks_around_an_update_are_known() -> None:
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    assert not compat.has_step_hooks(optimizer)
    for register in (
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
    ):
        handle = register(lambda *_: None)
        assert compat.has_step_hooks(optimizer), register
        handle.remove()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert not compat.has_step_hooks(optimizer), scheduler
    optimizer.step = lambda: None
    assert compat.has_step_hooks(optimizer)


# ---- torch.compile -------------------------------------------------------------------------------------------------


def test_the_compiler_has_the_settings_that_make_its_code_the_same_every_time() -> None:
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    for name in compat.AUTOTUNING:
        assert hasattr(inductor, name), f"torch's compiler has no setting {name} any more: what replaces it?"
    with inductor.patch(dict.fromkeys(compat.AUTOTUNING, False)):
        assert compat.autotuning() is None
        with inductor.patch({"max_autotune_gemm": True}):
            assert compat.autotuning() == "torch._inductor.config.max_autotune_gemm"
    with dynamo.patch({"recompile_limit": 8, "fail_on_recompile_limit_hit": False}):
        compat.limit_recompiles(3)
        assert (dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit) == (3, True)


# ---- process groups ------------------------------------------------------------------------------------------------


def test_equal_flat_tensors_are_gathered_under_either_name() -> None:
    gathered = torch.zeros(2)
    with world_of_one():
        groups.all_gather_flat(gathered, torch.ones(2))
    assert gathered.tolist() == [1.0, 1.0]


def test_ddp_sends_no_buffers_and_says_whether_it_has_reduced_all_gradients() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    with world_of_one():
        ddp = nn.parallel.DistributedDataParallel(model, **groups.NO_BUFFER_SYNC)
        ddp(torch.ones(2, 1)).sum().backward()
        groups.check_reduced(ddp)
        assert not ddp.will_sync_module_buffers()
        ddp(torch.ones(2, 1)).sum()
        model[0](torch.ones(2, 1)).sum().backward()  # of which the second module gets nothing
        with pytest.raises(RuntimeError, match="finished reduction"):
            groups.check_reduced(ddp)


def test_groups_are_named_by_a_count_that_can_be_set_back() -> None:
    dist.distributed_c10d._world.group_count = 5
    groups.count_groups_from_zero()
    with world_of_one():
        assert dist.distributed_c10d._get_default_group().group_name == "0"


def test_groups_are_known_in_their_order_until_torch_is_to_forget_them() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    second = dist.new_group([0])
    known = groups.process_groups()
    assert [group.group_name for group in known] == ["0", second.group_name]
    assert groups.failure_of_group(known[0], torch.device("cpu")) is None, "gloo tells of no failure"
    assert callable(known[0].abort)
    groups.forget_groups()
    assert groups.process_groups() == []
    assert not dist.is_initialized()
    with world_of_one():  # under the names of the ones before
        assert groups.process_groups()[0].group_name == "0"
    for group in known:
        group.shutdown()


def test_gloo_works_in_threads_of_the_name_that_we_look_for() -> None:
    with world_of_one():
        dist.barrier()
        names = {task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")}
    assert groups.GLOO_THREAD in names, f"operations that still run would not be waited for; threads are {names}"


def test_a_group_in_python_around_gloo_is_asked_for_its_name_backend_and_operations() -> None:
    started: list[str] = []

    class Group(groups.AroundGloo):
        def __init__(self, options: Any, _: Any):
            super().__init__(options.store, options.group_rank, options.group_size, options.timeout)

        def allreduce(self, *arguments: Any) -> Any:
            started.append("allreduce")
            return self.inner.allreduce(*arguments)

        def broadcast(self, *arguments: Any) -> Any:
            started.append("broadcast")
            return self.inner.broadcast(*arguments)

    assert {"allreduce", "broadcast", "send", "recv", "barrier"} <= set(groups.GLOO_OPERATIONS)
    dist.Backend.register_backend("contract_gloo", Group, extended_api=True, devices=["cpu"])
    dist.init_process_group("contract_gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=9))
    try:
        group: Any = dist.distributed_c10d._get_default_group()
        dist.all_reduce(torch.ones(1))
        dist.broadcast(torch.ones(1), 0)
        assert started == ["allreduce", "broadcast"]
        assert group.group_name == group.inner.group_name
        assert torch.device("cpu") in group._device_types
    finally:
        dist.destroy_process_group()


def test_who_is_neither_torch_nor_of_this_package_sees_one_process_without_a_group() -> None:
    import torch.distributed.nn
    from torch.distributed import _functional_collectives as functional

    real, gathers = (dist.get_rank, dist.all_reduce), torch.distributed.nn.functional.all_gather
    with world_of_one():
        back = hide_world(RuntimeError)
        try:
            assert (dist.is_initialized(), dist.get_rank(), dist.get_world_size()) == (False, 0, 1)
            assert eval("ask()", {"__name__": "torch.distributed.fsdp", "ask": dist.is_initialized})
            mode = eval("lambda f: f()", {"__name__": "torch.utils._device"})  # as torch.set_default_device() has one
            ours = eval("lambda: mode(ask)", {"__name__": "elastic.a", "mode": mode, "ask": dist.is_initialized})
            assert (ours(), mode(dist.is_initialized)) == (True, False)
            for call in (dist.all_reduce, gathers, lambda t: functional.all_reduce(t, "sum", None)):
                with pytest.raises(RuntimeError, match=r"torch\.distributed\..*all_.*\(\) \(.*\.py, line \d+\)"):
                    call(torch.ones(2))
            wrapped = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
            wrapped(torch.ones(1, 2)).sum().backward()
            batch = torch.arange(6.0).reshape(3, 2)
            assert torch.equal(nn.SyncBatchNorm(2)(batch), nn.BatchNorm1d(2)(batch))
            compiled = torch.compile(lambda x: x * dist.get_world_size() + dist.is_initialized(), backend="eager")
            assert compiled(torch.ones(1)) == 1
        finally:
            back()
        dist.all_reduce(torch.ones(2))
    assert (dist.get_rank, dist.all_reduce) == real
    assert {"all_reduce", "all_gather_single", "broadcast"} <= set(HOMES[functional])
    assert all(hasattr(dist, name) for name in ("all_gather", "barrier", "new_group", "reduce", "send", *ANSWERS))


def test_no_backward_pass_begins_under_any_name_where_it_is_refused() -> None:
    from torch.autograd import grad

    x = torch.ones(2, requires_grad=True)
    calls: list[Callable[[], Any]] = [
        lambda: x.sum().backward(),
        lambda: grad(x.sum(), x),
        lambda: torch.autograd.backward(x.sum()),
        lambda: torch.func.grad(torch.sum)(x),
    ]
    with sharded.without_backward(lambda: RuntimeError("not here")):
        for call in calls:
            with pytest.raises(RuntimeError, match="not here"):
                call()
    for call in calls:
        call()


@pytest.mark.parametrize("make", [nn.parallel.DistributedDataParallel, torch.distributed.fsdp.fully_shard])
def test_what_needs_a_process_group_is_known_by_what_torch_says(make) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        make(nn.Linear(2, 2))

    said = wants_process_group(raised.value)

    assert said is not None
    assert "test_compat_torch.py" in said
    assert "leave it out" in said
    assert wants_process_group(ValueError("another one")) is None


def test_every_method_of_a_group_that_starts_an_operation_is_known() -> None:
    """One that is not known would go to the base class, which has no backend for it."""
    starts = ("all", "barrier", "broadcast", "gather", "recv", "reduce", "scatter", "send")
    there = {name for name in dir(dist.ProcessGroup) if not name.startswith("__")}
    there = {name for name in there if name.lstrip("_").startswith(starts)}
    assert there == set(groups.GLOO_OPERATIONS)


def test_an_operation_in_python_says_where_a_receive_came_from() -> None:
    class Work(groups.PythonWork):
        def source_rank(self) -> int:
            return 3

    assert groups.source_rank(Work()) == 3


def test_fsdp2_reduces_gradients_that_some_workers_lack() -> None:
    assert groups.leaves_unused_gradients() == (tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13))


# ---- texts ---------------------------------------------------------------------------------------------------------


def test_errors_about_cut_tensors_and_modules_are_known_by_their_texts() -> None:
    with world_of_one():
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        cut = DTensor.from_local(torch.ones(2), mesh)
        with pytest.raises(RuntimeError) as mixed:
            cut + torch.ones(2)
        with pytest.raises(AssertionError) as copied:
            copy.deepcopy(fully_shard(nn.Linear(2, 2), mesh=mesh))
        with pytest.raises((NotImplementedError, RuntimeError)) as lacking:
            torch.searchsorted(cut, cut)
    assert compat.mixes_cut_and_whole(mixed.value)
    assert compat.copies_cut_module(copied.value)
    assert compat.lacks_sharding(lacking.value), lacking.value


def test_too_little_memory_of_the_host_is_known_by_its_text() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert compat.is_out_of_host_memory(error.value), error.value


# ---- torch.distributed.checkpoint ----------------------------------------------------------------------------------


def test_the_pickle_of_a_checkpoints_metadata_names_what_we_let_it_name() -> None:
    place = StorageInfo("__0_0.distcp", 5, 7)
    assert (place.relative_path, place.offset, place.length) == ("__0_0.distcp", 5, 7)
    named: set[tuple[str, str]] = set()

    class Names(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            named.add((module, name))
            return super().find_class(module, name)

    Names(io.BytesIO(pickle.dumps((place, TensorProperties.create_from_tensor(torch.ones(1)))))).load()
    private = {(module, name) for module, name in named if name.startswith("_")}
    assert private == {(module, name) for module, names in PICKLED.items() for name in names}


def test_fsdp2_gathers_into_the_same_parameters_without_moving_their_counters() -> None:
    with world_of_one():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        fully_shard(model[0])
        fully_shard(model)
        model(torch.ones(1, 2)).sum().backward()
        gathered = [pair for m in (model, model[0]) for pair in sharded.gathered_parameters(m)]
        assert sorted(name for name, _ in gathered) == ["0.bias", "0.weight", "1.bias", "1.weight"]
        before = [compat.version_of(p) for _, p in gathered]
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model(torch.ones(1, 2)).sum().backward()
        again = [pair for m in (model, model[0]) for pair in sharded.gathered_parameters(m)]
        assert [id(p) for _, p in again] == [id(p) for _, p in gathered]
        assert [compat.version_of(p) for _, p in gathered] == before


def test_hooks_inside_those_of_fsdp2_see_what_is_gathered_before_and_after_all_others() -> None:
    seen: list[tuple[str, bool]] = []

    def note(name: str) -> Any:
        return lambda module, *_: seen.append((name, isinstance(module.weight, DTensor)))

    with world_of_one():
        model = nn.Linear(2, 2)
        model.register_forward_pre_hook(note("job's before"))
        model.register_forward_hook(note("job's after"))
        fully_shard(model)
        remove = sharded.hook_inside(model, note("before"), note("after"))
        model(torch.ones(1, 2))
        model.reshard()
        remove()
        model(torch.ones(1, 2))
    assert [name for name, _ in seen] == ["before", "job's before", "job's after", "after"] + [
        "job's before",
        "job's after",
    ]
    assert not any(cut for _, cut in seen)


def test_fsdp2_lets_modules_alone_whose_whole_parameters_somebody_else_has_put_there() -> None:
    with world_of_one():
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        for module in (model[0], model):
            fully_shard(module)
        x = torch.ones(1, 2)
        expected = model(x).detach()
        for module in (model[0], model):
            module.reshard()
        cut = [dict(m._parameters) for m in model]
        for module, parameters in zip(model, cut, strict=True):
            module._parameters |= {k: nn.Parameter(p.full_tensor()) for k, p in parameters.items()}
        with sharded.without_gathering(model):
            model[1](model[0](x)).sum().backward()
            assert all(type(p.grad) is torch.Tensor for p in model.parameters())
        for module, parameters in zip(model, cut, strict=True):
            module._parameters |= parameters
        assert torch.equal(model(x), expected)


def test_a_view_of_other_elements_than_there_are_is_known_by_its_error() -> None:
    for ask in (lambda: torch.ones(6).view(-1, 4), lambda: torch.ones(6).reshape(2, 4)):
        with pytest.raises(RuntimeError) as caught:
            ask()
        assert compat.is_unfit_view(caught.value)


def test_attention_on_a_cpu_has_an_operator_of_its_own_that_the_counter_does_not_know() -> None:
    query = torch.ones(1, 2, 3, 4)
    count = partial(nn.functional.scaled_dot_product_attention, query, query, query)
    with FlopCounterMode(display=False) as usual:
        count()
    mapping: Any = {compat.CPU_ATTENTION: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as ours:
        count()

    assert (usual.get_total_flops(), ours.get_total_flops()) == (0, 2 * 2 * 2 * 3 * 3 * 4)
