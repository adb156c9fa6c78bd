"""Sections of options for operating a run: on how many workers, where, and what is kept and shown."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

from elastic.checks import finite, one_of, option, require, whole
from elastic.errors import ConfigError
from elastic.prices import check_price
from elastic.units import parse_amount

LEAST_WARM_S = 1.0  # who waits looks at the clock as often as it may be over
MOST_PATIENCE_S = 168 * 3600.0  # a week: some waits for a worker count milliseconds in 31 bits


@dataclass(frozen=True)
class ScalingOptions:
    """How many workers, and on what hardware."""

    min_workers: int = option(1, "fewest workers to train with", common=True)
    max_workers: int = option(2, "most workers to train with (a worker is one GPU, or CPU slots)", common=True)
    spares: int = option(0, "warm workers to keep outside the world")
    accelerator: Literal["auto", "cpu", "gpu"] = option(
        "auto", "what a worker runs on; auto asks the cluster", common=True
    )
    cpus_per_worker: int = option(1, "CPU slots (and torch threads) of a worker")
    workers_per_node: int | None = option(None, "most workers on one node (default: what fits)")
    memory_per_worker: float | None = option(
        None, "GiB that a worker has, for --parallel.pipeline auto (default: as on this machine)"
    )
    exclude: tuple[str, ...] = option(
        (), "nodes of the cluster to keep out: host names, addresses, or beginnings of ids"
    )
    priority: int = option(0, "on a shared cluster: where this run lacks min-workers, lower ones shrink to theirs")
    request_timeout: str = option("10min", "ask no longer for workers above min-workers, then pause (s, min, h)")

    def __post_init__(self) -> None:
        whole("--scaling.min-workers", self.min_workers, 1)
        whole("--scaling.max-workers", self.max_workers, 1)
        require(
            self.min_workers <= self.max_workers,
            "--scaling.min-workers",
            self.min_workers,
            f"give at most --scaling.max-workers {self.max_workers}",
        )
        whole("--scaling.spares", self.spares, 0)
        one_of("--scaling.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        whole("--scaling.cpus-per-worker", self.cpus_per_worker, 1, 4096)
        if self.workers_per_node is not None:
            whole("--scaling.workers-per-node", self.workers_per_node, 1)
        if self.memory_per_worker is not None:
            finite("--scaling.memory-per-worker", self.memory_per_worker, 0.0, above=True)
        for name in self.exclude:
            require(bool(name.strip()), "--scaling.exclude", name, "give host names, addresses, or beginnings of ids")
        require(
            isinstance(self.priority, int) and not isinstance(self.priority, bool),
            "--scaling.priority",
            self.priority,
            "give a whole number",
        )
        require(abs(self.priority) <= 10**9, "--scaling.priority", self.priority, "give a number up to 1000000000")
        name, text = "--scaling.request-timeout", self.request_timeout
        require(parse_amount(name, text, clock=True).is_clock, name, text, "give a time in s, min or h")


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
        one_of("--checkpoint.when-busy", self.when_busy, ("wait", "delay", "skip"))
        whole("--checkpoint.keep-last", self.keep_last, 1)
        if self.keep_every is not None:
            parse_amount("--checkpoint.keep-every", self.keep_every, clock=False)
        whole("--checkpoint.keep-best", self.keep_best, 0)
        require(
            self.init_from is None or bool(self.init_from.strip()),
            "--checkpoint.init-from",
            self.init_from,
            "give a file, a folder or a URL, or leave it out",
        )
        require(
            not self.init_partial or self.init_from is not None,
            "--checkpoint.init-partial",
            self.init_partial,
            "give --checkpoint.init-from too",
        )
        one_of("--checkpoint.best-mode", self.best_mode, ("min", "max"))
        require(
            self.best_metric.startswith("eval/"),
            "--checkpoint.best-metric",
            self.best_metric,
            "give one of the evaluation's, such as eval/loss",
        )


@dataclass(frozen=True)
class RecoveryOptions:
    """What is kept in case of a fault, and how long the run waits for it."""

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
            require(time.is_clock, name, text, "give a time in s, min or h")
            least_s = {"--recovery.hang-timeout": 0.1, "--recovery.lease": 1.0}.get(name)
            if least_s is not None:
                ok = least_s <= time.seconds <= MOST_PATIENCE_S
                require(ok, name, text, f"give a time from {least_s:g}s to {MOST_PATIENCE_S / 3600:g}h")


def check_notify(to: str) -> None:
    """Refuse what is neither a URL nor a command; whether there is such a one is another matter.

    Raises:
        ConfigError: in one sentence, without the rest of a URL, which may be secret.
    """
    name, fix = "--observe.notify", "give an http(s) URL, or a command, such as 'python tell.py'"
    if "://" in to:
        require(to.startswith(("http://", "https://")) and len(to) > 8, name, to.partition("://")[0] + "://...", fix)
        return
    try:
        words = shlex.split(to)
    except ValueError as error:
        raise ConfigError(f"{name} is {to!r}, which is no command ({error}); {fix}") from error
    require(bool(words), name, to, fix)


@dataclass(frozen=True)
class ObserveOptions:
    """What is shown and recorded."""

    log_every: float = option(2.0, "seconds between console lines")
    quiet: bool = option(False, "on the console only what goes wrong, and how the run ends")
    tensorboard: bool = option(True, "write TensorBoard event files into the run's folder")
    port: int | None = option(
        None, "port of the run's server in plain processes, with /metrics for Prometheus (default: any)", once=True
    )
    notify: str | None = option(
        None, "URL or command told when the run ends, is parked for long, was lost, or cannot save", once=True
    )
    price: tuple[str, ...] = option(
        (), "prices: of a worker for an hour (0.40), of a node (g5.xlarge=0.40/h), or a .json file of prices with times"
    )

    def __post_init__(self) -> None:
        finite("--observe.log-every", self.log_every, 0, above=True)
        if self.port is not None:
            whole("--observe.port", self.port, 1, 65535)
        if self.notify is not None:
            check_notify(self.notify)
        given: object = self.price
        if not isinstance(given, (tuple, list)):  # earlier versions had one number
            object.__setattr__(self, "price", () if given is None else (str(given),))
        for one in self.price:
            check_price(one)


@dataclass(frozen=True)
class ClusterOptions:
    """Which Ray cluster to use."""

    address: str | None = option(
        None, "address of a running Ray cluster (default: RAY_ADDRESS, a running one, or embedded)", once=True
    )
    local_nodes: int | None = option(None, "start an embedded cluster of this many separate Ray nodes", once=True)
    keep_warm: str | None = option(
        "30min", "on a running cluster: processes wait so long for the next run, which starts in seconds; None: no"
    )

    def __post_init__(self) -> None:
        if self.keep_warm is not None:
            name, text = "--cluster.keep-warm", self.keep_warm
            time = parse_amount(name, text, clock=True)
            require(time.is_clock and time.seconds >= LEAST_WARM_S, name, text, "give a time of at least 1s, or None")
        if self.local_nodes is not None:
            whole("--cluster.local-nodes", self.local_nodes, 1)
            require(
                self.address is None,
                "--cluster.local-nodes",
                self.local_nodes,
                f"leave it out to use the cluster at --cluster.address {self.address}",
            )
