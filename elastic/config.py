"""Options of a run: frozen dataclasses in parts, validated on construction.

Every field carries its help text, whether it is one of the common options shown by `--help`, and whether it is a
*result* option (part of what the run computes, fixed for the run's life) or an operational one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from elastic.checks import finite as _finite
from elastic.checks import one_of as _one_of
from elastic.checks import option
from elastic.checks import require as _require
from elastic.checks import whole as _whole
from elastic.combinations import check_together
from elastic.errors import ConfigError
from elastic.likeness import DATA
from elastic.redact import clean
from elastic.units import parse_amount
from elastic.values import decode, describe, encode

MOST_PATIENCE_S = 168 * 3600.0  # a week: what waits for a worker counts in milliseconds of 31 bits
RUN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")


def _changeable() -> set[str]:
    """What --run.allow-change may name, but for the job's own options."""
    found = {DATA}
    for part in dataclasses.fields(TrainConfig):
        section = part.default_factory
        if dataclasses.is_dataclass(section):
            names = (f.name for f in dataclasses.fields(section) if f.metadata["result"])
            found |= {f"{part.name}.{name}".replace("_", "-") for name in names}
    return found


@dataclass(frozen=True)
class RunOptions:
    """What the run is called, where it writes, how long it lasts, how exact it is."""

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
            _require(
                bool(RUN_NAME.match(self.name)) and ".." not in self.name,
                "--run.name",
                self.name,
                "use 1 to 100 letters, digits, dots, dashes and underscores, starting with a letter or digit",
            )
        _require(bool(self.storage.strip()), "--run.storage", self.storage, "give a folder or a URL")
        parse_amount("--run.duration", self.duration, clock=False)
        if self.stop_after is not None:
            parse_amount("--run.stop-after", self.stop_after, clock=True)
        _require(
            isinstance(self.seed, int) and 0 <= self.seed < 2**63,
            "--run.seed",
            self.seed,
            "give a whole number from 0 to 2**63-1",
        )
        parse_amount("--run.check-every", self.check_every, clock=False)
        _one_of("--run.exactness", self.exactness, ("fast", "bitwise"))
        _one_of("--run.on-nonfinite", self.on_nonfinite, ("stop", "skip"))
        _whole("--run.max-failures", self.max_failures, 0)
        for name in self.allow_change:
            _require(
                name in _changeable() or (name.startswith("job.") and len(name) > 4),
                "--run.allow-change",
                name,
                f"give names of result options without dashes, such as run.duration or job.lr, or {DATA}",
            )


@dataclass(frozen=True)
class BatchOptions:
    """The global batch and its fixed cut into microbatches."""

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
        _whole("--batch.global-size", self.global_size, 1)
        if self.microbatches is not None:
            _whole("--batch.microbatches", self.microbatches, 1)
            _require(
                self.global_size % self.microbatches == 0,
                "--batch.microbatches",
                self.microbatches,
                f"give a divisor of --batch.global-size {self.global_size}",
            )
        if self.pass_size is not None:
            _whole("--batch.pass-size", self.pass_size, 1)


@dataclass(frozen=True)
class OptimOptions:
    """Learning-rate schedule and clipping; the optimizer itself is the job's."""

    schedule: Literal["constant", "cosine"] = option(
        "constant", "learning rate after warm-up: constant, or cosine down to final-lr", result=True
    )
    warmup: str | None = option(None, "linear warm-up: ep, st or tok", result=True)
    final_lr: float = option(0.1, "end of the cosine, as a share of the full learning rate", result=True)
    clip_norm: float | None = option(None, "clip the gradient's global L2 norm to this", result=True)

    def __post_init__(self) -> None:
        _one_of("--optim.schedule", self.schedule, ("constant", "cosine"))
        if self.warmup is not None:
            parse_amount("--optim.warmup", self.warmup, clock=False)
        _require(0 <= self.final_lr <= 1, "--optim.final-lr", self.final_lr, "give a share from 0 to 1")
        if self.clip_norm is not None:
            _finite("--optim.clip-norm", self.clip_norm, 0, above=True)


