"""The workers of a run on Ray, as its drive uses them: a controller keeps them, and is replaced if it is lost."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

import ray

from elastic.cluster.autoscaler import failures, known_reasons, reported, unserved
from elastic.cluster.controller import Controller
from elastic.cluster.demands import withdraw_demand
from elastic.cluster.placement_groups import GroupPlan, remove_groups
from elastic.cluster.references import Sent, is_ready
from elastic.compat.ray import session_folder
from elastic.errors import RunFailed, one_line
from elastic.membership.driver import DriverLink
from elastic.membership.protocol import Note
from elastic.run.course import Over
from elastic.run.lookout import LOOKS, Lookout

END_S = 30.0
AUTOSCALER_LOOK_S = 5.0  # between two looks at the autoscaler's failures, until a world was formed


class RayWorkers:
    """The launcher of a drive on Ray.

    Args:
        plan: the workers to have.
        function: what each of them runs.
        here: the controller is a thread of this process, which has many runs one after another, and no actor.
    """

    def __init__(self, plan: GroupPlan, function: Sent, *, here: bool):
        self._plan, self._function, self._here = plan, function, here
        self._link = DriverLink(plan.url, plan.token)
        self._looked = time.monotonic()
        self._reported: set[str] = set()  # failures of the autoscaler that are in the ledger
        self._controller: _Actor | _Here | None = None

    def start(self) -> None:
        """Start a controller; ends the last one first."""
        self.end()
        self._controller = (_Here if self._here else _Actor)(self._plan, self._function)

    def turn(self, worlds: int) -> None:
        """While no world was formed: record once why no node comes."""
        if worlds or time.monotonic() - self._looked < AUTOSCALER_LOOK_S:
            return
        self._looked = time.monotonic()
        try:
            report = reported(ray.get_runtime_context().gcs_address)
            found = [*failures(report, known_reasons(session_folder())), *unserved(report, self._plan.unit)]
        except (ray.exceptions.RayError, RuntimeError) as error:
            found = [f"the cluster's head does not say what its autoscaler does: {one_line(error)}"]
        for line in found:
            if line not in self._reported:
                with suppress(OSError):  # the host is away: tried again at the next look
                    self._link.request(Note("notice", f"the cluster's autoscaler: {line}"))
                    self._reported.add(line)

    def silent(self) -> str:
        """Why the controller counts as hung; empty if it does not."""
        assert self._controller is not None
        return self._controller.silent

    def over(self) -> Over | None:
        """How the workers have ended; None while they live."""
        assert self._controller is not None
        return self._controller.over()

    def end(self) -> None:
        """End the workers and their controller, and remove their placement groups."""
        if self._controller is not None:
            self._controller.end()
            remove_groups(self._plan.name)

    def close(self) -> None:
        """End everything, and withdraw this run's demand."""
        self.end()
        withdraw_demand(self._plan.terms.run)


class _Actor:
    """A controller that is an actor on this node."""

    def __init__(self, plan: GroupPlan, function: Sent):
        node = ray.get_runtime_context().get_node_id()
        here = {"label_selector": {"ray.io/node-id": node}, **_environment(plan, node)}
        actor_class: Any = ray.remote(Controller)
        self._actor = actor_class.options(num_cpus=0, max_concurrency=3, **here).remote(plan, function)
        self._running = self._actor.run.remote()
        self._ping: Any = None
        self._answered = False
        self.silent = ""
        what = "the controller of its workers"
        self._lookout = Lookout(what, plan.hang_timeout_s / LOOKS, self._answers, self._stands_still).__enter__()

    def _answers(self, timeout_s: float) -> bool:
        """Whether it answers. True before its first answer, and False if it is dead, which `over` finds out."""
        self._ping = self._ping or self._actor.turned.remote()
        ready, _ = ray.wait([self._ping], timeout=timeout_s)
        if ready:
            self._ping, self._answered = None, True
        return bool(ready) or not self._answered

    def _stands_still(self, why: str) -> None:
        self.silent = why

    def over(self) -> Over | None:
        if not is_ready(self._running):
            return None
        try:
            ray.get(self._running)
        except ray.exceptions.RayActorError:
            return Over(self.silent or "the controller of its workers died, and they with it", again=True)
        except RunFailed as error:
            return Over(f"the workers failed: {getattr(error, 'cause', error)}")  # the cause has none of Ray's own text
        except ray.exceptions.RayError as error:
            return Over(f"the controller of its workers failed: {one_line(error)}", again=True)
        return Over()

    def end(self) -> None:
        self._lookout.__exit__()
        if not self.silent and not is_ready(self._running):
            self._actor.end.remote()
            ray.wait([self._running], timeout=END_S)
        ray.kill(self._actor)


def _environment(plan: GroupPlan, node: str) -> dict[str, Any]:
    """Workers inherit the environment of their controller: it has one only if all nodes can serve it."""
    nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"]]
    return plan.forks.options(node) if plan.forks is not None and plan.forks.has(nodes) else {}


class _Here:
    """A controller in a thread of this process."""

    silent = ""

    def __init__(self, plan: GroupPlan, function: Sent):
        self._controller = Controller(plan, function)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._controller.run()
        except BaseException as error:  # `over` turns it into the run's failure, on the driver's thread
            self._error = error

    def over(self) -> Over | None:
        if self._thread.is_alive():
            return None
        if self._error is None:
            return Over()
        if isinstance(self._error, RunFailed):
            return Over(f"the workers failed: {self._error}")
        return Over(f"the controller of its workers failed: {one_line(self._error)}", again=True)

    def end(self) -> None:
        self._controller.end()
        self._thread.join(END_S)
