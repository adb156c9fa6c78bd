"""The end of a run, or of this session of it: evaluate, save, and report the result."""

from __future__ import annotations

from typing import Any

from elastic.membership.protocol import Done
from elastic.membership.stage import Stage
from elastic.parallel.device import describe
from elastic.worker.flags import Stop
from elastic.worker.sampling import sample
from elastic.worker.weights import weights_sha256
from elastic.worker.world import World


def finish(world: World, stop: Stop) -> str:
    """Evaluate, save, wait for the commit, and report that this worker is done; returns the status.

    If the run is to stop at once, it saves without evaluating; the session that resumes it evaluates.

    Raises:
        CheckpointError: the state could not be saved.
        WorldBroken: a member was lost meanwhile.
    """
    worker, holding, group = world.worker, world.worker.holding, world.group
    if worker.evaluation_is_due(world.step) and stop is Stop.PAUSE:
        world.evaluate_and_decide()
    elif stop is not Stop.AT_ONCE or world.is_trained:
        world.evaluate()
    worker.stepper.progress(world.step - 1, Stage.CHECKPOINT)
    world.check_state()
    world.saves.finish(world.step)
    status = "stopped" if stop and not (world.is_trained or world.stops_early) else "finished"
    with group.collective("gathering the weights"):
        sha = weights_sha256(world.state.model, world.state.whole)
    group.check()
    broken = worker.provenance.broken
    result: dict[str, Any] = {
        "steps": world.step,
        "samples_seen": worker.plan.samples(world.step),
        "metrics": holding.evaluated[1] if holding.evaluated[0] == world.step else {},
        "weights_sha256": sha,
        "exactness": worker.config.run.exactness,
        "exactness_held": worker.bitwise and not broken,
        **({"exactness_lost": broken} if broken else {}),
        "hardware": {**describe(worker.device), "workers": group.size},
    }
    if status == "finished" and (group.leads or worker.config.parallel.sharded):
        result["sample"] = sample(worker, world.state.model, world.step, leads=group.leads)
    message = worker.link.wish("stop") or "" if stop else ""
    if world.stops_early and not world.is_trained:
        message = f"ended early: {worker.config.checkpoint.best_metric} has become no better"
    worker.link.post(Done(group.rank, status, message, result))
    return status