@dataclass(frozen=True)
class PrecisionOptions:
    """Number formats of compute and communication; parameters stay as the job made them."""

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
        _one_of("--precision.autocast", self.autocast, ("off", "bf16", "fp16"))
        _one_of("--precision.param-dtype", self.param_dtype, ("off", "bf16", "fp16"))
        _one_of("--precision.grad-compression", self.grad_compression, ("off", "bf16"))
        power = self.loss_scale >= 1 and math.frexp(self.loss_scale)[0] == 0.5
        _require(power, "--precision.loss-scale", self.loss_scale, "give a power of two of at least 1")
        _require(
            self.autocast == "off" or self.param_dtype == "off",
            "--precision.param-dtype",
            self.param_dtype,
            f"leave it off with --precision.autocast {self.autocast}, or that with this",
        )


@dataclass(frozen=True)
class DataOptions:
    """How a worker fetches its microbatches; never what it fetches."""

    workers: int = option(0, "loader processes per worker (0: the training thread fetches)")
    prefetch: int = option(2, "microbatches that each loader process prepares ahead")

    def __post_init__(self) -> None:
        _whole("--data.workers", self.workers, 0, 1024)
        _whole("--data.prefetch", self.prefetch, 1, 65536)


@dataclass(frozen=True)
class ScalingOptions:
    """How many workers, on what."""

    min_workers: int = option(1, "fewest workers to train with", common=True)
    max_workers: int = option(2, "most workers to train with (a worker is one GPU, or CPU slots)", common=True)
    spares: int = option(0, "warm workers to keep outside the world")
    accelerator: Literal["auto", "cpu", "gpu"] = option(
        "auto", "what a worker runs on; auto asks the cluster", common=True
    )
    cpus_per_worker: int = option(1, "CPU slots (and torch threads) of a worker")
    workers_per_node: int | None = option(None, "most workers on one node (default: what fits)")
    exclude: tuple[str, ...] = option(
        (), "nodes of the cluster to keep out: host names, addresses, or beginnings of ids"
    )
    priority: int = option(0, "on a shared cluster: where this run lacks min-workers, lower ones shrink to theirs")
    request_timeout: str = option("10min", "ask no longer for workers above min-workers, then pause (s, min, h)")

    def __post_init__(self) -> None:
        _whole("--scaling.min-workers", self.min_workers, 1)
        _whole("--scaling.max-workers", self.max_workers, 1)
        _require(
            self.min_workers <= self.max_workers,
            "--scaling.min-workers",
            self.min_workers,
            f"give at most --scaling.max-workers {self.max_workers}",
        )
        _whole("--scaling.spares", self.spares, 0)
        _one_of("--scaling.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        _whole("--scaling.cpus-per-worker", self.cpus_per_worker, 1, 4096)
        if self.workers_per_node is not None:
            _whole("--scaling.workers-per-node", self.workers_per_node, 1)
        for name in self.exclude:
            _require(bool(name.strip()), "--scaling.exclude", name, "give host names, addresses, or beginnings of ids")
        _require(
            isinstance(self.priority, int) and not isinstance(self.priority, bool),
            "--scaling.priority",
            self.priority,
            "give a whole number",
        )
        _require(abs(self.priority) <= 10**9, "--scaling.priority", self.priority, "give a number up to 1000000000")
        name, text = "--scaling.request-timeout", self.request_timeout
        _require(parse_amount(name, text, clock=True).is_clock, name, text, "give a time in s, min or h")


@dataclass(frozen=True)
class ParallelOptions:
    """How a model is spread over workers."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = option(
        "ddp", "ddp: a whole model in each worker; fsdp: one over all; hsdp: one over each node", common=True
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
        _one_of("--parallel.strategy", self.strategy, ("ddp", "fsdp", "hsdp"))
        _whole("--parallel.prefetch", self.prefetch, 0)
        _whole("--parallel.bucket-mb", self.bucket_mb, 1, 1 << 20)
        for name in self.blocks:
            _require(name.isidentifier(), "--parallel.blocks", name, "give names of classes, such as Block")
        for name, value, default in (
            ("offload", self.offload, False),
            ("prefetch", self.prefetch, 0),
            ("reshard-after-forward", self.reshard_after_forward, True),
        ):
            _require(
                self.sharded or value == default,
                f"--parallel.{name}",
                value,
                "leave it out: with --parallel.strategy ddp nothing is gathered",
            )

    @property
    def sharded(self) -> bool:
        """Whether a model is spread over several workers."""
        return self.strategy != "ddp"


@dataclass(frozen=True)
class EvalOptions:
    """Evaluation on held-out data."""

    every: str | None = option(None, "evaluate every so much (ep, st, tok), and always at the end", common=True)
    hold: bool = option(False, "after an evaluation wait for leave to go on, as the trials of a sweep do", once=True)

    def __post_init__(self) -> None:
        if self.every is not None:
            parse_amount("--eval.every", self.every, clock=False)
        _require(
            not self.hold or self.every is not None, "--eval.hold", self.hold, "give --eval.every too, or leave it out"
        )


@dataclass(frozen=True)
class CheckpointOptions:
    """Durable state in storage."""

    every: str | None = option(
        None, "save every so much (ep, st, tok, s, min, h, or auto), and always at the end", common=True
    )
    when_busy: Literal["wait", "delay", "skip"] = option(
        "delay", "when one is due and the one before still uploads: stop training for it, save later, or leave it out"
    )
    keep_last: int = option(3, "newest committed checkpoints to keep")
    keep_every: str | None = option(None, "also keep those at multiples of this much (ep, st, tok)")
    keep_best: int = option(0, "also keep this many that are best by best-metric")
    best_metric: str = option("eval/loss", "metric of the evaluation that says which are best")
    best_mode: Literal["min", "max"] = option("min", "whether the least or the greatest best-metric is best")
    init_from: str | None = option(
        None, "safetensors to start from, at step 0 only: a file, a folder or a URL", result=True
    )
    init_partial: bool = option(False, "allow init-from to lack weights of the model")
    convert: bool = option(
        False, "resume although tensors of the checkpoint have other dtypes than the model's", once=True
    )

    def __post_init__(self) -> None:
        if self.every is not None and self.every != "auto":
            parse_amount("--checkpoint.every", self.every, clock=True)
        _one_of("--checkpoint.when-busy", self.when_busy, ("wait", "delay", "skip"))
        _whole("--checkpoint.keep-last", self.keep_last, 1)
        if self.keep_every is not None:
            parse_amount("--checkpoint.keep-every", self.keep_every, clock=False)
        _whole("--checkpoint.keep-best", self.keep_best, 0)
        _require(
            self.init_from is None or bool(self.init_from.strip()),
            "--checkpoint.init-from",
            self.init_from,
            "give a file, a folder or a URL, or leave it out",
        )
        _require(
            not self.init_partial or self.init_from is not None,
            "--checkpoint.init-partial",
            self.init_partial,
            "give --checkpoint.init-from too",
        )
        _one_of("--checkpoint.best-mode", self.best_mode, ("min", "max"))
        _require(
            self.best_metric.startswith("eval/"),
            "--checkpoint.best-metric",
            self.best_metric,
            "give one of the evaluation's, such as eval/loss",
        )


@dataclass(frozen=True)
class RecoveryOptions:
    """What is kept, and how long is waited, for the case of a fault."""

    snapshot_every: str = option(
        "off", "with fsdp and hsdp, keep copies of the state in two nodes' memory, every so much (ep, st, tok, or auto)"
    )
    hang_timeout: str = option("auto", "longest wait for a worker or helper process that hangs (s, min, h; auto)")
    max_wait: str | None = option(None, "longest parking with too few workers before the run ends (s, min, h)")
    lease: str = option("30s", "workers stop applying while the membership server is silent for longer than this")

    def __post_init__(self) -> None:
        if self.snapshot_every not in ("off", "auto"):
            parse_amount("--recovery.snapshot-every", self.snapshot_every, clock=False)
        times = {"hang-timeout": self.hang_timeout, "lease": self.lease, "max-wait": self.max_wait}
        for name, text in ((f"--recovery.{key}", text) for key, text in times.items()):
            if text is None or (text == "auto" and name.endswith("hang-timeout")):
                continue
            time = parse_amount(name, text, clock=True)
            _require(time.is_clock, name, text, "give a time in s, min or h")
            least_s = {"--recovery.hang-timeout": 0.1, "--recovery.lease": 1.0}.get(name)
            if least_s is not None:
                ok = least_s <= time.seconds <= MOST_PATIENCE_S
                _require(ok, name, text, f"give a time from {least_s:g}s to {MOST_PATIENCE_S / 3600:g}h")


@dataclass(frozen=True)
class ObserveOptions:
    """What is shown and recorded."""

    log_every: float = option(2.0, "seconds between console lines")
    tensorboard: bool = option(True, "write TensorBoard event files into the run's folder")
    price: float | None = option(None, "price of one worker for one hour, for the ledger")

    def __post_init__(self) -> None:
        _finite("--observe.log-every", self.log_every, 0, above=True)
        if self.price is not None:
            _finite("--observe.price", self.price, 0)


@dataclass(frozen=True)
class ClusterOptions:
    """Which Ray cluster."""

    address: str | None = option(
        None, "address of a running Ray cluster (default: RAY_ADDRESS, a running one, or embedded)", once=True
    )
    local_nodes: int | None = option(None, "start an embedded cluster of this many separate Ray nodes", once=True)

    def __post_init__(self) -> None:
        if self.local_nodes is not None:
            _whole("--cluster.local-nodes", self.local_nodes, 1)
            _require(
                self.address is None,
                "--cluster.local-nodes",
                self.local_nodes,
                f"leave it out to use the cluster at --cluster.address {self.address}",
            )


@dataclass(frozen=True)
class TrainConfig:
    """All options of a run.

    Raises:
        ConfigError: an option, or a combination of options, that cannot work.
    """

    run: RunOptions = field(default_factory=RunOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    data: DataOptions = field(default_factory=DataOptions)
    scaling: ScalingOptions = field(default_factory=ScalingOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    recovery: RecoveryOptions = field(default_factory=RecoveryOptions)
    observe: ObserveOptions = field(default_factory=ObserveOptions)
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    dry_run: bool = option(False, "print the resolved configuration and the batch table, start nothing", common=True)
    debug: bool = option(False, "train in this process alone, without Ray: breakpoints and prints work")

    def __post_init__(self) -> None:
        for part in dataclasses.fields(self):
            section, made_by = getattr(self, part.name), part.default_factory
            if isinstance(made_by, type) and not isinstance(section, made_by):
                raise ConfigError(
                    f"{part.name} is a {type(section).__name__}; give elastic.{made_by.__name__}(...) in "
                    f"elastic.TrainConfig({part.name}=...)"
                )
        check_together(self)


def check_kind(config: object) -> None:
    """Refuse what is no configuration.

    Raises:
        ConfigError: what it is.
    """
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"a {type(config).__name__} was given as the configuration; give an elastic.TrainConfig, such as "
            'elastic.TrainConfig(run=elastic.RunOptions(duration="5ep"))'
        )


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON values; see `elastic.values` for those that JSON does not have."""
    return encode(_listed(dataclasses.asdict(config)), "the configuration")


def _listed(value: Any) -> Any:
    """Options of several values are written as lists; `from_dict` makes tuples of them again."""
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, (list, tuple)) else value


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Rebuild a configuration from `to_dict`.

    Raises:
        ConfigError: an option that this version does not know.
    """
    parts: dict[str, Any] = {}
    for part in dataclasses.fields(TrainConfig):
        if part.name not in values:
            continue
        stored = decode(values[part.name])
        if not isinstance(stored, dict):
            parts[part.name] = stored
            continue
        part_type: Any = part.default_factory
        known = {f.name for f in dataclasses.fields(part_type)}
        unknown = sorted(set(stored) - known)
        if unknown:
            raise ConfigError(f"stored option {part.name}.{unknown[0]} is not known to this version")
        parts[part.name] = part_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()})
    return TrainConfig(**parts)


def result_options(config: TrainConfig, job_options: dict[str, Any]) -> dict[str, Any]:
    """Every option that is part of what the run computes, by dotted name, coded as `elastic.values` does it; what
    cannot be coded is described, and what is secret in a URL is no part of it."""
    found: dict[str, Any] = {}
    for part in dataclasses.fields(config):
        section = getattr(config, part.name)
        if not dataclasses.is_dataclass(section):
            continue
        for f in dataclasses.fields(section):
            if f.metadata.get("result"):
                found[f"{part.name}.{f.name}".replace("_", "-")] = encode(_listed(getattr(section, f.name)))
    found.update({f"job.{k}".replace("_", "-"): describe(v, f"--job.{k}") for k, v in job_options.items()})
    return clean(found)


def digest(result: dict[str, Any]) -> str:
    """sha256 of the result options: two runs with equal digests compute the same thing."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
