"""Sections of options for the training itself: for how long, how exactly, in which batches and formats."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from elastic.checks import finite, one_of, option, require, whole
from elastic.units import parse_amount

RUN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")


@dataclass(frozen=True)
class RunOptions:
    """The run's name, where it writes, how long it lasts, and how exact it is."""

    name: str | None = option(
        None, "name of the run; an explicit name resumes (default: <job>-<date>-<4 hex>)", common=True, once=True
    )
    storage: str = option(
        "runs", "folder or URL (file://, s3://, ...) under which the run's folder lies", common=True, once=True
    )
    duration: str = option("10ep", "whole length of training: ep, st or tok", common=True, result=True)
    stop_after: str | None = option(
        None, "pause with a checkpoint after this much (ep, st, tok, s, min, h)", common=True, once=True
    )
    max_cost: float | None = option(
        None, "pause with a checkpoint when the run has cost so much, by --observe.price", once=True
    )
    seed: int = option(0, "seed of order, initial weights, dropout and data", common=True, result=True)
    exactness: Literal["fast", "bitwise"] = option(
        "fast", "bitwise: the same bits at every world size and through every fault", common=True, result=True
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "on a NaN or infinite loss or norm: stop the run, or skip that update", result=True
    )
    check_every: str = option("1000st", "compare the workers' copies of the state every so much (ep, st, tok)")
    allow_change: tuple[str, ...] = option((), "result options that a resumed run may change, by name", once=True)
    take_over: bool = option(False, "take the run over although another driver seems alive", once=True)
    max_failures: int = option(3, "times that one error at one step and microbatch is replayed")

    def __post_init__(self) -> None:
        if self.name is not None:
            require(
                bool(RUN_NAME.match(self.name)) and ".." not in self.name,
                "--run.name",
                self.name,
                "use 1 to 100 letters, digits, dots, dashes and underscores, starting with a letter or digit",
            )
        require(bool(self.storage.strip()), "--run.storage", self.storage, "give a folder or a URL")
        parse_amount("--run.duration", self.duration, clock=False)
        if self.stop_after is not None:
            parse_amount("--run.stop-after", self.stop_after, clock=True)
        if self.max_cost is not None:
            finite("--run.max-cost", self.max_cost, 0, above=True)
        require(
            isinstance(self.seed, int) and 0 <= self.seed < 2**63,
            "--run.seed",
            self.seed,
            "give a whole number from 0 to 2**63-1",
        )
        parse_amount("--run.check-every", self.check_every, clock=False)
        one_of("--run.exactness", self.exactness, ("fast", "bitwise"))
        one_of("--run.on-nonfinite", self.on_nonfinite, ("stop", "skip"))
        whole("--run.max-failures", self.max_failures, 0)


@dataclass(frozen=True)
class BatchOptions:
    """The global batch, and its fixed division into microbatches."""

    global_size: int = option(64, "samples of one step over all workers (B)", common=True, result=True)
    microbatches: int | None = option(
        None,
        "equal parts of a global batch (V), fixed for the run (default: from B and max workers)",
        common=True,
        result=True,
    )
    pass_size: int | None = option(
        None, "most samples of one forward/backward in fast (default: a worker's share at max workers)"
    )

    def __post_init__(self) -> None:
        whole("--batch.global-size", self.global_size, 1)
        if self.microbatches is not None:
            whole("--batch.microbatches", self.microbatches, 1)
            require(
                self.global_size % self.microbatches == 0,
                "--batch.microbatches",
                self.microbatches,
                f"give a divisor of --batch.global-size {self.global_size}",
            )
        if self.pass_size is not None:
            whole("--batch.pass-size", self.pass_size, 1)


@dataclass(frozen=True)
class OptimOptions:
    """Learning-rate schedule and clipping; the job defines the optimizer itself."""

    schedule: Literal["constant", "cosine"] = option(
        "constant", "learning rate after warm-up: constant, or cosine down to final-lr", result=True
    )
    warmup: str | None = option(None, "linear warm-up: ep, st or tok", result=True)
    final_lr: float = option(0.1, "end of the cosine, as a share of the full learning rate", result=True)
    clip_norm: float | None = option(None, "clip the gradient's global L2 norm to this", result=True)

    def __post_init__(self) -> None:
        one_of("--optim.schedule", self.schedule, ("constant", "cosine"))
        if self.warmup is not None:
            parse_amount("--optim.warmup", self.warmup, clock=False)
        require(0 <= self.final_lr <= 1, "--optim.final-lr", self.final_lr, "give a share from 0 to 1")
        if self.clip_norm is not None:
            finite("--optim.clip-norm", self.clip_norm, 0, above=True)


@dataclass(frozen=True)
class PrecisionOptions:
    """Number formats of compute and communication; the job's own format of parameters stays."""

    autocast: Literal["off", "bf16", "fp16"] = option(
        "off", "run forward passes under torch.autocast; fp16 scales the loss", common=True, result=True
    )
    param_dtype: Literal["off", "bf16", "fp16"] = option(
        "off", "number format of parameters in compute, and as they are gathered (fast only)", result=True
    )
    grad_compression: Literal["off", "bf16"] = option(
        "off", "number format of gradients on the wire (fast only)", result=True
    )
    loss_scale: float = option(65536.0, "first factor on the loss in fp16; it adapts", result=True)

    def __post_init__(self) -> None:
        one_of("--precision.autocast", self.autocast, ("off", "bf16", "fp16"))
        one_of("--precision.param-dtype", self.param_dtype, ("off", "bf16", "fp16"))
        one_of("--precision.grad-compression", self.grad_compression, ("off", "bf16"))
        power = self.loss_scale >= 1 and math.frexp(self.loss_scale)[0] == 0.5
        require(power, "--precision.loss-scale", self.loss_scale, "give a power of two of at least 1")
        require(
            self.autocast == "off" or self.param_dtype == "off",
            "--precision.param-dtype",
            self.param_dtype,
            f"leave it off with --precision.autocast {self.autocast}, or that with this",
        )


