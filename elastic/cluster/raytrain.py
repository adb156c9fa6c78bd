"""Ray Train with one thing changed, in small subclasses: survivors stay.

Ray Train answers a death or a resize by killing all workers. Here the worker group keeps those that live: it drops
the dead, and for every missing worker has one placement group outstanding, which also drives Ray's autoscaler. When
one is ready, its actor is made and warms up while the others train.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Any

import ray
from ray.train import BackendConfig
from ray.train.backend import Backend
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from elastic.cluster.board import Board
from elastic.cluster.capacity import excluded_nodes, fits, full_nodes, may_share
from elastic.cluster.rooms import GroupPlan, Room
from elastic.cluster.sharing import Patience, Share, Standing, share
from elastic.cluster.vaults import Vaults
from elastic.compat.ray import actor_id, draining_nodes, free_resources, how_it_ended, is_ready, process_ended
from elastic.compat.ray_train import (
    BaseController,
    BaseGroup,
    BaseScalingPolicy,
    BaseTrainer,
    ControllerError,
    FailureConfig,
    FailureDecision,
    FailurePolicy,
    NoopDecision,
    ResizeDecision,
    RunConfig,
    ScalingConfig,
    WorkerStatus,
)
from elastic.membership.driver import DriverLink
from elastic.membership.protocol import Existing, Gone, Leaving, Note, Request, Yield

POLL_S = 0.2
NODES_S = 1.0
START_TIMEOUT_S = 180.0
REQUEST_TIMEOUT_S = 2.0
MAX_RESTARTS = 3
_CONTROLLER_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it answers a drain with a whole-group restart
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S),
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
}
_log = logging.getLogger(__name__)


def placement_group_name(run: str) -> str:
    """Prefix of the names of a run's placement groups."""
    return f"elastic/{run}/"


def remove_placement_groups(prefix: str) -> int:
    """Remove what a controller that died left behind; returns how many."""
    left = [t for t in ray.util.placement_group_table().values() if t["name"].startswith(prefix)]
    left = [t for t in left if t["state"] != "REMOVED"]
    for entry in left:
        remove_placement_group(ray.util.get_placement_group(entry["name"]))
    return len(left)


class _NoBackend(Backend):
    """Process groups are formed by the workers themselves, world after world."""


class _NoBackendConfig(BackendConfig):
    @property
    def backend_cls(self) -> type[Backend]:
        return _NoBackend


class StartPolicy(BaseScalingPolicy):
    """One decision at the start, then none: the group itself keeps asking for what is missing."""

    def __init__(self, scaling_config: ScalingConfig, plan: GroupPlan):
        super().__init__(scaling_config)
        self._plan = plan

    def workers_to_start(self) -> int:
        return self._plan.want(self._plan.max_workers)

    def make_decision_for_non_running_worker_group(self) -> Any:
        return ResizeDecision(num_workers=self.workers_to_start(), resources_per_worker=dict(self._plan.unit))

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        return NoopDecision()


class FallbackPolicy(FailurePolicy):
    """A worker's error that came up to here ends the run; one of the controller's own restarts the whole group."""

    def __init__(self, failure_config: FailureConfig):
        super().__init__(failure_config)
        self._left = MAX_RESTARTS

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if not isinstance(training_failed_error, ControllerError):
            return FailureDecision.RAISE
        self._left -= 1
        return FailureDecision.RETRY if self._left >= 0 else FailureDecision.RAISE


class _Stage(Enum):
    """Life of a unit: its resources are asked for, its process starts, it runs, its part is over."""

    ASKED = "asked"
    STARTING = "starting"
    RUNNING = "running"
    OVER = "over"


