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
from elastic.parallel.layout import ROWS, TENSOR, lay_out
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
        in_cells: (shape, bytes per element, dimension) of each tensor that is cut along this dimension in a cell, too.
    """

    cut: tuple[tuple[tuple[int, ...], float], ...]
    whole: int
    in_cells: tuple[tuple[tuple[int, ...], float, int], ...] = ()

    def of(self, part: Part) -> int:
        """Bytes of one part of the state."""
        rows = sum(part.box(shape, ROWS).volume * item for shape, item in self.cut)
        in_cells = sum(part.box(shape, ((TENSOR, d), *ROWS)).volume * item for shape, item, d in self.in_cells)
        return self.whole + int(rows + in_cells)


class Unknown(Exception):
    """The size of the state is unknown until workers have built it; the message says why."""


def measure(job: Job, seed: int, cell_size: int = 1) -> StateSize:
    """The size of a job's state.

    Args:
        cell_size: workers over which the job's plan cuts tensors first.

    Raises:
        Unknown: the model or its optimizer cannot be made without memory.
    """
    import torch

    from elastic.parallel.deferred import CannotDefer, build
    from elastic.parallel.optimizers import together
    from elastic.parallel.probe import state_share
    from elastic.parallel.tensor import parts_of_plan, plan_of

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
        divided = parts_of_plan(model, plan_of(job, model)) if cell_size > 1 else {}
    except CannotDefer as error:
        raise Unknown(str(error)) from error
    except Exception as error:  # the job's own code, which workers will run and report in full
        raise Unknown(f"{type(error).__name__}: {error}") from error
    kept = {id(t): t for t in model.state_dict(keep_vars=True).values() if isinstance(t, torch.Tensor)}
    dimensions = {id(p): divided[name] for name, p in model.named_parameters() if name in divided}
    cut, in_cells, whole = [], [], 0
    for tensor in (*kept.values(), *(t for t in extra if isinstance(t, torch.Tensor))):
        item = tensor.element_size() * (1 + shares.get(id(tensor), 0.0))
        made_of_parameters = id(tensor) not in kept and tensor.is_meta
        if tensor.dim() and (isinstance(tensor, torch.nn.Parameter) or made_of_parameters):
            if id(tensor) in dimensions:
                in_cells.append((tuple(tensor.shape), item, dimensions[id(tensor)]))
            else:
                cut.append((tuple(tensor.shape), item))
        else:
            whole += int(tensor.numel() * item)
    return StateSize(tuple(cut), whole, tuple(in_cells))


def snapshot_bytes(size: StateSize, config: TrainConfig, workers: int) -> dict[str, int]:
    """Bytes that snapshots take on each node, in a world of `workers`; empty if none are taken.

    Without --scaling.workers-per-node each worker, or cell of workers, counts as being on a node of its own.
    """
    per_node = config.scaling.workers_per_node
    nodes = [f"node {rank // (per_node or config.parallel.tensor)}" for rank in range(workers)]
    least = config.parallel.stages
    stages = (least, workers) if least > 1 else None  # the most is known to who builds the model
    layout = lay_out(nodes, config.parallel.strategy, per_node, config.parallel.tensor, stages)
    holders = {part: [nodes[layout.ranks[place]] for place in places] for part, places in layout.copies.items()}
    if not needs_copies([*holders.values()]):
        return {}
    parts = [(its_nodes[0], size.of(part)) for part, its_nodes in holders.items()]
    return memory(parts, partners([Vault(node, node, "") for node in sorted(set(nodes))]))


def lines(run: PreparedRun) -> list[str]:
    """Lines for --dry-run: the memory of a node that snapshots take, by number of workers; empty without snapshots."""
    if run.plan.snapshot_every is None:
        return []
    per_node = run.config.scaling.workers_per_node or run.config.parallel.tensor
    head = f"snapshots, in MiB of the memory of a node with {per_node} {'workers' if per_node > 1 else 'worker'}"
    try:
        size = measure(run.job, run.config.run.seed, run.config.parallel.tensor)
    except Unknown as reason:
        return ["", f"{head}: known when workers have built the model ({reason})"]
    found = ["", f"{head}: two generations of its own parts and of its partner's"]
    sizes = range(run.config.least_workers, run.config.scaling.max_workers + 1, run.config.parallel.tensor)
    for workers in sizes:
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
        size = measure(run.job, run.config.run.seed, run.config.parallel.tensor)
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
