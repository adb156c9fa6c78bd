"""Chooses what computes the gradients of a world: of a whole or a sharded model, exactly or fast."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from elastic.config import TrainConfig
from elastic.job import Job
from elastic.parallel.pipelined import Pipelined
from elastic.parallel.replicated import BitwiseReplica, FastReplica
from elastic.parallel.sharded import BitwiseSharded, FastSharded
from elastic.parallel.stages import layers_of
from elastic.worker.group import Group
from elastic.worker.share import Share
from elastic.worker.user_code import UserCode

Replica = FastReplica | BitwiseReplica | FastSharded | BitwiseSharded | Pipelined


def wrap(
    model: nn.Module,
    job: Job,
    code: UserCode,
    config: TrainConfig,
    group: Group,
    share: Share,
    *,
    find_unused: bool,
    early: bool,
    at_pass: Callable[[int], None],
    written: Collection[str] = (),
    check_every: int | None = None,
) -> Replica:
    """Wrap a model for the steps of one world. All members call this at one time.

    Args:
        code: the job's functions, guarded.
        share: the microbatches of this worker and of the others.
        find_unused: look in every pass for parameters that get no gradient.
        at_pass: called with the number of a microbatch before a pipeline runs a pass of it.
        early: whole models in bitwise begin to exchange gradients in the last backward pass of a step.
        written: names of parameters that passes may write to.
        check_every: a pipeline is held against the whole model every so many steps of the world.
    """
    parallel, bitwise = config.parallel, config.run.exactness == "bitwise"
    common: dict[str, Any] = {"runs": share.runs, "device": group.device, "check": group.check}
    replica: Replica
    loss = code.loss
    if parallel.stages > 1:
        replica = Pipelined(
            model,
            loss,
            layers=layers_of(job, model),
            costs=group.costs,
            run_layers=code.layers,
            at_pass=at_pass,
            check_every=check_every,
            mesh=group.mesh,
            bucket_mb=parallel.bucket_mb,
            exact=bitwise,
            **common,
        )
    elif parallel.sharded and bitwise:
        replica = BitwiseSharded(model, loss, rows=share.rows, mesh=group.mesh, bucket_mb=parallel.bucket_mb, **common)
    elif parallel.sharded:
        replica = FastSharded(model, loss, mesh=group.mesh, **common)
    elif bitwise:
        replica = BitwiseReplica(
            model,
            loss,
            rank=group.rank,
            links=group.mesh.links,
            bucket_mb=parallel.bucket_mb,
            early=early,
            **common,
        )
    else:
        replica = FastReplica(
            model,
            loss,
            rank=group.rank,
            bucket_mb=parallel.bucket_mb,
            find_unused=find_unused,
            compression=config.precision.grad_compression,
            written=written,
            **common,
        )
    replica.recomputes = parallel.activation_checkpointing
    return replica