class _Unit:
    """One worker and its place."""

    def __init__(self, room: Room):
        self.stage = _Stage.ASKED
        self.id = self.node = ""
        self.actor: Any = None
        self.since = time.monotonic()
        self.status = WorkerStatus(running=True, error=None, training_report=None)
        self.room, self._bundle = room, room.free.pop(0)
        self._group = room.group
        self.pending: Any = self._group.ready()

    def place(self) -> str:
        """The node that it was given."""
        return ray.util.placement_group_table(self._group)["bundles_to_node_id"].get(self._bundle, "")

    def create(self, worker_class: Any, unit: dict[str, float]) -> None:
        """The resources are there: make the actor. Does not wait."""
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=self._bundle
        )
        actor_class = ray.remote(num_cpus=unit.get("CPU", 0), num_gpus=unit.get("GPU", 0))(worker_class)
        self.actor = actor_class.options(scheduling_strategy=strategy).remote()
        self.id = actor_id(self.actor)[:12]
        self.stage, self.since = _Stage.STARTING, time.monotonic()
        self.pending = self.actor.get_metadata.remote()

    def drop(self, *, node_lost: bool = False) -> None:
        """End the process and give its resources back in one turn."""
        if self.actor is not None:
            ray.kill(self.actor)
        self.room.give_back(self._bundle, node_lost=node_lost)


