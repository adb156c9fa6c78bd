"""The actor of a worker: Ray Train's, which only the worker's own process imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from elastic.cluster.forks import Forks, serve_here
from elastic.cluster.references import Sent
from elastic.garbage import importing


@dataclass(frozen=True)
class WorkerStatus:
    """How a worker is: `running`, or ended with what its function returned, or with the text of its error."""

    running: bool
    returned: str | None
    error: str | None


class WorkerActor:
    """Has Ray Train's worker in its process, which runs the training function on a thread.

    It stands in front of Ray Train's class since whoever makes an actor, or gets its answers, imports the actor's
    class and theirs. That import takes 1.3 s of a processor, which the controller would spend before it can ask for
    the first worker.
    """

    def __init__(self) -> None:
        with importing():
            from elastic.compat.ray_train import RayTrainWorker

        self._worker = RayTrainWorker()

    def node(self) -> str:
        """The id of its node; an answer means that the process is up."""
        return self._worker.get_metadata().node_id

    def serve_forks(self, forks: Forks, asks: str) -> bool:
        """Have a fork server on this node for later workers; whether there is one, and the command `asks` it."""
        return serve_here(forks, asks)

    def begin(self, run: str, workers: int, resources: dict[str, float], function: Sent) -> None:
        """Start the training function. Its end shows in `status` only.

        Args:
            run: the name of the run.
            workers: the number of workers that it is to have.
            resources: of one worker.

        Raises:
            Exception: the function cannot be loaded here.
        """
        from elastic.compat.ray_train import run_training

        run_training(self._worker, run, workers, resources, function)

    def status(self) -> WorkerStatus:
        found = self._worker.poll_status()
        return WorkerStatus(found.running, found.return_value, None if found.error is None else str(found.error))


def create(**options: Any) -> Any:
    """Create a worker's actor with these options of Ray. Does not wait."""
    actor_class: Any = ray.remote(WorkerActor)
    return actor_class.options(**options).remote()
