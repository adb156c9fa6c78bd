"""One worker from its first join to the end of the run. Runs without Ray.

warm up -> join -> connect -> restore -> step, step, ... -> done
            ^                                   |
            +--- broken, left, or an error -----+
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass

from elastic import fault
from elastic.errors import (
    CheckpointError,
    ConfigError,
    CopiesDiffer,
    ElasticError,
    FencedError,
    NonFiniteError,
    Reform,
    RunFailed,
    WarmUpError,
    WorldBroken,
    one_line,
    whole_text,
)
from elastic.membership.client import RunOver
from elastic.membership.failure import Failure
from elastic.membership.protocol import Disconnected, Failed
from elastic.membership.stage import Position, Stage
from elastic.worker.group import Group
from elastic.worker.restore import Restored, restore
from elastic.worker.run import Identity, WorkerRun
from elastic.worker.training import stand_by, train
from elastic.worker.user_code import UserCodeError
from elastic.worker.warm_up import warm_up
from elastic.worker.world import LAST_COMMIT_S, SavingWorld, World

FINAL = (ConfigError, CheckpointError, CopiesDiffer, NonFiniteError)  # these errors would come on any worker
COLLECTIVE_TIMEOUT_S = 1800.0  # seconds; the last resort: the membership server notices a hang long before


@dataclass(frozen=True)
class Departure:
    """Why a worker left a world.

    Args:
        failure: the worker's own error.
        why: the reason to form another world, if nothing failed.
        broke: the description of a failed collective or connection.
    """

    failure: Failure | None = None
    why: str = ""
    broke: str = ""


class Session:
    """Trains until the run is finished or paused, in one world after another."""

    def __init__(self, run: WorkerRun, identity: Identity, *, import_s: float = 0.0):
        """Warm up: when this returns, the device, the data and the model are ready.

        Args:
            import_s: seconds that the process took for its imports; only reported.

        Raises:
            WarmUpError: the worker cannot be made ready; the membership server was told.
        """
        self.worker = warm_up(run, identity, import_s=import_s)
        self._departure: Departure | None = None  # why this worker left a world that is not closed yet

    def run(self) -> str:
        """Train until this worker's part ends.

        Returns:
            How it ended: "finished", "stopped", "failed" or "handed over".

        Raises:
            NonFiniteError: a loss or norm is not finite, and the run does not skip such steps.
            CopiesDiffer: the copies of the state differ between workers.
            CheckpointError: no committed checkpoint can be loaded.
            ConfigError: the newest checkpoint was trained on other data.
            FencedError: the run went on without this worker, or may have: the membership server was silent for too
                long.
            RunFailed: an error came too often.
            WarmUpError: this worker failed before its first step; the others may go on without it.
        """
        status = None
        try:
            self._ask(Departure())
            while status is None:
                with ExitStack() as at_leaving:
                    group = self._join(at_leaving)
                    try:
                        status = self._live_in(group, at_leaving)
                        self._departure = Departure() if status is None else None
                    except Exception as error:
                        self._departure = self._depart(group, error)
            return status
        except RunOver as over:
            return over.status
        except Exception as error:
            self._report_end(error)
            raise
        finally:
            self.worker.close()

    def _ask(self, departure: Departure) -> None:
        """Ask the membership server for a new world, and say why the last one was left."""
        worker, holding, link = self.worker, self.worker.holding, self.worker.link
        if departure.failure is not None:
            link.report_rows(holding.generation)  # this may end the run: an error that came too often
        failure, why, broke = departure.failure, departure.why, departure.broke
        link.ask(worker.warm_s, worker.warm_parts, holding.applied, failure, why=why, broke=broke)

    def _join(self, at_leaving: ExitStack) -> Group:
        """Wait for the world that was asked for, and return its group, which is not connected yet."""
        worker, holding, link = self.worker, self.worker.holding, self.worker.link
        assignment = link.next_world(worker.save_alone)
        code, scaling = worker.code, worker.config.scaling
        code.rank = f" (rank {assignment.rank} of {assignment.size})"
        code.doing(f"forming world {assignment.generation}", holding.applied)
        fault.point("world.assigned", assignment.rank, holding.applied)
        strategy, node = worker.config.parallel.strategy, link.member.node
        generation = assignment.generation
        group = code.group = Group(
            assignment,
            worker.device,
            strategy,
            scaling.workers_per_node,
            node,
            worker.config.parallel.tensor,
            worker.placing.stages,
            worker.placing.costs,
            exact=worker.bitwise,
            on_failure=lambda what: link.post(Disconnected(what), generation),
        )
        holding.generation = assignment.generation
        at_leaving.callback(self._leave, group)
        return group

    def _leave(self, group: Group) -> None:
        self.worker.code.group = None
        self.worker.link.free_with(None)
        self.worker.snapshots.leave()
        # ask before closing, which may take long: peers that wait for this worker are freed at once
        if self._departure is not None:
            departure, self._departure = self._departure, None
            self._ask(departure)
        group.close()

    def _live_in(self, group: Group, at_leaving: ExitStack) -> str | None:
        """Connect a world, restore the state, and train.

        Returns:
            How the run ended, or None if this worker is to join another world.
        """
        worker, assignment = self.worker, group.assignment
        worker.link.free_with(group.free, group.report)
        began = time.monotonic()
        group.connect(COLLECTIVE_TIMEOUT_S)
        worker.link.progress(Position(-1, Stage.LOAD))
        connected = time.monotonic()
        fault.point("world.connected", group.rank, worker.holding.applied)
        begin = restore(worker, group)
        if assignment.failing is not None or assignment.parting:
            self._save_and_leave(group, begin, at_leaving)
            return None
        worker.snapshots.enter(group, worker.holding.state, begin.step)
        if group.place is None:
            return stand_by(worker, group, begin)
        world = World(worker, group, group.place, begin)
        at_leaving.callback(world.close)
        if begin.moved:
            world.check_state()
        world.before = {
            "gradient_bytes": worker.holding.placed.gradient_bytes,
            "connect_s": round(connected - began, 4),
            "restore_s": round(time.monotonic() - connected, 4),
            **({"idle": list(group.layout.spares)} if group.layout.spares else {}),
        }
        return train(world)

    def _save_and_leave(self, group: Group, begin: Restored, at_leaving: ExitStack) -> None:
        """Save what the members of this world hold: it was formed because an error ends the run, or a member must
        leave.

        Raises:
            RunFailed: with the error that ends the run.
        """
        failing, holding = group.assignment.failing, self.worker.holding
        if group.place is not None:
            world = SavingWorld(self.worker, group, group.place, begin)
            at_leaving.callback(world.close)
            if failing is None:
                world.make_safe()
            else:
                world.save_newest()
        if failing is not None:
            group.gather_ints(holding.applied)  # a barrier: no member may end the run before all have saved
            raise RunFailed(failing)

    # ---- errors ------------------------------------------------------------------------------------------------

    def _depart(self, group: Group, error: Exception) -> Departure:
        """Decide what an error in a world means for this worker, and return why it asks for another world.

        Raises:
            Exception: the error itself, if it ends this worker's part.
        """
        if group.spoils and not isinstance(error, (WorldBroken, FencedError, RunOver)):
            return Departure(broke=f"world {group.assignment.generation} is broken; then {one_line(error)}")
        if isinstance(error, WorldBroken):
            return Departure(why=str(error)) if isinstance(error, Reform) else Departure(broke=str(error))
        if isinstance(error, UserCodeError):
            return Departure() if self._build_whole(error) else Departure(error.failure)
        # these come on all members in the same step, and `train` has saved what could be saved
        if isinstance(error, (NonFiniteError, CopiesDiffer)):
            raise error
        if isinstance(error, (ElasticError, RunOver)):
            failure = self._to_save_first(group, error)
            if failure is None:
                self.worker.saving.finish_under_way(LAST_COMMIT_S)
                raise error
            return Departure(failure)
        # A bug of ours, or an error in the job's code outside of a guarded call: it counts against --run.max-failures
        # like an error of the job.
        return Departure(self.worker.code.error(error).failure)

    def _to_save_first(self, group: Group, error: Exception) -> Failure | None:
        """Return a failure that makes all members save their state before this error ends the run, or None.

        For errors that are not the job's, such as a full disk. A failure is returned only if this worker's state is
        whole and newer than the newest checkpoint. All members form a world for the save, because nobody knows which of
        them have the error too.
        """
        holding = self.worker.holding
        over = isinstance(error, (RunOver, FencedError)) or group.assignment.failing is not None
        if over or not holding.savable or holding.applied <= max(self._saved_step(group), 0):
            return None
        if self._is_dispensable:
            return None
        return Failure(type(error).__name__, holding.applied, -1, str(error), fatal=True)

    def _saved_step(self, group: Group) -> int:
        """Return the step of the newest checkpoint that could be loaded when the world began.

        A checkpoint that is newer than the state with which the world began could not be loaded.
        """
        return min(group.assignment.restore.newest, self.worker.holding.began_at)

    def _build_whole(self, error: UserCodeError) -> bool:
        """Build the model in real memory if the error came from a model() that left a tensor on the meta device.

        Returns:
            Whether it was that error. The same state is then in a model with memory when this returns, or, for a
            sharded model, when the next world has sharded it.
        """
        worker, holding = self.worker, self.worker.holding
        if holding.applied < 0 or not worker.placing.build_whole(error.__cause__):
            return False
        detail = f"worker {worker.link.member.id} builds the model in real memory: {worker.placing.eager}"
        worker.link.event("built_whole", holding.applied, detail, generation=holding.generation)
        if not worker.config.parallel.sharded:
            worker.stepper.undo()
            holding.state = worker.with_memory(holding.placed)
        return True

    @property
    def _is_dispensable(self) -> bool:
        """Whether the others can go on without this worker: it was to receive their state and has done no step."""
        return self.worker.newcomer and self.worker.stepper.fresh

    def _report_end(self, error: Exception) -> None:
        """Report the error that ends this worker's part to the membership server.

        Raises:
            WarmUpError: it failed before its first step, which may have ended only its own part.
        """
        worker, link, generation = self.worker, self.worker.link, self.worker.holding.generation
        # the others go on with the run, or this worker was in no world yet
        if isinstance(error, FencedError) or generation.n < 0:
            return
        message, fresh = whole_text(error), worker.stepper.fresh
        if self._is_dispensable:
            message = f"worker {link.member.id} could not take part: {message}"
            link.unfit(message)
            raise WarmUpError(message) from error
        link.report_rows(generation)  # before `Failed`: this may end the run, and then the ledger must have all rows
        link.post(Failed(message, fresh, isinstance(error, FINAL)), generation)
        if fresh:
            raise WarmUpError(message) from error
