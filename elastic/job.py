"""What a user writes: model, optimizer, data, loss and evaluation, in one class."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from elastic import adapters
from elastic.errors import ConfigError
from elastic.phases import Cycle, check_phases

if TYPE_CHECKING:
    import numpy as np
    import torch

    from elastic.observe.callbacks import Callback


@runtime_checkable
class MapDataset(Protocol):
    """A map-style dataset: `len(d)` samples, `d[i]` one of them; optionally `__getitems__(list of i)`.

    Random numbers that `d[i]` draws are seeded by run, epoch and sample; those of `__getitems__` by the samples of a
    microbatch.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


#: What `Job.loss` and `Job.evaluate` return: the loss summed over the batch (a scalar tensor with a graph); the weight
#: by which it is divided (a number of samples or tokens); and metrics: sums that are divided by the same weight, or
#: pairs (sum, weight) with a weight of their own.
LossResult = tuple["torch.Tensor", "float | torch.Tensor", Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The length of a run. All counts are over all workers.

    Args:
        total_steps: updates of the whole run; with phases, of all of them.
        batch_size: samples of a step.
        samples: of the training data.
        microbatch_size: samples of each of the parts into which a batch is cut, at every number of workers.
        seed: of the run.
        phases: of the job, in their order.
    """

    total_steps: int
    batch_size: int
    samples: int
    microbatch_size: int = 1
    seed: int = 0
    phases: tuple[str, ...] = ()

    @property
    def steps_per_epoch(self) -> float:
        """Steps of one pass over the training data; a fraction if the last batch of an epoch goes on in the next
        one."""
        return self.samples / self.batch_size * self.cycle.steps_each / self.cycle.batches_each

    @property
    def cycle(self) -> Cycle:
        """How phases take turns."""
        return Cycle(self.phases)

    @property
    def batches(self) -> int:
        """Batches of data that the run takes: one for each step, or one for several phases."""
        return self.cycle.batch(self.total_steps - 1) + 1


#: The index of the sample at each of some positions (int64 arrays of one shape), for `Job.sampler`.
Sampler = Callable[["np.ndarray", Plan], "np.ndarray"]


def set_plan(job: Job, plan: Plan) -> None:
    """Set `job.plan`, unless the job uses that name for something of its own."""
    if not hasattr(type(job), "plan") and isinstance(vars(job).get("plan", plan), Plan):
        object.__setattr__(job, "plan", plan)  # works for a frozen dataclass too


class Job:
    """One training job. Subclass it; make it a dataclass to give it `--job.*` options.

    Every method but `callbacks` runs in the workers; `train_data`, `sampler` and `eval_data` also run once in the
    driver. Nothing here may depend on the rank or on the world size: the same job runs at any.
    """

    #: Tokens in one sample, if the job has tokens: allows durations in `tok`, and token counts in the ledger.
    tokens_per_sample: int | None = None

    #: The length of the run; set before `model` is called, unless the job uses this name for something of its own.
    plan: Plan

    #: FLOPs of one sample's forward and backward pass, for the utilisation that is shown; None has them counted.
    flops_per_sample: float | None = None

    #: Classes of the modules that are sharded, checkpointed and compiled one by one; empty has Elastic find them.
    blocks: tuple[str, ...] = ()

    #: Names of updates that take turns, in their order, as ("discriminator", "generator"). Each is a step with a loss
    #: of its own, `loss_discriminator(model, batch)`, and with the optimizer of that name in what `optimizer` returns:
    #: only its parameters get gradients. All phases of a cycle take one batch; one that comes again takes the next one.
    phases: Sequence[str] = ()

    def model(self) -> torch.nn.Module:
        """Build the model, in float32, without naming a device.

        Tensors that are made here have no values yet (they are on the meta device). Their initialisation is recorded
        and done later, each parameter under a seed made from the run's seed and its name. What needs values here is
        built on the CPU, whole, and under one seed. With fsdp and hsdp this is called again for every world. Parameters
        and buffers that are not sharded stay the objects that they are here, with their hooks. A model that is kept
        beside this one, such as a teacher, gets its values too. Modules that are left in evaluation mode here stay in
        it while training.
        """
        raise NotImplementedError(_lacks(self, "model"))

    def frozen(self) -> torch.nn.Module | Sequence[torch.nn.Module] | Mapping[str, torch.nn.Module] | None:
        """Return models that are used and never trained: a teacher, a reference, an encoder.

        Called once in each worker, before `model`; these models have values. Keep them on the job too (`self.teacher =
        ...`).

        They are moved to the device, in evaluation mode and without gradients, whole in each worker. They are no part
        of the state: they are never saved or moved, and compared only once. A worker whose models have other values
        than those of the other workers is left out before it begins.
        """
        return None

    def has_source(self, name: str) -> bool:
        """Whether this parameter can get its values again, in a later command or on a worker that joins: from the files
        of `initial_weights`, by its `weight_name` there, or else from `model`, which has them from a file or the seed.

        Such parameters, if they are frozen when `model` returns, are left out of checkpoints and snapshots, like the
        base of an adapter. A digest of each is saved, and a source that has changed is refused. They must stay frozen.
        """
        return False

    def initial_weights(self) -> str | None:
        """Return where a fresh run takes the model's weights from: a safetensors file, a folder of them, or the URL of
        either.

        None: the weights are those that `model()` makes. `--checkpoint.init-from` overrides this. Each worker reads
        only its own part.
        """
        return None

    def weight_name(self, name: str) -> str | None:
        """Return the name of one of the model's weights in the files that a fresh run starts from.

        None: the weight is made by `model()`. The default knows models into which peft has put adapters.
        """
        return adapters.source_name(name)

    def tensor_plan(self) -> Mapping[str, Any] | None:
        """What of the model is cut over the workers of a cell with `--parallel.tensor`: patterns of module names, with
        `*` for one part of a name, and what is done to each: "colwise" (a linear layer whose outputs are divided),
        "rowwise" (one whose inputs are, and whose output is summed over the cell), "colwise_gather_output" (a head),
        "sequence" (a norm, between whose like activations are divided along dimension 1), or a `ParallelStyle` of
        `torch.distributed.tensor.parallel`. None: what a model of Hugging Face says (`model.tp_plan`)."""
        return None

    def stages(self, model: torch.nn.Module) -> Sequence[torch.nn.Module] | None:
        """The layers of the model for `--parallel.pipeline`: modules of it, in the order in which its `forward()` calls
        them, each with what the one before returned (a tensor or several), and does nothing else, such as
        `[model.embedding, *model.blocks, model.norm, model.head]`. Elastic cuts them into stages.

        `loss()` calls the model once, with tensors. In training mode each of these layers draws random numbers from a
        seed of its own, with pipelines and without. None: what a model of Hugging Face says (`model.pp_plan`)."""
        return None

    def optimizer(
        self, model: torch.nn.Module
    ) -> torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | Mapping[str, torch.optim.Optimizer]:
        """Build the optimizer over the model's parameters, which have their values; with fsdp and hsdp, this worker's
        part of them.

        It may be several optimizers in a list or dict, each with parameters of its own; together they make one update.
        With `phases` it is a dict with one for each of them.
        Further state made from parameters, such as an EMA, is begun here. With fsdp and hsdp this is called again for
        every world.

        A torch scheduler that is made here, kept as an attribute of the job and stepped in `after_step` is followed:
        its state is saved too. A scheduler that `scheduler` returns is stepped by Elastic.
        """
        raise NotImplementedError(_lacks(self, "optimizer"))

    def schedule(self, step: int, total_steps: int) -> float | None:
        """Return the factor on the learning rates at `step` (from 0), or None for what `--optim.*` says."""
        return None

    def scheduler(self, optimizer: Any) -> Any:
        """Return a scheduler of torch or transformers (`LambdaLR`, `OneCycleLR`, `SequentialLR`, `get_scheduler(...)`)
        for what `optimizer` returned, or several in a list. None: `schedule` and `--optim.*` decide.

        Only Elastic steps it: the rates are those after as many calls of its `step()` as there were steps (of all
        phases), also after a resume.

        A `ReduceLROnPlateau` is asked after each evaluation of `--eval.every`, with `--checkpoint.best-metric`. What it
        decides is part of the saved state.
        """
        return None

    def prepare(self) -> None:
        """Called once on each node by each command, before data are opened: downloads, unpacks or tokenizes what
        `train_data` reads from the node's disks. Other workers of the node wait for it. It must do nothing where all is
        there already, since later commands call it too, and repair what a process left that died in it."""

    def train_data(self) -> MapDataset:
        """Return the training data, map-style."""
        raise NotImplementedError(_lacks(self, "train_data"))

    def sampler(self, data: Any) -> Sampler | None:
        """Which sample of `data`, which is what `train_data` returned, is at each position of the run; None for a new
        permutation of all of them each epoch. A step takes the next `batch_size` positions, from 0, whoever runs it.

        `elastic.Sequential()`, `elastic.Weighted(weights)`, `elastic.ByLength(lengths)`, `elastic.Curriculum(...)`, or
        a function of (int64 positions, `Plan`) that returns the index at each. It must depend on nothing else: it is
        asked in any order, on every worker, and again after faults and by later commands. Called once in each worker
        and in the driver."""
        return None

    def eval_data(self) -> MapDataset | Mapping[str, MapDataset] | None:
        """Return held-out data, map-style; or several sets by name; or None."""
        return None

    def collate_fn(self, samples: Sequence[Any]) -> Any:
        """Make a batch of samples; by default with torch's `default_collate`.

        Mappings, named tuples, dataclasses, and objects with a method `to` keep their type when they are moved to the
        device. If this draws random numbers (mixup), each pass has one microbatch, so that the draws do not depend on
        the number of workers.
        """
        from torch.utils.data import default_collate

        return default_collate(list(samples))

    def loss(self, model: torch.nn.Module, batch: Any) -> LossResult:
        """Return the loss summed over one batch, its weight, and metrics, as `LossResult` describes.

        Metrics must have the same names for every batch, and none of a column that a row of `metrics.jsonl` has anyway.
        This and `evaluate` are tried on a batch before training, in evaluation mode.
        """
        raise NotImplementedError(_lacks(self, "loss"))

    def evaluate(self, model: torch.nn.Module, batch: Any) -> LossResult:
        """Like `loss`, for held-out data: the model is in evaluation mode, and no graph is kept.

        It may take a third argument, the name of the set (`""` if `eval_data` returns one set without a name).
        """
        return self.loss(model, batch)

    def evaluated(self, sums: Mapping[str, float], name: str) -> Mapping[str, float]:
        """Return further figures of a held-out set, such as an F1 score or a perplexity; they replace means of the same
        name.

        Called on every worker, with the same sums.

        Args:
            sums: over the whole set: `loss`, `weight`, and each metric.
            name: of the set.
        """
        return {}

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        """Called after the update of `step` (from 1), for an EMA and the like. It must be deterministic.

        With fsdp and hsdp parameters are DTensors here, of which each worker has a part: work element by element.
        """

    def extra_state(self) -> Mapping[str, Any]:
        """Return named state beside model and optimizer.

        Tensors of the job's own are saved, and restored in place. Everything else comes back through
        `load_extra_state`, equal and of its type: numbers, texts, lists, tuples, dictionaries with any keys, paths,
        enums, dataclasses, arrays, and tensors in them. A value that cannot be saved is refused by name.
        """
        return {}

    def load_extra_state(self, values: Mapping[str, Any]) -> None:
        """Take back the values of `extra_state`, all of them.

        Its tensors are restored in place already, and given as they are, but for those that it makes anew at each call,
        or that were not there at first: of these the saved values are given.
        """

    def sample(self, model: torch.nn.Module, step: int) -> str | Mapping[str, Any] | None:
        """Return what the model makes after `step`, in evaluation mode and without gradients: a text, or texts and
        pictures by name.

        Called at the end and, with `--eval.sample-every`, on the way; callbacks receive it. A picture is an array or a
        tensor of shape (height, width) or (height, width, 1, 3 or 4), uint8, or floating-point from 0 to 1. If this
        raises, the error is recorded as an event, and training goes on. `sample(model)` will do too.
        """
        return None

    def callbacks(self) -> Sequence[Callback]:
        """Return callbacks that receive rows, evaluations, checkpoints, events and samples: see `elastic.Callback`.

        Called once by each command, in the driver, before anything is started; never in workers.
        """
        return ()


_NEEDED = {
    "model": "a model() method that returns a torch.nn.Module",
    "optimizer": "an optimizer(model) method",
    "train_data": "a train_data() method that returns a map-style dataset",
    "loss": "a loss(model, batch) method",
}


def _lacks(job: Job, name: str) -> str:
    return f"{type(job).__name__} needs {_NEEDED[name]}"


def check_job_class(given: object) -> None:
    """Refuse what is not a job class, as the argument of `elastic.main`.

    Raises:
        ConfigError: it is an instance of a job, or something else.
    """
    if isinstance(given, Job):
        name = type(given).__name__
        raise ConfigError(f"elastic.main was given an instance of {name}; give the class: elastic.main({name})")
    if not isinstance(given, type) or not issubclass(given, Job):
        raise ConfigError(
            f"elastic.main was given {_shown(given)}, which is no job; give a class derived from elastic.Job"
        )


def check_job(job: object) -> None:
    """Refuse what is not a job, and a job without one of the methods that every job needs.

    Raises:
        ConfigError: it is a class, something else, or lacks a method.
    """
    if isinstance(job, type) and issubclass(job, Job):
        raise ConfigError(f"the class {job.__name__} was given as the job; give an instance: {job.__name__}()")
    if not isinstance(job, Job):
        raise ConfigError(
            f"{_shown(job)} was given as the job; give an instance of a class that is derived from elastic.Job"
        )
    check_phases(job, Job)
    for name in _NEEDED if not job.phases else _NEEDED.keys() - {"loss"}:
        if getattr(getattr(job, name), "__func__", None) is getattr(Job, name):
            raise ConfigError(_lacks(job, name))


def _shown(given: object) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else f"an instance of {type(given).__name__}"


def job_name(job: Job) -> str:
    """Return a short name of the job: that of its module, or of its class if the module is called `main`."""
    module = type(job).__module__
    if module == "__main__":
        file = _source_file(type(job))
        module = file.stem if file else module
    stem = module.rsplit(".", 1)[-1].replace("_", "-").strip("-")
    name = stem if stem and stem != "main" else type(job).__name__.lower()
    return re.sub(r"[^A-Za-z0-9.-]", "", name)[:60] or "job"


def source_hash(job: Job) -> str | None:
    """Return the sha256 of the file that defines the job, as hexadecimal digits; None if there is no file."""
    file = _source_file(type(job))
    return hashlib.sha256(file.read_bytes()).hexdigest() if file else None


def _source_file(cls: type) -> Path | None:
    try:
        file = inspect.getsourcefile(cls)
    except (TypeError, OSError):
        return None
    return Path(file) if file and Path(file).is_file() else None
