"""Estimates the memory that snapshots take on each node before anything is started: the model is built on meta.

Workers measure it exactly before their first step, and refuse then what does not fit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elastic.config import TrainConfig
from elastic.errors import ConfigError
from elastic.job import Job
from elastic.parallel.layout import ROWS, lay_out
from elastic.placement import Part
from elastic.snapshot.memory import available_bytes
from elastic.snapshot.partners import Vault, memory, needs_copies, partners

if TYPE_CHECKING:
    from elastic.run.prepare import PreparedRun


@dataclass(frozen=True)
class StateSize:
    """Bytes of a training state, including what the optimizer keeps after its first step.

    Args:
        cut: (shape, bytes per element) of each tensor that a sharded run shards.
        whole: bytes of all tensors that every worker holds completely.
    """

    cut: tuple[tuple[tuple[int, ...], float], ...]
    whole: int

    def of(self, part: Part) -> int:
        """Bytes of one part of the state."""
        return self.whole + int(sum(part.box(shape, ROWS).volume * item for shape, item in self.cut))


class Unknown(Exception):
    """The size of the state is unknown until workers have built it; the message says why."""


def measure(job: Job, seed: int) -> StateSize:
    """The size of a job's state.

    Raises:
        Unknown: the model or its optimizer cannot be made without memory.
    """
    import torch

    from elastic.parallel.deferred import CannotDefer, build
    from elastic.parallel.optimizers import together
    from elastic.parallel.probe import state_share

    job = copy.copy(job)  # what it stores in itself while it builds the model must not reach the real run
    try:
        model = build(job.model, seed).model
        optimizer = together(job.optimizer(model))
        shares = {
            id(p): share
            for group, share in zip(optimizer.param_groups, state_share(optimizer), strict=True)
            for p in group["params"]
            if p.requires_grad
        }
        extra = job.extra_state().values()
    except CannotDefer as error:
        raise Unknown(str(error)) from error
    except Exception as error:  # the job's own code, which workers will run and report in full
        raise Unknown(f"{type(error).__name__}: {error}") from error
    kept = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, torch.Tensor)}
    cut, whole = [], 0
    for tensor in (*kept.values(), *(t for t in extra if isinstance(t, torch.Tensor))):
        item = tensor.element_size() * (1 + shares.get(id(tensor), 0.0))
        made_of_parameters = id(tensor) not in kept and tensor.is_meta
        if tensor.dim() and (isinstance(tensor, torch.nn.Parameter) or made_of_parameters):
            cut.append((tuple(tensor.shape), item))
        else:
            whole += int(tensor.numel() * item)
    return StateSize(tuple(cut), whole)


def snapshot_bytes(size: StateSize, config: TrainConfig, workers: int) -> dict[str, int]:
    """Bytes that snapshots take on each node, in a world of `workers`; empty if none are taken.

    Without --scaling.workers-per-node each worker counts as being on a node of its own.
    """
    per_node = config.scaling.workers_per_node
    nodes = [f"node {rank // (per_node or 1)}" for rank in range(workers)]
    layout = lay_out(nodes, config.parallel.strategy, per_node)
    holders = {part: [nodes[layout.ranks[place]] for place in places] for part, places in layout.copies.items()}
    if not needs_copies([*holders.values()]):
        return {}
    parts = [(its_nodes[0], size.of(part)) for part, its_nodes in holders.items()]
    return memory(parts, partners([Vault(node, node, "") for node in sorted(set(nodes))]))


def lines(run: PreparedRun) -> list[str]:
    """Lines for --dry-run: the memory of a node that snapshots take, by number of workers; empty without snapshots."""
    if run.plan.snapshot_every is None:
        return []
    per_node = run.config.scaling.workers_per_node or 1
    head = f"snapshots, in MiB of the memory of a node with {per_node} {'workers' if per_node > 1 else 'worker'}"
    try:
        size = measure(run.job, run.config.run.seed)
    except Unknown as reason:
        return ["", f"{head}: known when workers have built the model ({reason})"]
    found = ["", f"{head}: two generations of its own parts and of its partner's"]
    for workers in range(run.config.scaling.min_workers, run.config.scaling.max_workers + 1):
        most = max(snapshot_bytes(size, run.config, workers).values(), default=0)
        found.append(f"{workers:>7}  {f'{most / 2**20:,.1f}' if most else 'none needed'}")
    return found


def refuse_what_does_not_fit_here(run: PreparedRun) -> None:
    """Refuse snapshots that do not fit into this machine's memory, before anything is started. For a run of which all
    nodes are on this machine.

    Raises:
        ConfigError: even the largest world, which has the smallest parts, needs more than is available.
    """
    if run.plan.snapshot_every is None:
        return
    try:
        size = measure(run.job, run.config.run.seed)
    except Unknown:
        return
    need = sum(snapshot_bytes(size, run.config, run.config.scaling.max_workers).values())
    available = available_bytes()
    if need > available:
        raise ConfigError(
            f"--recovery.snapshot-every is {run.config.recovery.snapshot_every!r}, but snapshots take "
            f"{need / 2**20:,.1f} MiB of this machine, which has {available / 2**20:,.1f} MiB left; leave it off, or "
            "use several machines"
        )
