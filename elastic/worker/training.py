"""What a worker does in a world: it trains, or it stands by."""

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
    """Step until the end, a pause, or (None) until the members leave this world together.

    Raises:
        NonFiniteError, UpdatesDiffer: of all members, in the same step; the state before is saved.
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
            agreed = world.group.agree(Flags(stop=Stop.PAUSE))  # spares wait at every fence
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
    """A spare holds nothing and waits at every fence, so that it is there when a place is free.

    Returns:
        how its part ended, or None where the members leave this world together.
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
    last = group.size + group.rank  # the result is the lowest rank's, which is to be one that trained
    link.post(Done(last, status, "", {}))
    return status
