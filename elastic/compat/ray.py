"""What is used of Ray beyond its public interface, but for Ray Train and Ray Tune, whose imports take seconds.

Read in Ray 2.60, to which this package is pinned. Importing this takes no longer than importing Ray.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_ray_address_file
from ray._private import services
from ray._private import worker as ray_worker
from ray._private.authentication import authentication_token_setup as token_setup
from ray._private.resource_and_label_spec import HEAD_NODE_RESOURCE_NAME
from ray._private.state import state
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason, GetClusterStatusReply  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

#: The version whose private names were read.
TESTED = "2.60."
#: A resource that the head's node has 1 of, and no other node.
HEAD_RESOURCE: str = HEAD_NODE_RESOURCE_NAME
#: Name of the logger by which Ray says that a cluster asks for a token.
TOKEN_LOGGER: str = token_setup.__name__
#: Ray's words for an actor whose process the raylet saw end.
PROCESS_DIED = "its worker process has died"
_EXIT_DETAIL = re.compile(r"Worker exit detail: (.*?)(?:\. (?:There are some potential|Some common causes)|\n|$)", re.S)

# ---- the cluster that this process is connected to -------------------------------------------------------------------


def session_folder() -> str:
    """Ray's folder for this session on this machine; what a killed driver leaves in it goes away with the session."""
    node: Any = ray_worker.global_worker.node
    return str(node.get_session_dir_path())


def draining_nodes() -> dict[str, int]:
    """Nodes that are about to go away: id in hex -> when, in milliseconds of unix time, 0 where that is not known."""
    return state.get_draining_nodes() or {}


def free_resources() -> dict[str, dict[str, float]]:
    """What is free on each node: id in hex -> resource -> amount."""
    return state.available_resources_per_node()


def autoscaler_groups() -> list[dict[str, float]] | None:
    """Resources of one node of each type that the autoscaler may start; None where it reports no type at all."""
    reported = state.get_cluster_config()
    if reported is None or not reported.node_group_configs:
        return None
    return [dict(group.resources) for group in reported.node_group_configs if group.max_count]


@dataclass(frozen=True)
class Autoscaling:
    """What an autoscaler of version 2 tells of itself; nothing where there is none.

    Args:
        failed: what it could not start lately: type of node, and why, where it says so.
        unserved: what is asked for and fits on no node that is there or that it may start: the resources of each bundle
            that are to be had together.
    """

    failed: tuple[tuple[str, str], ...] = ()
    unserved: tuple[tuple[dict[str, float], ...], ...] = ()


def autoscaling(address: str, timeout_s: int) -> Autoscaling:
    """What the head whose GCS is at `address` (host:port) was told by its autoscaler.

    Raises:
        ray.exceptions.RayError, RuntimeError: it does not answer.
    """
    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(address).get_cluster_status(timeout_s=timeout_s))
    return read_autoscaling(reply.autoscaling_state)


def read_autoscaling(report: Any) -> Autoscaling:
    """The same, of Ray's message. Its interface for people leaves out what can be served by no node."""
    groups = [[request] for request in report.infeasible_resource_requests]
    for group in report.infeasible_gang_resource_requests:  # of several choices, the first is what counts
        groups.append(group.bundle_selectors[0].resource_requests if group.bundle_selectors else group.requests)
    return Autoscaling(
        tuple((launch.ray_node_type_name, launch.reason) for launch in report.failed_instance_requests),
        tuple(tuple(dict(request.resources_bundle) for request in group) for group in groups),
    )


def actor_id(actor: Any) -> str:
    """The id of an actor, 32 digits in hex, by its handle."""
    return actor._actor_id.hex()


def local_cluster(**head: Any) -> Any:
    """Start a head on this machine, with these arguments of `ray start`; more nodes are added with `add_node`.

    A class that Ray has for its own tests; there is no public way to have several nodes on one machine.
    """
    from ray.cluster_utils import Cluster

    return Cluster(initialize_head=True, head_node_args=head)


# ---- the head's store of values ------------------------------------------------------------------------------------


def put_value(key: bytes, value: bytes, namespace: bytes) -> None:
    """Keep a value by its key in the store of the head, where every process that is connected can read it."""
    _internal_kv_put(key, value, overwrite=True, namespace=namespace)


