"""What a worker does in a world: a member with a place trains, a spare stands by."""

from __future__ import annotations

from elastic.errors import NonFiniteError, UpdatesDiffer
from elastic.membership.protocol import Done
from elastic.membership.stage import Stage
from elastic.worker.ending import finish
from elastic.worker.flags import Flags, Stop
from elastic.worker.group import Group
from elastic.worker.restore import Restored
from elastic.worker.worker import Worker
from elastic.worker.world import World, hold, is_paused


def train(world: World) -> str | None:
    """Train until the run ends or pauses.

    Returns:
        How the run ended, or None if the members leave this world together for another one.

    Raises:
        NonFiniteError, UpdatesDiffer: on all members, in the same step; the state before that step is saved.
    """
    try:
        return _train(world)
    except (NonFiniteError, UpdatesDiffer) as error:
        world.drop_update()
        world.save_newest(compare=isinstance(error, NonFiniteError))
        raise


def _train(world: World) -> str | None:
    worker = world.worker
    agreed = Flags(stop=Stop.PAUSE if world.is_paused else Stop.NO)
    if worker.holding.open:
        world.do_what_is_due()
    while not world.is_trained and not agreed.stop:
        worker.link.check()
        if world.stops_early:
            # early stopping is decided without a fence, but spares wait at every fence
            agreed = world.group.agree(Flags(stop=Stop.PAUSE))
            break
        if worker.config.eval.hold and worker.evaluation_is_due(world.step):
            agreed = world.hold()
        if not agreed.stop and not agreed.leave:
            agreed = world.take_step()
        if agreed.leave and not agreed.stop and not world.is_trained:
            world.make_safe()
            return None
    return finish(world, agreed.stop)


def stand_by(worker: Worker, group: Group, begin: Restored) -> str | None:
    """Stand by as a spare: hold no state, and wait at every fence, so that it can take a place when one is free.

    Returns:
        How its part ended, or None if the members leave this world together.
    """
    link, plan, step = worker.link, worker.plan, begin.step
    paused = is_paused(worker, begin, min(group.assignment.claim_step, begin.step))
    agreed = Flags(stop=Stop.PAUSE if paused else Stop.NO)
    while step < plan.total_steps and not agreed.stop:
        link.check()
        if worker.config.eval.hold and worker.evaluation_is_due(step):
            agreed = hold(worker, group, step, lambda: link.granted("save"))
            if agreed.stop or agreed.leave:
                break
        worker.stepper.progress(step, Stage.FENCE)
        agreed = group.agree(Flags(leave=link.wish("leave") is not None, snapshot=worker.snapshots.for_fence()))
        worker.snapshots.agreed(agreed.snapshot)
        step += 1
        if agreed.leave:
            break
    if agreed.leave and not agreed.stop and step < plan.total_steps:
        return None
    status = "stopped" if step < plan.total_steps else "finished"
    # The result is that of the lowest rank; a spare ranks behind all, so that it is of one that trained.
    last = group.size + group.rank
    link.post(Done(last, status, "", {}))
    return status
