"""The end of a run, or of this session of it: evaluate, save, and report the result."""

from __future__ import annotations

from typing import Any

import torch

from elastic.errors import ElasticError
from elastic.membership.protocol import Done
from elastic.membership.stage import Stage
from elastic.parallel.device import describe
from elastic.parallel.wrapping import call_gathered
from elastic.seeds import derive, seed_all
from elastic.worker.flags import Stop
from elastic.worker.weights import weights_sha256
from elastic.worker.worker import Worker
from elastic.worker.world import World


def finish(world: World, stop: Stop) -> str:
    """Evaluate, save, wait for the commit, and report that this worker is done; returns the status.

    If the run is to stop at once, it saves without evaluating; the session that resumes it evaluates.

    Raises:
        CheckpointError: the state could not be saved.
        WorldBroken: a member was lost meanwhile.
    """
    worker, holding, group = world.worker, world.worker.holding, world.group
    if stop is not Stop.AT_ONCE or world.is_trained:
        world.evaluate()
    worker.stepper.progress(world.step - 1, Stage.CHECKPOINT)
    world.check_state()
    world.saves.finish(world.step)
    status = "stopped" if stop and not world.is_trained else "finished"
    with group.collective("gathering the weights"):
        sha = weights_sha256(world.state.model, world.state.whole)
    group.check()
    broken = worker.provenance.broken
    result: dict[str, Any] = {
        "steps": world.step,
        "samples_seen": world.step * worker.plan.global_size,
        "metrics": holding.evaluated[1] if holding.evaluated[0] == world.step else {},
        "weights_sha256": sha,
        "exactness": worker.config.run.exactness,
        "exactness_held": worker.bitwise and not broken,
        **({"exactness_lost": broken} if broken else {}),
        "hardware": {**describe(worker.device), "workers": group.size},
    }
    if status == "finished" and (group.leads or worker.config.parallel.sharded):
        result["sample"] = _sample(worker, world.state.model)
    message = worker.link.wish("stop") or "" if stop else ""
    worker.link.post(Done(group.rank, status, message, result))
    return status


def _sample(worker: Worker, model: torch.nn.Module) -> str | None:
    """The result of the job's sample(); None, with an event, if it raises: the run is trained and saved all the
    same."""
    code = worker.code
    code.where = "sample()"
    model.eval()
    seed_all(derive("sample", worker.config.run.seed))
    try:
        with torch.no_grad():
            text = code.guard(lambda: call_gathered(model, lambda: worker.job.sample(model)))
            return None if text is None else code.guard(lambda: str(text))
    except ElasticError as error:  # in the job's code, or, with a sharded model, in that of another worker
        why = error.__cause__ or error
        detail = f"sample() failed, {type(why).__name__}: {why}\n{error}"
        worker.link.event("sample_failed", worker.holding.applied, detail)
        return None
