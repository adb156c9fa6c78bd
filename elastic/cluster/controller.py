"""The controller of a run's workers on Ray: it acts in turns until all workers are done."""

from __future__ import annotations

import threading
import time

from elastic.cluster.group import WorkerGroup
from elastic.cluster.placement_groups import GroupPlan
from elastic.cluster.references import Sent

TURN_S = 0.2


class Controller:
    """Keeps the workers of a run, as an actor or in a process that has many runs one after another. Ray ends the
    workers with the controller's process.

    Args:
        plan: the workers to have.
        function: what each of them runs.
    """

    def __init__(self, plan: GroupPlan, function: Sent):
        self._plan, self._function = plan, function
        self._turned, self._ended = threading.Event(), threading.Event()

    def run(self) -> None:
        """Keep the workers until they are done, or until `end` is called; on return none is left.

        Raises:
            RunFailed: a worker failed for good.
        """
        group = WorkerGroup(self._plan, self._function)
        try:
            next_turn = 0.0
            while not self._ended.wait(max(0.0, next_turn - time.monotonic())):
                next_turn = time.monotonic() + TURN_S
                if not group.turn(TURN_S):
                    return
                self._turned.set()
        finally:
            group.shutdown()

    def turned(self) -> None:
        """Return after the next turn."""
        self._turned.clear()
        self._turned.wait()

    def end(self) -> None:
        """End the workers at the next turn."""
        self._ended.set()
