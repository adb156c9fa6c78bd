"""The code that runs inside Ray actors: the host of a run, and the training function of a worker."""

from __future__ import annotations

import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import ray

from elastic.child import die_with_starter, show_stack_at_death
from elastic.cluster.capacity import visible_devices
from elastic.cluster.vaults import vault_url
from elastic.errors import ElasticError, FencedError, RunFailed, WarmUpError, one_line
from elastic.garbage import importing
from elastic.run.host import HostSettings, RunHost, import_store
from elastic.run.keeper_options import KeeperOptions
from elastic.worker.run import Identity, WorkerRun

MARKET_LABEL = "ray.io/market-type"  # spot or on-demand


class HostActor:
    """Hosts the membership server and the keeper of a run, on the driver's node. Ray restarts it if it dies.

    Args:
        settings: `restarted` means that this actor replaces one that stopped answering.
    """

    def __init__(self, folder_url: str, options: KeeperOptions, settings: HostSettings, detail: dict[str, Any]):
        show_stack_at_death()
        threading.Thread(target=import_store, name="import-torch", daemon=True).start()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own deprecated call inside this property
            again = ray.get_runtime_context().was_current_actor_reconstructed
        restarted = settings.restarted or again
        self._host = RunHost(folder_url, options, replace(settings, restarted=restarted))
        self._url = self._host.start({**detail, "restarted": True} if restarted else detail)

    def url(self) -> str:
        return self._url

    def stop(self) -> None:
        """Write everything to storage, and stop serving."""
        self._host.stop()


def training_function(run: WorkerRun, accelerator: str, vaults: str | None) -> Callable[[], str]:
    """The function that each worker runs on its training thread; it returns how the worker ended.

    The job travels as bytes and is unpickled after the device is chosen: its module may start CUDA when it is imported
    (`torch.cuda.is_available()` is a common line there), and CUDA sees the devices visible at that moment for ever.

    Args:
        vaults: prefix of the names of the run's vaults, None if it has none.
    """
    packed, bare = cloudpickle.dumps(run.job), replace(run, job=None)  # type: ignore[arg-type]

    def train() -> str:
        from elastic.compat.ray_train import print_once

        began = time.monotonic()
        print_once()
        show_stack_at_death()
        _die_with_raylet()
        runtime = ray.get_runtime_context()
        node = runtime.get_node_id()
        if market := (runtime.get_node_labels() or {}).get(MARKET_LABEL):
            os.environ.setdefault("ELASTIC_NODE_MARKET", str(market))
        identity = Identity(
            id=str(runtime.get_actor_id())[:12],
            node=node,
            local_index=0,
            host=ray.util.get_node_ip_address(),
            accelerator=accelerator,
            vault="",
        )
        failing = "a worker cannot start on node {host} ({why})"
        try:  # an error here comes from the node, not from the job: the other workers train on
            if accelerator == "gpu":
                identity = replace(identity, local_index=see_devices())
            with importing():
                from elastic.worker.alone import be_alone
                from elastic.worker.session import Session

            import_s = time.monotonic() - began
            if vaults is not None:
                identity = replace(identity, vault=vault_url(vaults, node))
            failing = (
                "the job cannot be loaded on node {host} ({why}); have what it imports on every node, or submit its "
                "folder with --working-dir"
            )
            run = replace(bare, job=cloudpickle.loads(packed))
        except Exception as error:  # any error of a module while it is imported, or Ray's if the node goes away
            from elastic.worker.linking import link_of

            with closing(link_of(bare, identity)) as link:
                link.unfit(failing.format(host=identity.host, why=one_line(error)))
            return "unfit"
        be_alone(run.job)
        try:
            return Session(run, identity, import_s=import_s).run()
        except FencedError:
            return "fenced"
        except WarmUpError:
            return "unfit"
        except ElasticError as error:
            raise RunFailed(str(error)) from None  # it goes to the controller: only plain text surely unpickles there
        except Exception:
            raise RunFailed(traceback.format_exc()) from None

    return train


def _die_with_raylet() -> None:
    """Have the kernel kill this process at the moment the node's raylet dies.

    Ray ends such a worker only 0.6 s later (measured). In that time it does not answer, but keeps its sockets open, so
    that its peers wait for it.
    """
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    if parent.exists() and b"raylet" in parent.read_bytes():
        die_with_starter()


def see_devices() -> int:
    """Make all GPUs of this node visible; returns the index of the one that Ray assigned to this worker."""
    runtime = ray.get_runtime_context()
    assigned = str(runtime.get_accelerator_ids()["GPU"][0])
    node = next(n for n in ray.nodes() if n["NodeID"] == runtime.get_node_id())
    os.environ["CUDA_VISIBLE_DEVICES"], index = visible_devices(assigned, int(node["Resources"].get("GPU", 0)))
    return index
