"""Chooses the number of stages for `--parallel.pipeline auto`, before anything is started: the fewest that fit into the
memory of a worker. The number reaches no bit of the weights."""

from __future__ import annotations

import contextlib
import copy
import subprocess
from typing import Any

from elastic.config import TrainConfig
from elastic.errors import ConfigError, one_line
from elastic.job import Job, MapDataset
from elastic.placement import Part
from elastic.run import forecast
from elastic.run.plan import RunPlan
from elastic.snapshot.memory import available_bytes

_UNKNOWN = "--parallel.pipeline is auto, but {}; give a number"
GIB = 2**30


def choose_stages(job: Job, config: TrainConfig, plan: RunPlan, data: MapDataset) -> tuple[int, list[str]]:
    """The number of stages, and lines that say why.

    Raises:
        ConfigError: what a microbatch takes cannot be counted here, the memory of a worker is not known, or no number
            of stages fits.
    """
    from elastic.parallel.stage_memory import fewest_stages, fewest_workers, need

    size, cells = size_of(job, config, plan, data), config.most_cells
    memory, whose = _memory(config)
    usual = config.parallel.strategy, plan.microbatches
    found = fewest_stages(size, cells, *usual, memory)
    if found is None:
        most = min(cells, len(size.layers))
        raise ConfigError(
            f"--parallel.pipeline is auto, but even with {most} stages a worker needs about "
            f"{_gib(need(size, cells, most, *usual))}, and has {_gib(memory)} ({whose}); take more workers or smaller "
            "microbatches, or give a number to try it"
        )
    why = f"needs about {_gib(need(size, cells, found, *usual))} of {_gib(memory)} ({whose})"
    if found > 1:
        why += f", and with {found - 1} {_gib(need(size, cells, found - 1, *usual))}"
    lines = [f"--parallel.pipeline auto: {found} {'stage' if found == 1 else 'stages'}, with which a worker {why}"]
    fewest = fewest_workers(size, cells, found, *usual, memory) * config.parallel.tensor
    if fewest > config.least_workers:
        lines.append(f"fewer than {fewest} workers have too little memory: give --scaling.min-workers {fewest}")
    return found, lines


def size_of(job: Job, config: TrainConfig, plan: RunPlan, data: MapDataset) -> Any:
    """A `ModelSize`, for one worker of a cell.

    Raises:
        ConfigError: it is not known.
    """
    from elastic.parallel.deferred import build
    from elastic.parallel.stage_costs import counted
    from elastic.parallel.stage_memory import LayerSize, ModelSize
    from elastic.parallel.stages import check_layers, layers_of
    from elastic.seeds import unseeded

    seed, tensor = config.run.seed, config.parallel.tensor
    try:
        state = forecast.measure(job, seed).of(Part())
        with unseeded():
            model = build(job.model, seed).model
        batch = _first_batch(job, seed, plan, data)
    except ConfigError:
        raise
    except Exception as error:  # the job's own code, which workers will run and report in full
        raise ConfigError(_UNKNOWN.format(f"the model and a batch cannot be made here: {one_line(error)}")) from error
    layers = layers_of(job, model)
    check_layers(model, layers, 1, "auto")
    costs = counted(job, model, layers, batch)
    if costs is None:
        raise ConfigError(_UNKNOWN.format("what a microbatch takes cannot be counted, as code looks at its values"))
    sizes = []
    for layer, cost in zip(layers.modules, costs, strict=True):
        parameters = sum(p.nbytes for p in layer.parameters()) // tensor
        trained = sum(p.nbytes for p in layer.parameters() if p.requires_grad) // tensor
        sizes.append(LayerSize(1 + cost.flops, cost.kept, parameters, trained))
    return ModelSize(state // tensor, sizes)


def _first_batch(job: Job, seed: int, plan: RunPlan, data: MapDataset) -> Any:
    """A microbatch, as workers make it."""
    from elastic.data.fetching import Fetcher, Order
    from elastic.seeds import unseeded

    order = Order(
        seed=seed, dataset_size=plan.dataset_size, global_size=plan.global_size, microbatches=plan.microbatches
    )
    with unseeded():
        fetcher = Fetcher(copy.copy(data), job.collate_fn, seed, plan.dataset_size)
        return fetcher.with_halves(order.span(0, 0, 1))[0][1]


def _memory(config: TrainConfig) -> tuple[int, str]:
    """Bytes of a worker, and where that is known from.

    Raises:
        ConfigError: it is not known.
    """
    scaling = config.scaling
    if scaling.memory_per_worker is not None:
        return int(scaling.memory_per_worker * GIB), "--scaling.memory-per-worker"
    if scaling.accelerator != "cpu" and (found := _memory_of_gpus()):
        return found, "a GPU of this machine"
    if scaling.accelerator != "cpu":
        raise ConfigError(
            _UNKNOWN.format("this machine has no GPU whose memory says how many are needed").replace(
                "give a number", "give --scaling.memory-per-worker, --scaling.accelerator cpu, or a number"
            )
        )
    workers = scaling.workers_per_node or scaling.max_workers + scaling.spares
    return available_bytes() // workers, f"of this machine, for each of {workers} workers"


def _memory_of_gpus() -> int:
    """The memory of this machine's smallest GPU; 0 if it has none. The driver is asked, since torch would take some of
    that memory to tell."""
    ask = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        said = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True).stdout
        return min((int(line) * 2**20 for line in said.split()), default=0)
    return 0


def _gib(size: int) -> str:
    return f"{size / GIB:.3g} GiB" if size >= GIB else f"{size / 2**20:.3g} MiB"