@dataclass(frozen=True)
class DataOptions:
    """How a worker fetches its microbatches; this never changes which samples it fetches."""

    workers: int = option(0, "loader processes per worker (0: the training thread fetches)")
    prefetch: int = option(2, "microbatches that each loader process prepares ahead")
    prepare_timeout: str = option("1h", "wait so long for another process of the node in the job's prepare()")

    def __post_init__(self) -> None:
        whole("--data.workers", self.workers, 0, 1024)
        whole("--data.prefetch", self.prefetch, 1, 65536)
        timeout = parse_amount("--data.prepare-timeout", self.prepare_timeout, clock=True)
        require(
            timeout.is_clock and timeout.seconds >= 1,
            "--data.prepare-timeout",
            self.prepare_timeout,
            "give a time of at least 1s, in s, min or h",
        )


@dataclass(frozen=True)
class ParallelOptions:
    """How a model is distributed over workers."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = option(
        "ddp", "ddp: a whole model in each worker; fsdp: one over all; hsdp: one over each node", common=True
    )
    tensor: int = option(
        1,
        "workers of one node that share each microbatch, as the job's tensor_plan() says: a cell; strategy lays out "
        "cells",
        result=True,
    )
    pipeline: int | Literal["auto"] = option(
        1,
        "workers that run the layers of each microbatch one after another, as the job's stages() cuts them: a "
        "pipeline; auto: the fewest that have the memory for it",
    )
    blocks: tuple[str, ...] = option(
        (), "classes of the modules to shard, checkpoint and compile one by one (default: the job's, else found)"
    )
    reshard_after_forward: bool = option(True, "free a block's gathered parameters between forward and backward")
    prefetch: int = option(0, "blocks to gather ahead of the one that runs (0: as FSDP2 does)")
    offload: bool = option(False, "keep parameters, gradients and optimizer state in host memory (GPU only)")
    activation_checkpointing: bool = option(False, "compute a block's activations again in backward")
    compile: bool = option(False, "torch.compile each block", result=True)
    bucket_mb: int = option(25, "gradient bucket of ddp, MiB")
    find_unused: bool = option(False, "expect parameters without gradient from the start (ddp in fast; else found)")

    def __post_init__(self) -> None:
        one_of("--parallel.strategy", self.strategy, ("ddp", "fsdp", "hsdp"))
        whole("--parallel.tensor", self.tensor, 1, 1024)
        if self.pipeline != "auto":
            whole("--parallel.pipeline", self.pipeline, 1, 1024)
        whole("--parallel.prefetch", self.prefetch, 0)
        whole("--parallel.bucket-mb", self.bucket_mb, 1, 1 << 20)
        for name in self.blocks:
            require(name.isidentifier(), "--parallel.blocks", name, "give names of classes, such as Block")
        for name, value, default in (
            ("offload", self.offload, False),
            ("prefetch", self.prefetch, 0),
            ("reshard-after-forward", self.reshard_after_forward, True),
        ):
            require(
                self.sharded or value == default,
                f"--parallel.{name}",
                value,
                "leave it out: with --parallel.strategy ddp nothing is gathered",
            )

    @property
    def sharded(self) -> bool:
        """Whether a model is cut over several workers: over those of a cell or a pipeline, or over all."""
        return self.strategy != "ddp" or self.tensor > 1 or self.pipeline != 1

    @property
    def stages(self) -> int:
        """The fewest stages of a pipeline; 1 without pipelines. `auto` becomes a number before a run begins."""
        return self.pipeline if isinstance(self.pipeline, int) else 1


@dataclass(frozen=True)
class EvalOptions:
    """Evaluation on held-out data."""

    every: str | None = option(None, "evaluate every so much (ep, st, tok), and always at the end", common=True)
    batch_size: int | None = option(
        None, "samples of one forward pass of an evaluation (default: four microbatches)", result=True
    )
    sample_every: str | None = option(
        None, "have the job make a sample every so much (ep, st, tok); at the end it does anyway"
    )
    patience: int | None = option(
        None, "end after this many evaluations in which --checkpoint.best-metric became no better", result=True
    )
    min_delta: float = option(0.0, "how much better a figure must be to count for --eval.patience", result=True)
    hold: bool = option(False, "after an evaluation wait for the driver's permission to go on, as in sweeps", once=True)

    def __post_init__(self) -> None:
        if self.every is not None:
            parse_amount("--eval.every", self.every, clock=False)
        if self.batch_size is not None:
            whole("--eval.batch-size", self.batch_size, 1)
        if self.sample_every is not None:
            parse_amount("--eval.sample-every", self.sample_every, clock=False)
        if self.patience is not None:
            whole("--eval.patience", self.patience, 1)
            require(self.every is not None, "--eval.patience", self.patience, "give --eval.every too")
        finite("--eval.min-delta", self.min_delta, 0)
        require(
            not self.hold or self.every is not None, "--eval.hold", self.hold, "give --eval.every too, or leave it out"
        )
