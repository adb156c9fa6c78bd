"""What runs inside Ray actors: the host of a run, and the training function of a worker."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import ray

from elastic.errors import ElasticError, RunFailed
from elastic.run.host import RunHost
from elastic.run.keeper import KeeperOptions


class HostActor:
    """Hosts the membership server and the keeper of a run, on the driver's node."""

    def __init__(self) -> None:
        self._host: RunHost | None = None
        threading.Thread(target=_import_store, name="import-torch", daemon=True).start()

    def start(
        self, folder_url: str, options: KeeperOptions, min_workers: int, token: str, detail: dict[str, Any]
    ) -> str:
        """Start serving; returns the URL."""
        self._host = RunHost(
            folder_url, options, min_workers=min_workers, token=token, host=ray.util.get_node_ip_address()
        )
        return self._host.start(detail)

    def stop(self) -> None:
        """Write out everything and stop serving."""
        if self._host is not None:
            self._host.stop()


def _import_store() -> None:
    """torch takes seconds to import; the first world needs its store, so it is imported meanwhile."""
    import torch.distributed  # noqa: F401


def training_function(run: Any, group_variable: str, accelerator: str) -> Callable[[], None]:
    """The function that each Ray Train worker runs on its training thread."""

    def train() -> None:
        import ray.train

        began = time.monotonic()
        from elastic.worker.run import Identity
        from elastic.worker.session import Session

        import_s = time.monotonic() - began

        context = ray.train.get_context()
        runtime = ray.get_runtime_context()
        identity = Identity(
            id=str(runtime.get_actor_id())[:12], group=int(os.environ[group_variable]),
            group_size=context.get_world_size(), node=runtime.get_node_id(),
            local_index=_device_index(runtime) if accelerator == "gpu" else context.get_local_rank(),
            host=ray.util.get_node_ip_address(), accelerator=accelerator,
        )  # fmt: skip
        try:
            Session(run, identity, import_s=import_s).run()
        except ElasticError as error:
            raise RunFailed(str(error)) from None  # crosses to the controller: only plain text is sure to pickle
        except Exception:
            raise RunFailed(traceback.format_exc()) from None

    return train


def _device_index(runtime: Any) -> int:
    """Where this worker's GPU is in the list of devices that its node's workers share."""
    assigned = str(runtime.get_accelerator_ids()["GPU"][0])
    return os.environ["CUDA_VISIBLE_DEVICES"].split(",").index(assigned)
