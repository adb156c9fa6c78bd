"""Asks a Ray cluster's head about its nodes without being a driver: a watcher runs on every node and must be small."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import socket
import threading
from collections.abc import Iterator, Mapping

import ray

from elastic.cluster.noise import cpp_lines_hidden, hide_token_hint
from elastic.compat.ray import (
    address_file,
    cluster_addresses_here,
    connect_to_head,
    drain_node,
    living_nodes,
    require_token,
    use_token_if_there_is_one,
)
from elastic.errors import ConfigError, one_line

REQUEST_TIMEOUT_S = 5.0
REACH_S = 1.0


class ClusterUnreachable(Exception):
    """The head does not answer."""


def check_lets_in(address: str, wait_s: float) -> None:
    """Check that a Ray cluster's head listens at `address` (host:port), and that this process has its token.

    Raises:
        ClusterUnreachable: the head does not answer within `wait_s`, or refuses the token.
    """
    found: queue.Queue[Exception | None] = queue.Queue()

    def ask() -> None:
        try:
            require_token()
            connect_to_head(address)
        except (ray.exceptions.RayError, RuntimeError) as error:
            found.put(error)
        else:
            found.put(None)

    with cpp_lines_hidden():
        threading.Thread(target=ask, name="ask-head", daemon=True).start()  # another kind of server may never answer
        try:
            error = found.get(timeout=wait_s)
        except queue.Empty:
            error = TimeoutError(f"no answer within {wait_s:g} s")
    if isinstance(error, ray.exceptions.AuthenticationError):
        raise ClusterUnreachable(
            "the cluster wants a token, and this process has none or another one; give RAY_AUTH_MODE=token, and its "
            "token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    if error is not None:
        raise ClusterUnreachable(
            f"what listens there does not answer as the head of a Ray cluster does ({one_line(error)}); give the host "
            "and port of its head, or leave it out for a Ray of this machine's own"
        ) from error


def take_own_token() -> None:
    """Use this user's Ray token if the environment does not say whether to, as `ray start` does. Only for a cluster
    that
    this user started on this machine: a cluster that was only named would learn the token."""
    hide_token_hint()
    use_token_if_there_is_one()


class Nodes:
    """The nodes of the cluster whose GCS listens at `address` (host:port).

    Raises:
        ClusterUnreachable: from every method, when the head does not answer.
    """

    def __init__(self, address: str):
        self.address = address
        try:
            self._gcs = connect_to_head(address)
        except (ray.exceptions.RayError, RuntimeError) as error:
            raise ClusterUnreachable(f"no Ray cluster answers at {address}: {error}") from error

    def alive(self) -> dict[str, str]:
        """The living nodes: id in hex -> address."""
        try:
            return living_nodes(self._gcs, REQUEST_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            raise ClusterUnreachable(f"the head at {self.address} does not answer: {error}") from error

    def drain(self, node: str, deadline: float, reason: str) -> None:
        """Tell the head that the node goes away at `deadline` (unix seconds): nothing new is placed there."""
        try:
            accepted, why = drain_node(self._gcs, node, reason, math.ceil(deadline * 1000), REQUEST_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            raise ClusterUnreachable(f"the head at {self.address} does not answer: {error}") from error
        if not accepted:
            raise ClusterUnreachable(f"the head at {self.address} refused to drain node {node}: {why}")


def cluster_here() -> str:
    """The address of the cluster that a node of this machine belongs to.

    Raises:
        ConfigError: there is none, or there are several.
    """
    found = sorted(cluster_addresses_here())
    if len(found) != 1:
        raise ConfigError(
            f"--address is not given, and nodes of {len(found)} Ray clusters run on this machine; give it as host:port"
        )
    return found[0]


def own_node(alive: Mapping[str, str], ids_here: set[str], address: str) -> str | None:
    """The living node (id -> address) that is this machine's, None if there is none yet.

    Raises:
        ConfigError: several are.
    """
    at_address = {node for node, its_address in alive.items() if its_address == address}
    here = (ids_here & at_address) or at_address or (ids_here & alive.keys())
    if len(here) > 1:
        raise ConfigError(f"{len(here)} nodes of the cluster run on this machine; say which with --node-id")
    return next(iter(here), None)


def find_running_cluster() -> str | None:
    """The address of the cluster that this user's `ray start` left running on this machine, if it still answers.

    The processes of this machine are not searched: they include clusters of other users, and clusters that belong to
    another command and end with it.
    """
    try:
        file = address_file()
        if file.stat().st_uid != os.getuid():
            return None
        address = file.read_text().strip()
        host, port = address.rsplit(":", 1)
        socket.create_connection((host, int(port)), REACH_S).close()
    except (OSError, ValueError):
        return None
    return address


@contextlib.contextmanager
def found_cluster_kept() -> Iterator[None]:
    """Inside, starting and ending clusters does not change which one `find_running_cluster` finds."""
    file = address_file()
    before = file.read_bytes() if file.is_file() else None
    try:
        yield
    finally:
        if before is not None:
            file.write_bytes(before)
        else:
            file.unlink(missing_ok=True)
