"""From the job's `model()` to the state of a worker in a world: whole, or this worker's shards."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from elastic.checkpoint.initial import fill_initial, hashes, initial_source
from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.job import Job
from elastic.parallel import modes
from elastic.parallel.blocks import check_compiler, checkpoint_activations, compile_blocks, find_blocks
from elastic.parallel.deferred import CannotDefer, DeferredModel, build, build_eagerly
from elastic.parallel.fitness import check_dense, check_shardable, check_unhooked, check_unwritten
from elastic.parallel.matrices import is_muon
from elastic.parallel.mesh import Mesh
from elastic.parallel.optimizers import parts_of
from elastic.parallel.param_dtype import cast_parameters, check_castable
from elastic.parallel.probe import check_elementwise
from elastic.parallel.references import check_references
from elastic.parallel.scaling import LossScale
from elastic.parallel.stage_costs import costs_of
from elastic.parallel.stages import check_layers, layers_of, seed_each
from elastic.parallel.tensor import check_plan, is_sequential, plan_of
from elastic.parallel.turns import check_optimizers
from elastic.parallel.wrapping import (
    Sharding,
    lay_out_as_cut,
    place_sharded,
    place_whole,
)
from elastic.seeds import derive, seed_all
from elastic.worker.attributes import JobAttributes
from elastic.worker.belongings import digest
from elastic.worker.following import Patience
from elastic.worker.naming import live_tensors, parameter_names
from elastic.worker.state import TrainState

_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Placing:
    """Builds the state of a worker: once if the model is whole, once per world if it is sharded."""

    def __init__(self, job: Job, config: TrainConfig, device: torch.device, attributes: JobAttributes | None = None):
        self._job, self._config, self._device, self._attributes = job, config, device, attributes
        self._next: DeferredModel | None = None
        self._tried: set[type] = set()
        self._hashes: dict[str, str] = {}  # of the files of initial weights
        #: The fewest and the most stages of a pipeline; None without pipelines.
        self.stages: tuple[int, int] | None = None
        #: What each layer of a pipeline costs, as far as this worker knows.
        self.costs: list[int] = []
        #: Why the model is built in real memory; empty if it is built on meta.
        self.eager = ""

    def warm_up(self, first_batch: Callable[[], Any] = lambda: None) -> None:
        """Build the model on meta, and refuse a model that the strategy cannot handle.

        Args:
            first_batch: the first microbatch of the run; None if it cannot be fetched.

        Raises:
            ConfigError: with the module or parameter, and what to do.
        """
        parallel = self._config.parallel
        if parallel.offload and self._device.type == "cpu":
            raise ConfigError(
                "--parallel.offload is True, which moves state from GPUs, but workers run on CPUs; leave it out"
            )
        self._next = self._build()
        find_blocks(self._next.model, self._classes())
        if parallel.compile and self._config.run.exactness == "bitwise":
            check_compiler()
        check_unwritten(self._next.model)
        if parallel.sharded or self._config.run.exactness == "bitwise":
            check_dense(self._next.model)
        if self._param_dtype is not None:
            check_castable(self._next.model)
        if parallel.sharded:
            check_shardable(self._next.model)
            check_references(self._next.model, self._job)
        if parallel.tensor > 1:
            check_plan(self._next.model, plan_of(self._job, self._next.model), parallel.tensor)
        if parallel.stages > 1:
            layers = layers_of(self._job, self._next.model)
            check_layers(self._next.model, layers, parallel.stages)
            if parallel.tensor > 1 and is_sequential(plan_of(self._job, self._next.model)):
                raise ConfigError(
                    f"--parallel.pipeline is {parallel.stages}, but tensor_plan() cuts activations along the "
                    'sequence between layers, which stages do not send; leave "sequence" out of it, or this option'
                )
            self.stages = (parallel.stages, len(layers.modules))
            self.costs = costs_of(self._job, self._next.model, layers, first_batch())

    @property
    def model(self) -> torch.nn.Module:
        """The model as built at warm-up, perhaps on meta."""
        assert self._next is not None, "the model has been placed already"
        return self._next.model

    def whole(self) -> TrainState:
        """The state with a whole model and its initial values."""
        built = self._take()
        sourced, digests = self._sourced(built.model)
        model = place_whole(built, self._device)
        if self._config.run.exactness == "bitwise":
            lay_out_as_cut(model)
        for name, parameter in model.named_parameters():
            if name in sourced:
                sourced[name](parameter)
        return self._from_files(self._state(model, None, digests))

    def sharded(self, mesh: Mesh, *, fill: bool) -> TrainState:
        """The state with this worker's shards of a model; with initial values if `fill`, otherwise to be loaded.

        Raises:
            ConfigError: with bitwise, the optimizer's bits depend on sharding.
        """
        built, parallel, precision = self._take(), self._config.parallel, self._config.precision
        how = Sharding(
            native=self._config.run.exactness == "fast" and parallel.stages == 1,
            reshard_after_forward=parallel.reshard_after_forward,
            prefetch=parallel.prefetch,
            offload=parallel.offload,
            param_dtype=self._param_dtype,
            reduce_dtype=_DTYPES[precision.grad_compression],
        )
        sourced, digests = self._sourced(built.model)
        blocks = find_blocks(built.model, self._classes())
        plan = plan_of(self._job, built.model) if parallel.tensor > 1 else {}
        model = place_sharded(built, blocks, self._device, mesh, how, fill=fill, sourced=sourced, plan=plan)
        state = self._from_files(self._state(model, mesh, digests))
        kinds = {type(part) for part in parts_of(state.optimizer) if not is_muon(part)}
        if self._config.run.exactness == "bitwise" and not kinds <= self._tried:
            for part in parts_of(state.optimizer):
                if not is_muon(part):  # whose products are over whole matrices
                    check_elementwise(part)
            self._tried = kinds
        return state

    def build_whole(self, error: BaseException | None) -> bool:
        """Build the model in real memory from now on, if this error of a pass is about meta tensors."""
        about = isinstance(error, (RuntimeError, NotImplementedError)) and re.search(r"\bmeta\b", str(error), re.I)
        if self.eager or not about:
            return False
        self.eager, self._next = f"a pass failed: {error}".splitlines()[0], None
        return True

    def _sourced(self, model: torch.nn.Module) -> tuple[dict[str, Callable[[torch.Tensor], None]], dict[str, str]]:
        """Return what to do with the value of each parameter that is not saved, by the model's name for it.

        Returns:
            By name, a function that takes the value; and the dictionary into which these functions put digests of the
            values, by the names under which the parameters are saved.

        Raises:
            ConfigError: the values are to come from --checkpoint.init-from, which is read only once.
        """
        digests: dict[str, str] = {}
        known, sourced = parameter_names(model), dict[str, Callable[[torch.Tensor], None]]()
        saved: dict[int, str] = {}  # tied ones by the first of their names, as they would be saved
        for one in live_tensors(model):
            saved.setdefault(id(one.tensor), one.name)
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad and self._job.has_source(known[id(parameter)]):
                sourced[name] = partial(_note, digests, saved[id(parameter)])
        if sourced and self._config.checkpoint.init_from is not None:
            raise ConfigError(
                f"has_source() says that {known[id(dict(model.named_parameters())[next(iter(sourced))])]} need not be "
                "saved, but --checkpoint.init-from is read once, when a run begins; return these weights from "
                "initial_weights(), load them in model(), or let has_source() return False"
            )
        return sourced, digests

    def _from_files(self, state: TrainState) -> TrainState:
        """Give parameters that are not saved their values in the files of the job's `initial_weights()`, if it has any.

        Raises:
            ConfigError: the files cannot be read.
            CheckpointError: they lack one of these parameters.
        """
        source = initial_source(self._job, None) if state.sources else None
        if source is None:
            return state
        shards, aliases = state.weights()
        named = self._job.weight_name
        mine = [s for s in shards if s.name in state.sources and any(map(named, (s.name, *aliases.get(s.name, ()))))]
        if mine:
            found, _ = fill_initial(source, mine, aliases=aliases, named=named)
            self._hashes = self._hashes or hashes(source)  # once a process: the files are read whole for it
            there = {name: f"{self._hashes[source.entries[known][0]]} {known}" for name, known in found.items()}
            state.sources = {**state.sources, **there}
        return state

    def _state(self, model: torch.nn.Module, mesh: Mesh | None, sources: Mapping[str, str]) -> TrainState:
        precision = self._config.precision
        modes.begin(model)
        scaled = "fp16" in (precision.autocast, precision.param_dtype)
        scaler = LossScale(precision.loss_scale) if scaled else None
        least, keep = self._config.eval, self._config.checkpoint
        patience = None if least.patience is None else Patience(least.patience, least.min_delta, keep.best_mode)
        optimizer = self._job.optimizer(model)
        check_optimizers(self._job.phases, optimizer, model)
        if mesh is not None:
            check_unhooked(model)
        optim = self._config.optim
        return TrainState(self._job, model, optimizer, mesh, scaler, optim, patience, sources, self._attributes)

    @property
    def _param_dtype(self) -> torch.dtype | None:
        return _DTYPES[self._config.precision.param_dtype]

    def _classes(self) -> tuple[str, ...]:
        return self._config.parallel.blocks or tuple(self._job.blocks)

    def _take(self) -> DeferredModel:
        built, self._next = self._next or self._build(), None
        parallel = self._config.parallel
        blocks = find_blocks(built.model, self._classes())
        if parallel.tensor == 1 or not is_sequential(plan_of(self._job, built.model)):
            seed_each(layers_of(self._job, built.model).modules)  # if activations between layers are whole
        if self._param_dtype is not None and not parallel.sharded:
            cast_parameters(built.model, blocks, self._param_dtype)
        if parallel.activation_checkpointing or parallel.compile:
            if not blocks:
                raise ConfigError(
                    "the model has no blocks to checkpoint or compile one by one; name their classes with "
                    "--parallel.blocks"
                )
            if parallel.activation_checkpointing:
                checkpoint_activations(blocks)
            if parallel.compile:
                compile_blocks(blocks, exact=self._config.run.exactness == "bitwise")
        return built

    def _build(self) -> DeferredModel:
        seed = self._config.run.seed
        if not self.eager:
            seed_all(derive("model", seed))
            try:
                return build(self._job.model, seed)
            except CannotDefer as error:
                self.eager = str(error)
        seed_all(derive("model", seed))
        return build_eagerly(self._job.model, seed)


def _note(digests: dict[str, str], name: str, value: torch.Tensor) -> None:
    digests[name] = digest(value)