def get_value(key: bytes, namespace: bytes) -> bytes | None:
    """The value of a key in the head's store; None where there is none."""
    return _internal_kv_get(key, namespace=namespace)


def list_keys(prefix: bytes, namespace: bytes) -> list[bytes]:
    """The keys in the head's store that begin so."""
    return _internal_kv_list(prefix, namespace=namespace)


def delete_value(key: bytes, namespace: bytes) -> None:
    """Forget a key of the head's store, if it is there."""
    _internal_kv_del(key, namespace=namespace)


# ---- a head that this process is not connected to --------------------------------------------------------------------


def connect_to_head(address: str) -> Any:
    """A client of the GCS at `address` (host:port), without becoming a driver.

    Raises:
        ray.exceptions.RayError, RuntimeError: it does not answer.
    """
    return GcsClient(address=address)


def living_nodes(client: Any, timeout_s: float) -> dict[str, str]:
    """Living nodes: id in hex -> address.

    Raises:
        ray.exceptions.RayError: the head does not answer.
    """
    found = client.get_all_node_info(timeout=timeout_s, state_filter=GcsNodeInfo.GcsNodeState.ALIVE)
    return {node.hex(): info.node_manager_address for node, info in found.items()}


def drain_node(client: Any, node: str, reason: str, deadline_ms: int, timeout_s: float) -> tuple[bool, str]:
    """Say that a node (id in hex) goes away at `deadline_ms` of unix time; (whether the head took it, why not).

    Raises:
        ray.exceptions.RayError: the head does not answer.
    """
    preempted = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    return client.drain_node(node, preempted, reason, deadline_ms, timeout=timeout_s)


def require_token() -> None:
    """Look for a token where the environment asks for one: Ray's client would abort the process without.

    Raises:
        ray.exceptions.AuthenticationError: there is none.
    """
    token_setup.ensure_token_if_auth_enabled(create_token_if_missing=False)


def use_token_if_there_is_one() -> None:
    """Use this user's token where nothing says whether to, as `ray start` does."""
    token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


# ---- this machine --------------------------------------------------------------------------------------------------


def cluster_addresses_here() -> set[str]:
    """Addresses (host:port) of the clusters that have nodes on this machine, by the command lines of its processes."""
    return set(services.find_gcs_addresses())


def node_ids_here() -> set[str]:
    """Ids in hex of the nodes whose raylet this process can see."""
    return set(services.find_node_ids())


def address_seen_from(gcs_address: str) -> str:
    """This machine's address as the head at `gcs_address` (host:port) sees it."""
    return services.node_ip_address_from_perspective(gcs_address)


def address_file() -> Path:
    """Where `ray start` writes the address of the cluster that it started on this machine."""
    return Path(get_ray_address_file(None))


# ---- what Ray says -------------------------------------------------------------------------------------------------


def process_ended(error: BaseException) -> bool:
    """Whether Ray knows that an actor's process ended. On a node that it calls dead, which may only be cut off, the
    process may go on for as long as its lease."""
    return isinstance(error, ray.exceptions.ActorDiedError) and PROCESS_DIED in str(error)


def how_it_ended(text: str) -> str:
    """The sentence in which Ray says how an actor's process ended; its hints at what that may be are for its own
    readers."""
    found = _EXIT_DETAIL.search(text)
    return " ".join(found[1].split()) if found else "ended without a word"


@contextmanager
def worker_lines_chosen(choose: Callable[[str, Sequence[str]], Sequence[str]]) -> Iterator[None]:
    """Inside, a connected driver shows of the lines of other processes what `choose` leaves of them.

    Args:
        choose: takes a process id, or `raylet`, `gcs_server`, `autoscaler`, and lines; returns those to show.
    """
    show = ray_worker.print_worker_logs

    def chosen(data: dict[str, Any], *arguments: Any, **more: Any) -> None:
        lines: Any = choose(str(data.get("pid")), data.get("lines", []))
        if lines:
            show({**data, "lines": lines}, *arguments, **more)

    ray_worker.print_worker_logs = chosen
    try:
        yield
    finally:
        ray_worker.print_worker_logs = show
