"""Names of Ray beyond its public interface, except those of Ray Train and Ray Tune, whose imports take seconds.

Read in Ray 2.60, to which this package is pinned. Importing this takes no longer than importing Ray.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._common.utils import get_ray_address_file
from ray._private import ray_constants, services
from ray._private import worker as ray_worker
from ray._private.authentication import authentication_token_setup as token_setup
from ray._private.node import Node
from ray._private.resource_and_label_spec import HEAD_NODE_RESOURCE_NAME
from ray._private.state import state
from ray._private.utils import get_runtime_env_info
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason, GetClusterStatusReply  # type: ignore[attr-defined]
from ray.core.generated.common_pb2 import Language  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)
from ray.runtime_env import RuntimeEnv

#: The version whose private names were checked.
TESTED = "2.60."
#: A resource that the head's node has 1 of, and no other node.
HEAD_RESOURCE: str = HEAD_NODE_RESOURCE_NAME
#: Name of the logger for Ray's hint that a cluster asks for a token.
TOKEN_LOGGER: str = token_setup.__name__
#: Ray's text for an actor whose process the raylet saw end.
PROCESS_DIED = "its worker process has died"
_EXIT_DETAIL = re.compile(r"Worker exit detail: (.*?)(?:\. (?:There are some potential|Some common causes)|\n|$)", re.S)

# ---- the cluster that this process is connected to -------------------------------------------------------------------


def session_folder() -> str:
    """Ray's folder for this session on this machine; files that a killed driver leaves there go with the session."""
    node: Any = ray_worker.global_worker.node
    return str(node.get_session_dir_path())


def draining_nodes() -> dict[str, int]:
    """Nodes that are about to go away: id in hex -> deadline in milliseconds of unix time, 0 if unknown."""
    return state.get_draining_nodes() or {}


def free_resources() -> dict[str, dict[str, float]]:
    """Free resources of each node: id in hex -> resource -> amount."""
    return state.available_resources_per_node()


def autoscaler_groups() -> list[dict[str, float]] | None:
    """Resources of one node of each type that the autoscaler may start; None if it reports no types."""
    reported = state.get_cluster_config()
    if reported is None or not reported.node_group_configs:
        return None
    return [dict(group.resources) for group in reported.node_group_configs if group.max_count]


@dataclass(frozen=True)
class Autoscaling:
    """The report of an autoscaler of version 2; empty if there is no such autoscaler.

    Args:
        failed: nodes that it could not start lately: (type, reason), the reason empty if it reports none.
        unserved: requests that fit on no present node and on none that it may start: for each, the resources of the
            bundles that are requested together.
    """

    failed: tuple[tuple[str, str], ...] = ()
    unserved: tuple[tuple[dict[str, float], ...], ...] = ()


def autoscaling(address: str, timeout_s: int) -> Autoscaling:
    """The autoscaler's last report to the head whose GCS is at `address` (host:port).

    Raises:
        ray.exceptions.RayError, RuntimeError: the head does not answer.
    """
    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(address).get_cluster_status(timeout_s=timeout_s))
    return read_autoscaling(reply.autoscaling_state)


def read_autoscaling(report: Any) -> Autoscaling:
    """Read Ray's message. Its public form leaves out requests that no node can serve."""
    groups = [[request] for request in report.infeasible_resource_requests]
    for group in report.infeasible_gang_resource_requests:  # of several alternatives, the first one counts
        groups.append(group.bundle_selectors[0].resource_requests if group.bundle_selectors else group.requests)
    return Autoscaling(
        tuple((launch.ray_node_type_name, launch.reason) for launch in report.failed_instance_requests),
        tuple(tuple(dict(request.resources_bundle) for request in group) for group in groups),
    )


def actor_id(actor: Any) -> str:
    """The id of an actor, given its handle: 32 digits in hex."""
    return actor._actor_id.hex()


def local_cluster(**head: Any) -> Any:
    """Start a head on this machine with these arguments of `ray start`; `add_node` adds more nodes.

    The class is meant for Ray's own tests; there is no public way to have several nodes on one machine.
    """
    from ray.cluster_utils import Cluster

    return Cluster(initialize_head=True, head_node_args=head)


@contextmanager
def bare_nodes(worker_script: str | None) -> Iterator[None]:
    """A head that is started inside has no autoscaler, which has nothing to scale on one machine, and no dashboard, for
    which Ray would wait: each is a Python that imports for a second.

    Args:
        worker_script: nodes start each worker by this script, with the arguments of Ray's own; None for Ray's own.
    """
    before = Node.start_monitor, Node.start_api_server, ray_constants.SETUP_WORKER_FILENAME
    Node.start_monitor = Node.start_api_server = _start_nothing  # type: ignore[assignment,method-assign]
    ray_constants.SETUP_WORKER_FILENAME = worker_script or ray_constants.SETUP_WORKER_FILENAME
    try:
        yield
    finally:
        Node.start_monitor, Node.start_api_server, ray_constants.SETUP_WORKER_FILENAME = before  # type: ignore[method-assign]


def _start_nothing(node: Node, **arguments: Any) -> None:
    pass