class Group(BaseGroup):
    """A worker group that loses and gains workers without restarting the others."""

    _restarts = itertools.count()

    def start(self) -> None:
        self._plan: GroupPlan = self.train_loop_config["group"]
        self._link = DriverLink(self._plan.url, self._plan.token)
        self._want = self._plan.want(self._plan.max_workers)
        self._units: list[_Unit] = []
        self._numbers = itertools.count()
        self._vaults: Vaults | None = None
        if self._plan.vaults:
            self._vaults = Vaults(self._plan.name, self._plan.token, self._plan.still_s, how_it_ended)
        self._draining: dict[str, int] = {}
        self._drained: set[str] = set()
        self._excluded: list[str] = []
        self._next_nodes = self._ask_after = 0.0
        self._board = Board(self._plan.terms.run)
        self._share = Share()
        self._patience = Patience(self._plan.terms.request_timeout_s)
        self._had = 0
        self._enough_at = self._had_since = time.monotonic()
        restart = next(Group._restarts)
        if restart:
            self._tell(Note("fallback_restart", f"restart {restart} of the whole group"))
        self._started = True

    def has_started(self) -> bool:
        return getattr(self, "_started", False)

    def __len__(self) -> int:
        return len(self._units)

    def shutdown(self) -> None:
        """Drop everything."""
        for unit in self._units:
            unit.drop()
        self._units = []
        if self._vaults is not None:
            self._vaults.close()
        self._started = False

    def abort(self) -> None:
        self.shutdown()

    def poll(self, timeout: float | None) -> list[WorkerStatus]:
        """One turn of the control loop: absorb what died, ask for what is missing, start what is ready."""
        self._watch_nodes()
        self._ask_for_missing()
        self._collect(timeout or POLL_S)
        statuses = [u.status for u in self._units if u.stage in (_Stage.RUNNING, _Stage.OVER)]
        if not any(u.stage is _Stage.OVER for u in self._units) or not statuses:
            statuses.append(WorkerStatus(running=True, error=None, training_report=None))
        return statuses

    # ---- parts of a turn ---------------------------------------------------------------------------------------

    def _ask_for_missing(self) -> None:
        if any(u.stage is _Stage.OVER for u in self._units):
            return  # the run is ending
        staying, want = self._staying(), self._may_want()
        self._withdraw(len(staying) - want)
        if time.monotonic() < self._ask_after:
            return  # the last ones could not get ready
        for _ in range(want - len(staying)):
            last = next((u.room for u in self._units if u.stage is _Stage.ASKED), None)
            one_by_one = self._plan.per_node and not self._plan.packed
            if one_by_one and last is not None and not last.free:
                return  # where the last one comes decides which nodes are full
            self._units.append(_Unit(self._room()))

    def _room(self) -> Room:
        """Room for one more worker: beside those of its node, if that is to have more, or else new."""
        for unit in self._units:
            if unit.room.free and unit.room.usable and unit.node not in self._draining:
                return unit.room
        alone = 1 if self._plan.packed else self._plan.per_node  # who is placed together has the node alone
        full = full_nodes([u.node for u in self._units if u.node], self._plan.per_node and alone)
        return Room(self._plan, next(self._numbers), full + self._excluded)

    def _staying(self) -> list[_Unit]:
        return [u for u in self._units if u.node not in self._draining and u.id not in self._drained]

    def _may_want(self) -> int:
        """What the run could use, as far as other runs and its own patience let it ask for that now."""
        limits = [self._want, self._share.most, self._share.ask]
        if self._patience.pausing(time.monotonic()):
            limits.append(max(self._had, self._plan.terms.min_workers))
        return min(n for n in limits if n is not None)

    def _withdraw(self, count: int) -> None:
        """Ask no more for what has not come. Who is there is let go by the server."""
        asked = [u for u in self._units if u.stage is _Stage.ASKED]
        for unit in asked[: max(0, count)]:
            self._units.remove(unit)
            unit.drop()

    def _collect(self, timeout: float) -> None:
        """Take what became ready: placement groups, started processes, answers to polls, and deaths."""
        for unit in self._units:
            if unit.stage is _Stage.RUNNING and unit.pending is None:
                unit.pending = unit.actor.poll_status.remote()
        pending = {u.pending: u for u in self._units if u.pending is not None}
        ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=timeout) if pending else ([], [])
        for ref in ready:
            unit = pending[ref]
            unit.pending = None
            try:
                self._advance(unit, ray.get(ref))
            except ray.exceptions.RayError as error:
                self._absorb(unit, error)
        for unit in list(self._units):
            if unit.stage is _Stage.STARTING and time.monotonic() - unit.since > START_TIMEOUT_S:
                self._absorb(unit, TimeoutError(f"the worker did not start within {START_TIMEOUT_S:.0f} s"))

    def _advance(self, unit: _Unit, answer: Any) -> None:
        if unit.stage is _Stage.ASKED:
            if self._may_be_there(unit):
                unit.create(self.worker_class, self._plan.unit)
            else:  # it is asked for again, elsewhere
                self._units.remove(unit)
                unit.drop(node_lost=True)
        elif unit.stage is _Stage.STARTING:
            unit.node, unit.stage = answer.node_id, _Stage.RUNNING
            unit.pending = self._launch(unit)
        elif isinstance(answer, WorkerStatus):
            self._on_status(unit, answer)

    def _may_be_there(self, unit: _Unit) -> bool:
        """Whether the node that it was given is one for it: one that joined after it was asked for may be excluded, and
        rooms that were asked for together may have come together."""
        node = unit.place()
        others = sum(u.node == node and u.room is not unit.room for u in self._units)
        if node in self._excluded or not may_share(others, self._plan.group_size, self._plan.per_node):
            return False
        unit.node = node
        return True

    def _launch(self, unit: _Unit) -> Any:
        """Start the training function; nobody waits for it."""
        if self._vaults is not None:
            self._vaults.have(unit.node)
        return self.run_training(unit.actor, self._want)

    def _on_status(self, unit: _Unit, status: WorkerStatus) -> None:
        if not status.running and status.error is None and status.return_value in ("fenced", "handed over", "unfit"):
            self._units.remove(unit)
            unit.drop()
            self._next_nodes = 0.0  # ask at once how many there are to be, before one is asked for in its place
            if status.return_value == "unfit":
                self._ask_after = time.monotonic() + 2 * NODES_S  # by then the server has said for how long
        else:
            unit.status = status
            if not status.running:
                unit.stage = _Stage.OVER

    def _absorb(self, unit: _Unit, error: Exception) -> None:
        """A worker is gone: tell the membership server, give its resources back, and go on."""
        _log.info("worker %s is gone: %s", unit.id, error)
        self._units.remove(unit)
        unit.drop(node_lost=isinstance(error, ray.exceptions.RayActorError) and not process_ended(error))
        if unit.id:
            ended = process_ended(error)
            self._tell(Gone([unit.id], ended, how_it_ended(str(error)) if ended else ""))

    def _watch_nodes(self) -> None:
        """Once a second: pass on notices of nodes that go away, end evicted workers, help what was restarted."""
        now = time.monotonic()
        if now < self._next_nodes:
            return
        self._next_nodes = now + NODES_S
        if self._vaults is not None:
            for node, why in self._vaults.keep(u.node for u in self._units if u.stage is _Stage.RUNNING):
                self._tell(Note("vault_restarted", {"node": node, "why": why}))
        if self._plan.exclude:
            self._excluded = excluded_nodes(self._plan.exclude, ray.nodes())
        draining = draining_nodes()
        for node, deadline_ms in draining.items():
            sooner = deadline_ms < self._draining.get(node, math.inf)  # a second notice may leave less time
            if sooner and any(u.node == node for u in self._units):
                remaining = deadline_ms / 1000 - time.time() if deadline_ms else 30.0
                self._tell(Leaving(node, max(0.0, remaining)))
        self._draining = draining
        seen = self._tell("/group")
        if seen is None:
            return
        if seen["phase"] == "rebuilding":
            self._tell(Existing([u.id for u in self._units if u.stage is _Stage.RUNNING]))
            self._draining = {}  # it knows of no notice either
        want = self._plan.want(seen["max_workers"])
        if want > self._want:
            self._patience = Patience(self._plan.terms.request_timeout_s)  # more are wanted than was known to fail
        self._want = want
        self._drained = set(seen["drained"])
        self._ask_after = max(self._ask_after, now + seen["ask_again_s"])
        self._share_cluster(now, seen)
        for unit in list(self._units):
            if unit.id in seen["condemned"]:
                self._absorb(unit, RuntimeError("evicted"))

    def _share_cluster(self, now: float, seen: dict[str, Any]) -> None:
        """Once a second: say how this run stands, and follow from how others do."""
        terms, staying = self._plan.terms, self._staying()
        asked = [u for u in staying if u.stage is _Stage.ASKED]
        have = len(staying) - len(asked)
        if have >= terms.min_workers:
            self._enough_at = now
        if have != self._had:
            self._had_since = now
        mine = Standing(terms, have, len(asked), now - self._enough_at, now - self._had_since)
        self._share = share(mine, self._board.exchange(mine, now), holds_state=seen["holds_state"])
        if self._share.most != seen["ceiling"]:
            self._tell(Yield(self._share.most, list(self._share.to)))
        self._patience = self._patience.after(
            now,
            waited_s=max((now - u.since for u in asked), default=0.0),
            served=have > self._had or mine.short,
            room=self._patience.pausing(now) and self._has_room(),
        )
        self._had = have
        if self._share.ask == 0:
            for unit in [u for u in self._units if u.stage is not _Stage.ASKED]:
                self._absorb(unit, RuntimeError("another run goes first"))

    def _has_room(self) -> bool:
        """Whether some node could take a worker now."""
        full = full_nodes([u.node for u in self._units if u.node], self._plan.per_node)
        closed = {*full, *self._draining, *self._excluded}
        free = free_resources()
        return any(fits(self._plan.unit, has) for node, has in free.items() if node not in closed)

    def _tell(self, what: str | Request) -> dict[str, Any] | None:
        """A request to the membership server; None while it is away (it comes back, or the run ends by its lease)."""
        try:
            return self._link.request(what, REQUEST_TIMEOUT_S)
        except OSError as error:
            _log.warning("the membership server did not answer %s: %s", what, error)
            return None


