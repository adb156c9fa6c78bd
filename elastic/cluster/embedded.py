"""Connecting to Ray: to a given or running cluster, or to an embedded one that ends with this process."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray

from elastic.cluster.forking import Forking
from elastic.cluster.gcs import (
    ClusterUnreachable,
    check_lets_in,
    find_running_cluster,
    found_cluster_kept,
    take_own_token,
)
from elastic.cluster.noise import hidden
from elastic.compat.ray import local_cluster
from elastic.config import ClusterOptions, ScalingOptions
from elastic.errors import ConfigError
from elastic.run.signals import spared_from_hangups

ANSWER_S = 8.0
_OBJECT_STORE_BYTES = 100 * 1024 * 1024  # nothing large goes through Ray's object store


def local_gpus() -> int:
    """The number of GPUs of this machine that this process may use, found without starting CUDA."""
    folder = Path("/proc/driver/nvidia/gpus")
    count = len(list(folder.iterdir())) if folder.is_dir() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, len([v for v in visible.split(",") if v.strip()]))


def running_cluster(address: str | None) -> str | None:
    """The address of the cluster to join: a given one, or one that runs on this machine; None if there is none."""
    if address or os.environ.get("RAY_ADDRESS"):
        return address or os.environ["RAY_ADDRESS"]
    return find_running_cluster()


def check_embedded(scaling: ScalingOptions) -> None:
    """Check, before anything starts, that a cluster on this machine alone can serve the request.

    Raises:
        ConfigError: GPUs are wanted, and this machine has too few.
    """
    gpus = local_gpus()
    if scaling.accelerator == "gpu" and gpus == 0:
        raise ConfigError(
            "--scaling.accelerator is 'gpu', but this machine has no GPU and no Ray cluster is running; give cpu, or "
            "--cluster.address"
        )
    if scaling.accelerator == "gpu" and (scaling.workers_per_node or 0) > gpus:
        raise ConfigError(
            f"--scaling.workers-per-node is {scaling.workers_per_node}, but this machine has {gpus} GPUs; give at "
            f"most {gpus}, or --cluster.address"
        )


def preflight(cluster: ClusterOptions, scaling: ScalingOptions) -> str | None:
    """The address to connect to, or None for an embedded cluster, after checks that need no Ray process.

    Raises:
        ConfigError: this machine can never serve the request, or no cluster answers at the address.
    """
    address = None if cluster.local_nodes is not None else running_cluster(cluster.address)
    if is_embedded(address):
        check_embedded(scaling)
    elif address is not None and not ray.is_initialized():
        if address not in (cluster.address, os.environ.get("RAY_ADDRESS")):
            take_own_token()
        check_answers(address)
    return address


def check_answers(address: str, wait_s: float = ANSWER_S, option: str = "--cluster.address") -> None:
    """Check that a Ray cluster answers. Ray itself tries for minutes, with messages that do not name the option.

    Args:
        option: the option that gave the address, for the error.

    Raises:
        ConfigError: nothing listens at host:port, or it is not the head of a Ray cluster that admits this process.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "://" in address:
        return  # `auto`, `local`, or another form that only Ray can parse
    option = option if not os.environ.get("RAY_ADDRESS") else f"{option} or RAY_ADDRESS"
    try:
        socket.create_connection((host, int(port)), wait_s).close()
        check_lets_in(address, wait_s)
    except ClusterUnreachable as error:
        raise ConfigError(f"{option} is {address!r}: {error}") from error
    except OSError as error:
        raise ConfigError(
            f"{option} is {address!r}, where no Ray cluster answers ({error}); give the host and port of its head, or "
            "leave it out for a Ray of this machine's own"
        ) from error


def where_text(address: str | None) -> str:
    """Where the run goes, as a text for people, from the result of `preflight`."""
    if is_embedded(address):
        return "with a Ray of its own on this machine"
    return f"in the Ray cluster at {address}" if address else "in the Ray cluster that this program has joined"


def is_embedded(address: str | None) -> bool:
    """Whether the run gets a cluster of its own on this machine, from the result of `preflight`."""
    return address is None and not ray.is_initialized()


@contextmanager
def connected(
    cluster: ClusterOptions, scaling: ScalingOptions, address: str | None, forking: Forking | None = None
) -> Iterator[None]:
    """Be connected to a cluster. On the way out an embedded cluster is ended, and a connection made here is closed.

    Args:
        address: the result of `preflight`.
        forking: of the workers of an embedded cluster, if it was started before.
    """
    if forking is not None and not is_embedded(address):
        forking.close()
    if ray.is_initialized():
        yield
        return
    nodes: Any = None
    options: Mapping[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING, "configure_logging": True}
    quiet, own = ExitStack(), ExitStack()
    if address is None and forking is None:
        forking = own.enter_context(Forking())
    try:
        quiet.enter_context(hidden())
        if forking is None or address is not None:
            ray.init(address=address, **options)
        elif cluster.local_nodes is not None:
            with spared_from_hangups(), forking.nodes():
                with found_cluster_kept():
                    nodes = _local_nodes(cluster.local_nodes, scaling)
            ray.init(address=nodes.address, **options)
        else:
            cpus = max(os.cpu_count() or 1, scaling.min_workers * scaling.cpus_per_worker)
            with spared_from_hangups(), forking.nodes():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    **options,
                )
        yield
    finally:
        ray.shutdown()
        quiet.close()
        if nodes is not None:
            with found_cluster_kept():
                nodes.shutdown()
        own.close()


def _local_nodes(count: int, scaling: ScalingOptions) -> Any:
    """Start a head without CPUs and `count` worker nodes, each a raylet of its own on this machine."""
    cluster = local_cluster(num_cpus=0, include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES)
    per_node = scaling.workers_per_node or -(-scaling.max_workers // count)
    for _ in range(count):
        cluster.add_node(
            num_cpus=per_node * scaling.cpus_per_worker, object_store_memory=_OBJECT_STORE_BYTES, wait=False
        )
    cluster.wait_for_nodes()
    return cluster


def node_resources() -> list[dict[str, float]]:
    """Total resources of every living node."""
    return [n["Resources"] for n in ray.nodes() if n["Alive"]]
