"""The actor of a worker: it runs the training function on a thread of its own, and answers meanwhile."""

from __future__ import annotations

import importlib.util
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import ray

from elastic.cluster.references import Sent
from elastic.errors import ElasticError


@dataclass(frozen=True)
class Placed:
    """What a run tells a job that asks Ray Train where it runs.

    Args:
        run: its name.
        workers: the number of workers that it is to have.
        resources: of one worker.
    """

    run: str
    workers: int
    resources: dict[str, float]


@dataclass(frozen=True)
class WorkerStatus:
    """How a worker is: `running`, or ended with what its function returned, or with the text of its error."""

    running: bool
    returned: str | None = None
    error: str | None = None


class WorkerActor:
    """One worker's process."""

    def __init__(self) -> None:
        self._status = WorkerStatus(running=True)

    def node(self) -> str:
        """The id of its node; an answer means that the process is up."""
        return ray.get_runtime_context().get_node_id()

    def begin(self, function: Sent, placed: Placed) -> None:
        """Start the training function on a thread. Its end shows in `status` only.

        Raises:
            Exception: the function cannot be loaded here.
        """
        train = function.get()
        hook = _AtImport(placed)
        if _AtImport.NAME in sys.modules:
            hook.tell()
        else:
            sys.meta_path.insert(0, hook)
        threading.Thread(target=self._run, args=(train,), name="training", daemon=True).start()

    def status(self) -> WorkerStatus:
        return self._status

    def _run(self, train: Callable[[], str]) -> None:
        try:
            self._status = WorkerStatus(running=False, returned=train())
        except ElasticError as error:  # written for people
            self._status = WorkerStatus(running=False, error=str(error))
        except BaseException:  # the job's code may also raise SystemExit
            self._status = WorkerStatus(running=False, error=traceback.format_exc())


class _AtImport(MetaPathFinder):
    """Sets the context of Ray Train as soon as the job imports it, which takes seconds; most jobs do not."""

    NAME = "ray.train"

    def __init__(self, placed: Placed):
        self._placed = placed

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_tell(module: ModuleType) -> None:
                run(module)
                parent, _, name = fullname.rpartition(".")
                if parent:  # Python does this after it has run the module; Ray Train looks itself up there
                    setattr(sys.modules[parent], name, module)
                self.tell()

            spec.loader.exec_module = run_and_tell  # type: ignore[method-assign]
        return spec

    def tell(self) -> None:
        from elastic.compat.ray_train import set_context

        set_context(self._placed.run, self._placed.workers, self._placed.resources)


def create(**options: Any) -> Any:
    """Create a worker's actor with these options of Ray. Does not wait."""
    actor_class: Any = ray.remote(WorkerActor)
    return actor_class.options(**options).remote()
