"""Which options of a run cannot work together, and what to give instead."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from elastic.checks import require
from elastic.errors import ConfigError
from elastic.likeness import DATA

if TYPE_CHECKING:
    from elastic.config import TrainConfig


def check_together(config: TrainConfig) -> None:
    """Refuse options that cannot work together.

    Raises:
        ConfigError: with the options, and what to do.
    """
    _check_changeable(config)
    if config.run.exactness == "bitwise" and config.precision.grad_compression != "off":
        raise ConfigError(
            f"--precision.grad-compression is {config.precision.grad_compression!r}; it rounds gradients, so use it "
            "with --run.exactness fast, or leave it off"
        )
    if config.run.max_cost is not None and not config.observe.price:
        raise ConfigError(f"--run.max-cost is {config.run.max_cost:g}, but nothing has a price; give --observe.price")
    _check_param_dtype(config)
    if config.parallel.tensor > 1:
        _check_cells(config)
    if config.parallel.pipeline != 1:
        _check_pipelines(config)
    if config.parallel.strategy == "hsdp":
        _check_nodes(config)
    if config.parallel.offload:
        _check_offload(config)
    if config.recovery.snapshot_every != "off" and not config.parallel.sharded:
        raise ConfigError(
            f"--recovery.snapshot-every is {config.recovery.snapshot_every!r}, but with --parallel.strategy ddp "
            "every worker holds the whole state; leave it off, or use fsdp or hsdp"
        )


def _check_changeable(config: TrainConfig) -> None:
    known = {DATA}
    for section_field in dataclasses.fields(config):
        section = section_field.default_factory
        if dataclasses.is_dataclass(section):
            names = (f.name for f in dataclasses.fields(section) if f.metadata["result"])
            known |= {f"{section_field.name}.{name}".replace("_", "-") for name in names}
    for name in config.run.allow_change:
        require(
            name in known or (name.startswith("job.") and len(name) > 4),
            "--run.allow-change",
            name,
            f"give names of result options without dashes, such as run.duration or job.lr, or {DATA}",
        )


def _check_param_dtype(config: TrainConfig) -> None:
    dtype = config.precision.param_dtype
    if dtype != "off" and config.run.exactness == "bitwise":
        raise ConfigError(
            f"--precision.param-dtype is {dtype!r}, with which each strategy computes other bits; use "
            "--precision.autocast, or --run.exactness fast"
        )


def _check_cells(config: TrainConfig) -> None:
    """Cells of several workers: their number must come out, and some things do not go with them yet."""
    parallel, scaling, size = config.parallel, config.scaling, config.parallel.tensor
    if scaling.max_workers % size:
        fewer = scaling.max_workers - scaling.max_workers % size
        raise ConfigError(
            f"--scaling.max-workers is {scaling.max_workers}, no multiple of --parallel.tensor {size}, the workers of "
            f"a cell; give {f'{fewer} or ' if fewer else ''}{fewer + size}"
        )
    if scaling.workers_per_node is not None and scaling.workers_per_node % size:
        raise ConfigError(
            f"--scaling.workers-per-node is {scaling.workers_per_node}, no multiple of --parallel.tensor {size}, the "
            "workers of a cell, which are on one node; give a multiple of it"
        )
    for name, value in (
        ("--parallel.activation-checkpointing", parallel.activation_checkpointing),
        ("--parallel.compile", parallel.compile),
        ("--parallel.offload", parallel.offload),
        ("--debug", config.debug),
    ):
        if value:
            raise ConfigError(
                f"{name} is {value}, which --parallel.tensor {size} does not go with; leave one of them out"
            )


def _check_pipelines(config: TrainConfig) -> None:
    """What does not go with pipelines."""
    parallel, most, size = config.parallel, config.scaling.max_workers, config.parallel.pipeline
    if most < parallel.stages * parallel.tensor:
        raise ConfigError(
            f"--parallel.pipeline is {size}, but --scaling.max-workers is {most}, too few for the stages of one "
            f"pipeline; give at least {parallel.stages * parallel.tensor} workers, or fewer stages"
        )
    for name, value, wrong in (
        ("--parallel.strategy", parallel.strategy, parallel.strategy == "hsdp"),
        ("--parallel.activation-checkpointing", True, parallel.activation_checkpointing),
        ("--parallel.compile", True, parallel.compile),
        ("--parallel.offload", True, parallel.offload),
        ("--precision.param-dtype", config.precision.param_dtype, config.precision.param_dtype != "off"),
        ("--precision.grad-compression", "bf16", config.precision.grad_compression != "off"),
        ("--debug", True, config.debug),
    ):
        if wrong:
            raise ConfigError(
                f"{name} is {value}, which --parallel.pipeline {size} does not go with; leave one of them out"
            )


def _check_nodes(config: TrainConfig) -> None:
    per_node, most = config.scaling.workers_per_node, config.scaling.max_workers
    if per_node is None:
        raise ConfigError(
            "--parallel.strategy is 'hsdp', which shards inside a node; give the workers of each node with "
            "--scaling.workers-per-node, or use fsdp"
        )
    if most <= per_node:
        raise ConfigError(
            f"--parallel.strategy is 'hsdp', but --scaling.max-workers {most} fit on one node of "
            f"--scaling.workers-per-node {per_node}; use fsdp, or at least {2 * per_node} workers"
        )
    if most % per_node:
        raise ConfigError(
            f"--parallel.strategy is 'hsdp', but --scaling.max-workers {most} leave a node uneven at "
            f"--scaling.workers-per-node {per_node}; give a multiple of {per_node}"
        )


def _check_offload(config: TrainConfig) -> None:
    if config.scaling.accelerator == "cpu":
        raise ConfigError(
            "--parallel.offload is True, which moves state from GPUs, but --scaling.accelerator is 'cpu'; leave it out"
        )
    if config.run.exactness == "bitwise":
        raise ConfigError(
            "--parallel.offload is True, which --run.exactness bitwise has not; leave it out, or use "
            "--run.exactness fast"
        )