class Controller(BaseController):
    """Ray Train's controller with our worker group, switches set before it reads them."""

    worker_group_cls = Group

    def __init__(self, *arguments: Any, **keywords: Any):
        os.environ.update(_CONTROLLER_ENVIRONMENT)
        Group._restarts = itertools.count()  # this process may have had a controller before, of another run
        logging.getLogger("ray.train").setLevel(logging.WARNING)  # what matters is an event of the run
        super().__init__(*arguments, **keywords)


class _Here:
    """A controller in this process. Its own `abort` would end the process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None
        self._began = threading.Event()

    def run(self, arguments: dict[str, Any]) -> Any:
        """Run to the end of the group; returns its result.

        Raises:
            RuntimeError: it was aborted.
        """
        controller = Controller(**arguments)
        self._task = self._loop.create_task(controller.run())
        self._began.set()
        try:
            self._loop.run_until_complete(self._task)
            return controller.get_result()
        except asyncio.CancelledError:
            raise RuntimeError("the controller was aborted") from None
        finally:
            controller.abort_group()
            self._loop.close()

    def abort(self, timeout_s: float) -> None:
        """End it at its next turn, from another thread, which then waits for the one that runs it."""
        if not self._began.wait(timeout_s) or self._task is None:
            return
        with contextlib.suppress(RuntimeError):  # it has just ended, and its loop with it
            self._loop.call_soon_threadsafe(self._task.cancel)


class RayTrainer(BaseTrainer):
    """Runs a training function on Ray Train's worker actors under our policies.

    Args:
        storage_path: a folder of this machine that Ray Train may write markers to; no training state goes there.
        plan: the workers to have.
        here: the controller is no actor of its own: this process is one, which has many runs one after another.
    """

    def __init__(
        self,
        train_function: Callable[[dict[str, Any]], Any],
        *,
        name: str,
        storage_path: str,
        plan: GroupPlan,
        accelerator: str,
        here: bool = False,
    ):
        scaling_config: Any = ScalingConfig(
            num_workers=plan.want(plan.max_workers), use_gpu=accelerator == "gpu", resources_per_worker=plan.unit
        )
        run_config: Any = RunConfig(name=name, storage_path=storage_path)
        super().__init__(
            train_function,
            train_loop_config={"group": plan},
            backend_config=_NoBackendConfig(),
            scaling_config=scaling_config,
            run_config=run_config,
        )
        self._policies = (StartPolicy(scaling_config, plan), FallbackPolicy(FailureConfig()))
        self._here: _Here | None = _Here() if here else None
        self._controller: Any = None
        self._ping: Any = None
        self._answered = False
        self._started = threading.Event()

    def run(self) -> None:
        """Run to the end of the group.

        Raises:
            ray.train.TrainingFailedError: a worker failed for good.
        """
        result = self._run_controller(self.controller_arguments(*self._policies))
        if result.error:
            raise result.error

    def _run_controller(self, arguments: dict[str, Any]) -> Any:
        if self._here is not None:
            return self._here.run(arguments)
        node_id = ray.get_runtime_context().get_node_id()
        actor_class = ray.remote(num_cpus=0, label_selector={"ray.io/node-id": node_id})(Controller)
        self._controller = actor_class.remote(**arguments)
        self._started.set()
        ray.get(self._controller.run.remote())
        return ray.get(self._controller.get_result.remote())

    def answers(self, timeout_s: float) -> bool:
        """Whether the controller answers within that time: False where it once did, and stands still now."""
        if self._here is not None or not self._started.is_set():
            return True
        self._ping = self._ping or is_ready(self._controller)
        ready, _ = ray.wait([self._ping], timeout=timeout_s)
        if ready:  # or it is dead, which `run` sees
            self._ping, self._answered = None, True
        return bool(ready) or not self._answered

    def kill(self) -> None:
        """End a controller that stands still, and the workers with it."""
        ray.kill(self._controller)

    def abort(self, timeout_s: float) -> None:
        """End the controller and all workers at once, from another thread."""
        if self._here is not None:
            self._here.abort(timeout_s)
            return
        if not self._started.wait(timeout_s):
            return
        try:
            ray.get(self._controller.abort.remote(), timeout=timeout_s)
        except ray.exceptions.RayActorError:
            return  # that is how an aborted controller answers
        except ray.exceptions.GetTimeoutError:
            ray.kill(self._controller)
