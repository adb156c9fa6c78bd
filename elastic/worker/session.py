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

FINAL = (ConfigError, CheckpointError, CopiesDiffer, NonFiniteError)  # they would be so for any worker
COLLECTIVE_TIMEOUT_S = 1800.0  # the last resort: the membership server notices a hang long before


@dataclass(frozen=True)
class Departure:
    """Why a worker left a world: its own error, what of the world failed, or to have another one made."""

    failure: Failure | None = None
    why: str = ""
    broke: str = ""


class Session:
    """Trains until the run is finished or paused, in one world after another."""

    def __init__(self, run: WorkerRun, identity: Identity, *, import_s: float = 0.0):
        """Warm up: device, data and model are ready when this returns. `import_s` is only reported.

        Raises:
            WarmUpError: they cannot be; the membership server knows.
        """
        self.worker = warm_up(run, identity, import_s=import_s)
        self._departure: Departure | None = None  # from a world that is not closed yet

    def run(self) -> str:
        """Train; returns how this worker's part ended: finished, stopped, failed or handed over.

        Raises:
            NonFiniteError: a loss or norm is not finite, and such steps are not to be skipped.
            CopiesDiffer: what is to be equal on all workers is not.
            CheckpointError: no committed checkpoint can be loaded.
            ConfigError: the newest checkpoint was trained on other data.
            FencedError: the run went on without this worker, or may have: the membership server was silent too long.
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
        """Ask for another world than the one that was left."""
        worker, holding, link = self.worker, self.worker.holding, self.worker.link
        if departure.failure is not None:
            link.report_rows(holding.generation)  # this may end the run
        failure, why, broke = departure.failure, departure.why, departure.broke
        link.ask(worker.warm_s, worker.warm_parts, holding.applied, failure, why=why, broke=broke)

    def _join(self, at_leaving: ExitStack) -> Group:
        """Wait for the world that was asked for; returns its group, not connected yet."""
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
            on_failure=lambda what: link.post(Disconnected(what), generation),
        )
        holding.generation = assignment.generation
        at_leaving.callback(self._leave, group)
        return group

    def _leave(self, group: Group) -> None:
        self.worker.code.group = None
        self.worker.link.free_with(None)
        self.worker.snapshots.leave()
        if self._departure is not None:  # before closing, which may take long: peers that wait for this one are freed
            departure, self._departure = self._departure, None
            self._ask(departure)
        group.close()

    def _live_in(self, group: Group, at_leaving: ExitStack) -> str | None:
        """From the first connection of a world to its last step; returns how the run ended, or None to join again."""
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
        """This world was formed to save what its members hold: an error ends the run, or a member is to be left out.

        Raises:
            RunFailed: with the error.
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
            group.gather_ints(holding.applied)  # nobody ends the run before all have saved
            raise RunFailed(failing)

    # ---- errors ------------------------------------------------------------------------------------------------

    def _depart(self, group: Group, error: Exception) -> Departure:
        """What an error in a world means for this worker: why it asks for another one.

        Raises:
            Exception: the error itself, where it ends this worker's part.
        """
        if group.spoils and not isinstance(error, (WorldBroken, FencedError, RunOver)):
            return Departure(broke=f"world {group.assignment.generation} is broken; then {one_line(error)}")
        if isinstance(error, WorldBroken):
            return Departure(why=str(error)) if isinstance(error, Reform) else Departure(broke=str(error))
        if isinstance(error, UserCodeError):
            return Departure() if self._build_whole(error) else Departure(error.failure)
        if isinstance(error, (NonFiniteError, CopiesDiffer)):  # of all members; what could be saved is
            raise error
        if isinstance(error, (ElasticError, RunOver)):
            failure = self._to_save_first(group, error)
            if failure is None:
                self.worker.saving.finish_under_way(LAST_COMMIT_S)
                raise error
            return Departure(failure)
        # ours, or in what belongs to no call of the job's: it counts like the job's
        return Departure(self.worker.code.error(error).failure)

    def _to_save_first(self, group: Group, error: Exception) -> Failure | None:
        """An error that is nobody's of the job: where what is held is whole, and newer than what is saved, all members
        save it before the error ends the run. They come together for that: who else has the error is not known."""
        holding = self.worker.holding
        over = isinstance(error, (RunOver, FencedError)) or group.assignment.failing is not None
        if over or not holding.savable or holding.applied <= max(self._saved_step(group), 0):
            return None
        if self._is_dispensable:
            return None
        return Failure(type(error).__name__, holding.applied, -1, str(error), fatal=True)

    def _saved_step(self, group: Group) -> int:
        """Of the newest checkpoint when the world began: one that is newer than its state could not be loaded."""
        return min(group.assignment.restore.newest, self.worker.holding.began_at)

    def _build_whole(self, error: UserCodeError) -> bool:
        """Whether the error was that model() left something without memory: then the same state is in a model that was
        built with memory when this returns, or when the next world has cut it."""
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
        """Whether the others can do without this worker: it was to get their state, and has done no step."""
        return self.worker.newcomer and self.worker.stepper.fresh

    def _report_end(self, error: Exception) -> None:
        """Say what ends this worker's part.

        Raises:
            WarmUpError: it failed before its first step, which may have ended only its own part.
        """
        worker, link, generation = self.worker, self.worker.link, self.worker.holding.generation
        if isinstance(error, FencedError) or generation.n < 0:  # others go on with the run, or it was in no world
            return
        message, fresh = whole_text(error), worker.stepper.fresh
        if self._is_dispensable:
            told = f"worker {link.member.id} could not take part: {message}"
            link.unfit(told)
            raise WarmUpError(told) from error
        link.report_rows(generation)  # this may end the run, before who reports has said all
        link.post(Failed(message, fresh, isinstance(error, FINAL)), generation)
        if fresh:
            raise WarmUpError(message) from error
