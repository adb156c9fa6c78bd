"""The workers of a run on Ray: those that live stay, whatever dies beside them.

The group drops dead workers and requests missing ones, which also drives Ray's autoscaler. When Ray grants a place, the
worker's actor is created, and warms up while the others train. `pool` decides; this module carries it out.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from elastic.cluster.capacity import excluded_nodes, fits
from elastic.cluster.demands import Demands
from elastic.cluster.forks import Keeper
from elastic.cluster.placement_groups import GroupPlan, Placement
from elastic.cluster.pool import (
    Action,
    AskAnew,
    AskIn,
    Bounds,
    GiveUp,
    Seen,
    Stage,
    Unit,
    Withdraw,
    closed_nodes,
    decide,
    may_be_there,
    notices,
    staying_units,
)
from elastic.cluster.quarantine import MOST_FAILURES, Quarantine
from elastic.cluster.references import Sent
from elastic.cluster.sharing import Demand, Patience, share
from elastic.cluster.vaults import Vaults
from elastic.cluster.worker_actor import WorkerStatus, create
from elastic.compat.ray import actor_id, draining_nodes, free_resources, how_it_ended, process_ended
from elastic.errors import RunFailed, one_line
from elastic.membership.driver import DriverLink
from elastic.membership.protocol import Existing, Gone, Leaving, Note, Request, Yield

NODES_S = 1.0
START_TIMEOUT_S = 180.0
REQUEST_TIMEOUT_S = 2.0
_log = logging.getLogger(__name__)


class _Handle:
    """The Ray objects of a unit: its bundle in a placement group, its actor, and the answer that it waits for."""

    def __init__(self, unit: Unit, placement: Placement):
        self.unit = unit
        self.actor: Any = None
        self.placement, self._bundle = placement, placement.free.pop(0)
        self.pending: Any = placement.group.ready()

    def place(self) -> str:
        """The id of the node on which Ray placed it."""
        return ray.util.placement_group_table(self.placement.group)["bundles_to_node_id"].get(self._bundle, "")

    def create(self, resources: dict[str, float], node: str, options: dict[str, Any]) -> None:
        """Create the actor, whose resources are there, with more options of Ray. Does not wait."""
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self.placement.group, placement_group_bundle_index=self._bundle
        )
        cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
        self.actor = create(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=strategy, **options)
        self.unit = replace(
            self.unit, stage=Stage.STARTING, since=time.monotonic(), id=actor_id(self.actor)[:12], node=node
        )
        self.pending = self.actor.node.remote()

    def drop(self, *, node_lost: bool = False) -> None:
        """End the process and give its resources back in the same turn."""
        if self.actor is not None:
            ray.kill(self.actor)
        self.placement.give_back(self._bundle, node_lost=node_lost)


class WorkerGroup:
    """The workers of a run. Loses and gains workers without restarting the others.

    Args:
        function: what each worker runs.
    """

    def __init__(self, plan: GroupPlan, function: Sent):
        self._plan, self._function = plan, function
        self._link = DriverLink(plan.url, plan.token)
        self._bounds = Bounds(plan.per_node, plan.group_size, plan.packed, plan.terms.min_workers, START_TIMEOUT_S)
        self._seen = Seen(plan.want(plan.max_workers))
        self._handles: dict[int, _Handle] = {}
        self._numbers = itertools.count()
        self._forks = Keeper(plan.forks, vaults=plan.vaults)
        self._vaults = (
            Vaults(plan.name, plan.token, plan.hang_timeout_s, how_it_ended, self._forks.options)
            if plan.vaults
            else None
        )
        self._deadlines: dict[str, int] = {}  # of nodes that go away
        self._quarantine = Quarantine()
        self._answered = False  # by the membership server
        self._ready: frozenset[str] = frozenset()  # workers that got ready, as the server last said
        self._next_nodes = 0.0
        self._demands = Demands(plan.terms.run)
        self._patience = Patience(plan.terms.request_timeout_s)
        self._enough_at = self._had_since = time.monotonic()

    def shutdown(self) -> None:
        """End all workers, and give all resources back."""
        for handle in self._handles.values():
            handle.drop()
        self._handles = {}
        if self._vaults is not None:
            self._vaults.close()
        self._forks.close()

    def turn(self, timeout_s: float) -> bool:
        """Drop dead workers, request missing ones, start those whose resources are there. Waits at most `timeout_s`.

        Returns:
            whether the run still has workers, or waits for some.

        Raises:
            RunFailed: a worker failed for good.
        """
        self._watch_nodes()
        self._carry_out(decide(self._units, self._now_seen(), self._bounds, time.monotonic()))
        self._collect(timeout_s)
        stages = {unit.stage for unit in self._units}
        return Stage.OVER not in stages or Stage.RUNNING in stages

    # ---- parts of a turn ---------------------------------------------------------------------------------------

    @property
    def _units(self) -> list[Unit]:
        return [handle.unit for handle in self._handles.values()]

    def _now_seen(self) -> Seen:
        lost = frozenset(h.unit.placement for h in self._handles.values() if not h.placement.usable)
        return replace(self._seen, lost_placements=lost, pausing=self._patience.pausing(time.monotonic()))

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case GiveUp(key, why):
                    self._absorb(self._handles[key], TimeoutError(why))
                case Withdraw(key):
                    self._handles.pop(key).drop()
                case AskIn(number):
                    placement = next(h.placement for h in self._handles.values() if h.unit.placement == number)
                    self._add(number, placement)
                case AskAnew(elsewhere, places):
                    number = next(self._numbers)
                    placement = Placement(self._plan, number, list(elsewhere))
                    for _ in range(places):
                        self._add(number, placement)

    def _add(self, number: int, placement: Placement) -> None:
        unit = Unit(next(self._numbers), number, Stage.ASKED, time.monotonic())
        self._handles[unit.key] = _Handle(unit, placement)

    def _remove(self, handle: _Handle, *, node_lost: bool = False) -> None:
        del self._handles[handle.unit.key]
        handle.drop(node_lost=node_lost)

    def _collect(self, timeout_s: float) -> None:
        """Take what became ready: placement groups, started processes, answers to polls, and deaths."""
        for handle in self._handles.values():
            if handle.unit.stage is Stage.RUNNING and handle.pending is None:
                handle.pending = handle.actor.status.remote()
        until = time.monotonic() + timeout_s
        while self._take_ready(max(0.0, until - time.monotonic())):
            pass  # what has begun may be ready in this turn, too

    def _take_ready(self, timeout_s: float) -> bool:
        """Take what becomes ready; whether a worker has got further."""
        pending = {h.pending: h for h in self._handles.values() if h.pending is not None}
        ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=timeout_s) if pending else ([], [])
        before = [(unit.key, unit.stage) for unit in self._units]
        for ref in ready:
            handle = pending[ref]
            handle.pending = None
            try:
                self._advance(handle, ray.get(ref))
            except ray.exceptions.RayError as error:
                self._absorb(handle, error)
        return before != [(unit.key, unit.stage) for unit in self._units]

    def _advance(self, handle: _Handle, answer: Any) -> None:
        if handle.unit.stage is Stage.ASKED:
            node = handle.place()
            if may_be_there(handle.unit, node, self._units, self._seen, self._bounds):
                handle.create(self._plan.unit, node, self._forks.options(node))
            else:  # `decide` will request it again, elsewhere
                self._remove(handle, node_lost=True)
        elif handle.unit.stage is Stage.STARTING:
            handle.unit = replace(handle.unit, stage=Stage.RUNNING, since=time.monotonic(), node=answer)
            handle.pending = self._launch(handle)
        elif isinstance(answer, WorkerStatus):
            self._on_status(handle, answer)

    def _launch(self, handle: _Handle) -> Any:
        """Start the training function; its end shows in polls only."""
        if self._vaults is not None:
            self._vaults.ensure(handle.unit.node)
        return handle.actor.begin.remote(self._plan.terms.run, self._seen.want, self._plan.unit, self._function)

    def _on_status(self, handle: _Handle, status: WorkerStatus) -> None:
        if not status.running and status.error is None and status.returned in ("fenced", "handed over", "unfit"):
            self._remove(handle)
            self._next_nodes = 0.0  # ask the server at once how many workers to have, before this one is replaced
            if status.returned == "unfit":
                self._count_failure(handle.unit)
                # after that time the server has told how long to wait
                self._seen = replace(self._seen, ask_after=time.monotonic() + 2 * NODES_S)
        elif status.error is not None:
            raise RunFailed(f"a worker failed: {status.error}")
        elif not status.running:
            handle.unit = replace(handle.unit, stage=Stage.OVER, since=time.monotonic())

    def _absorb(self, handle: _Handle, error: Exception) -> None:
        """Report a lost worker to the membership server, and give its resources back."""
        unit, raised = handle.unit, isinstance(error, ray.exceptions.RayTaskError)
        ended = raised or process_ended(error)
        _log.info("worker %s is gone: %s", unit.id, error)
        self._remove(handle, node_lost=isinstance(error, ray.exceptions.RayActorError) and not ended)
        if ended and unit.id not in self._ready:
            self._count_failure(unit)
        if unit.id:
            how = one_line(error) if raised else how_it_ended(str(error)) if ended else ""
            self._request(Gone([unit.id], ended, how))

    def _count_failure(self, unit: Unit) -> None:
        """A worker could not get ready: its node may be the reason."""
        before = self._quarantine
        training = [u.node for u in self._units if u.id in self._ready]
        self._quarantine = before.after_failure(unit.node, training)
        for node in self._quarantine.nodes - before.nodes:
            why = f"{MOST_FAILURES} workers in a row could not get ready on it, while others train elsewhere"
            _log.warning("node %s takes no more workers of this run: %s", node, why)
            self._request(Note("node_quarantined", {"node": node, "why": why}))
            self._seen = replace(self._seen, excluded=(*self._seen.excluded, node))

    def _watch_nodes(self) -> None:
        """Once a second: pass on notices of nodes that go away, end evicted workers, help a restarted server or
        vault."""
        now = time.monotonic()
        if now < self._next_nodes:
            return
        self._next_nodes = now + NODES_S
        running = [u for u in self._units if u.stage is Stage.RUNNING]
        if self._vaults is not None:
            for node, why in self._vaults.keep(u.node for u in running):
                self._request(Note("vault_restarted", {"node": node, "why": why}))
        excluded = excluded_nodes(self._plan.exclude, ray.nodes()) if self._plan.exclude else ()
        deadlines = draining_nodes()
        for node, left_s in notices(deadlines, self._deadlines, self._units, time.time()):
            self._request(Leaving(node, left_s))
        self._deadlines = deadlines
        closed = (*excluded, *sorted(self._quarantine.nodes))
        self._seen = replace(self._seen, draining=frozenset(deadlines), excluded=closed)
        found = self._request("/group")
        if found is None:
            return
        if found["phase"] == "rebuilding":
            self._request(Existing([u.id for u in running]))
            self._deadlines = {}  # a restarted server has forgotten the notices too
        self._ready = frozenset((*found["members"], *found["waiting"]))
        for unit in running:
            if unit.id in self._ready:
                self._quarantine = self._quarantine.after_success(unit.node)
        trained: dict[str, list[Any]] = {}
        for handle in self._handles.values():
            if handle.unit.stage is Stage.RUNNING and handle.unit.id in self._ready:
                trained.setdefault(handle.unit.node, []).append(handle.actor)
        self._forks.look(trained)
        want = self._plan.want(found["max_workers"])
        if want > self._seen.want:
            self._patience = Patience(self._plan.terms.request_timeout_s)  # what failed before was a smaller request
        ask_after = max(self._seen.ask_after, now + found["ask_again_s"])
        self._seen = replace(self._seen, want=want, drained=frozenset(found["drained"]), ask_after=ask_after)
        self._share_cluster(now, found)
        for handle in list(self._handles.values()):
            if handle.unit.id in found["condemned"]:
                self._absorb(handle, RuntimeError("evicted"))

    def _share_cluster(self, now: float, found: dict[str, Any]) -> None:
        """Once a second: publish this run's demand, and follow what the demands of other runs leave it."""
        terms, staying = self._plan.terms, staying_units(self._units, self._seen)
        asked = [u for u in staying if u.stage is Stage.ASKED]
        have = len(staying) - len(asked)
        if have >= terms.min_workers:
            self._enough_at = now
        if have != self._seen.had:
            self._had_since = now
        mine = Demand(terms, have, len(asked), now - self._enough_at, now - self._had_since)
        left = share(mine, self._demands.exchange(mine, now), holds_state=found["holds_state"])
        if left.most != found["ceiling"]:
            self._request(Yield(left.most, list(left.to)))
        self._patience = self._patience.after(
            now,
            waited_s=max((now - u.since for u in asked), default=0.0),
            served=have > self._seen.had or mine.short,
            room=self._patience.pausing(now) and self._has_room(),
        )
        self._seen = replace(self._seen, share=left, had=have)
        if left.ask == 0:
            for handle in [h for h in self._handles.values() if h.unit.stage is not Stage.ASKED]:
                self._absorb(handle, RuntimeError("another run goes first"))

    def _has_room(self) -> bool:
        """Whether some node could take a worker now."""
        closed = closed_nodes(self._units, self._seen, self._bounds)
        return any(fits(self._plan.unit, has) for node, has in free_resources().items() if node not in closed)

    def _request(self, what: str | Request) -> dict[str, Any] | None:
        """Send a request to the membership server. None if it is away: it comes back, or the run ends by its lease."""
        try:
            answer = self._link.request(what, REQUEST_TIMEOUT_S)
        except OSError as error:
            if self._answered:  # at first the server may still start
                _log.warning("the membership server did not answer %s: %s", what, error)
            return None
        self._answered = True
        return answer