def prestart_workers(
    address: str, environment: dict[str, Any], count: int, keep_s: float, wait_s: float, *, of_actors: bool
) -> None:
    """Have a node start workers for whichever job first asks for a worker with this runtime environment.

    Args:
        address: of the node's raylet (host:port).
        of_actors: for actors that are made by an actor which has this environment itself. Ray compares environments
            as text, and writes that of such actors anew, without spaces
            (OverrideTaskOrActorRuntimeEnvInfo in core_worker.cc).
        keep_s: Ray ends those that nobody asked for in this time, as it ends other idle workers.
        wait_s: for the node's answer.

    Raises:
        RuntimeError: it does not answer.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest  # type: ignore[attr-defined]
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    described = get_runtime_env_info(RuntimeEnv(**environment))
    if of_actors:
        found = json.loads(described.serialized_runtime_env)
        text = json.dumps(found, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
        described.serialized_runtime_env = text
    request = PrestartWorkersRequest(
        language=Language.Value("PYTHON"),
        runtime_env_info=described,
        keep_alive_duration_secs=int(keep_s),
        num_workers=count,
    )
    try:
        with init_grpc_channel(address) as channel:
            NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=wait_s)
    except grpc.RpcError as error:
        raise RuntimeError(f"the node at {address} does not start workers: {error}") from error


# ---- the head's store of values ------------------------------------------------------------------------------------


def put_value(key: bytes, value: bytes, namespace: bytes) -> None:
    """Store a value under a key in the head's store, where every connected process can read it."""
    _internal_kv_put(key, value, overwrite=True, namespace=namespace)


def get_value(key: bytes, namespace: bytes) -> bytes | None:
    """The value of a key in the head's store; None if there is none."""
    return _internal_kv_get(key, namespace=namespace)


def list_keys(prefix: bytes, namespace: bytes) -> list[bytes]:
    """The keys in the head's store that begin with `prefix`."""
    return _internal_kv_list(prefix, namespace=namespace)


def delete_value(key: bytes, namespace: bytes) -> None:
    """Remove a key from the head's store, if it is there."""
    _internal_kv_del(key, namespace=namespace)


# ---- a head that this process is not connected to --------------------------------------------------------------------


def connect_to_head(address: str) -> Any:
    """A client of the GCS at `address` (host:port), without becoming a driver.

    Raises:
        ray.exceptions.RayError, RuntimeError: the head does not answer.
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
    """Tell the head that a node (id in hex) goes away at `deadline_ms` of unix time; (whether accepted, why not).

    Raises:
        ray.exceptions.RayError: the head does not answer.
    """
    preempted = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    return client.drain_node(node, preempted, reason, deadline_ms, timeout=timeout_s)


def require_token() -> None:
    """Check that there is a token if the environment asks for one: otherwise Ray's client would abort the process.

    Raises:
        ray.exceptions.AuthenticationError: there is none.
    """
    token_setup.ensure_token_if_auth_enabled(create_token_if_missing=False)


def use_token_if_there_is_one() -> None:
    """Use this user's token if the environment does not say whether to, as `ray start` does."""
    token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


# ---- this machine --------------------------------------------------------------------------------------------------


def cluster_addresses_here() -> set[str]:
    """Addresses (host:port) of the clusters with nodes on this machine, found in command lines of its processes."""
    return set(services.find_gcs_addresses())


def node_ids_here() -> set[str]:
    """Ids in hex of the nodes whose raylet this process can see."""
    return set(services.find_node_ids())


def address_seen_from(gcs_address: str) -> str:
    """This machine's address as the head at `gcs_address` (host:port) sees it."""
    return services.node_ip_address_from_perspective(gcs_address)


def address_file() -> Path:
    """The file in which `ray start` writes the address of the cluster that it started on this machine."""
    return Path(get_ray_address_file(None))


# ---- what Ray says -------------------------------------------------------------------------------------------------


def process_ended(error: BaseException) -> bool:
    """Whether Ray knows that an actor's process ended. Ray also calls nodes dead that are only cut off; a process there
    may go on until its lease is over."""
    return isinstance(error, ray.exceptions.ActorDiedError) and PROCESS_DIED in str(error)


def how_it_ended(text: str) -> str:
    """The sentence in which Ray says how an actor's process ended, without Ray's hints about the cause."""
    found = _EXIT_DETAIL.search(text)
    return " ".join(found[1].split()) if found else "ended without a word"


@contextmanager
def worker_lines_heard(hear: Callable[[str, str, list[str]], None]) -> Iterator[None]:
    """Inside, `hear` is told each line that another process prints: its node's address, its process id, and lines. They
    come before Ray leaves out what several print alike."""
    name = f"elastic-{id(hear)}"
    dispatcher: Any = ray_worker.global_worker_stdstream_dispatcher

    def take(data: dict[str, Any]) -> None:
        hear(str(data.get("ip")), str(data.get("pid")), list(data.get("lines", ())))

    dispatcher.add_handler(name, take)
    try:
        yield
    finally:
        dispatcher.remove_handler(name)


@contextmanager
def worker_lines_chosen(choose: Callable[[str, Sequence[str]], Sequence[str]]) -> Iterator[None]:
    """Inside, a connected driver prints only the lines of other processes that `choose` returns.

    Args:
        choose: called with a process id, or `raylet`, `gcs_server`, `autoscaler`, and lines; returns those to print.
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
