"""`elastic node-watch`: turns notices of the cloud, and SIGTERM, into a drain of this machine's Ray node.

A run whose workers are on a draining node orders their replacement at once and hands over before the deadline.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from elastic.errors import ConfigError, ElasticError
from elastic.units import parse_amount

if TYPE_CHECKING:
    from elastic.cluster.gcs import Nodes
    from elastic.notices.clouds import Cloud
    from elastic.notices.meaning import Notice

CLOUDS = ("auto", "aws", "gcp", "azure", "none")
NODE_TIMEOUT_S = 120.0
HEAD_TIMEOUT_S = 300.0
AGAIN_S = 1.0


@dataclass(frozen=True)
class WatchOptions:
    """The options of a watcher.

    Args:
        address: host:port of the cluster's head, or None to find it by this machine's node.
        node_id: the node to watch, or None for this machine's.
        rebalance_s: seconds after a rebalance recommendation until the node must be left; None ignores these.
        grace_s: seconds after SIGTERM until the node must be left.
        leave: leave at once, as on SIGTERM.
    """

    cloud: str = "auto"
    endpoint: str | None = None
    address: str | None = None
    node_id: str | None = None
    poll_s: float = 2.0
    rebalance_s: float | None = 600.0
    grace_s: float = 25.0
    leave: bool = False


def add_verb(verbs: Any) -> None:
    """Add `node-watch` to the parser of `elastic`."""
    text = "drain this machine's Ray node when the cloud says that it goes away, or on SIGTERM"
    parser = verbs.add_parser("node-watch", help=text, description=text[0].upper() + text[1:] + ".")
    parser.add_argument("--cloud", choices=CLOUDS, default="auto", help="whose notices (default auto: who answers)")
    parser.add_argument("--endpoint", metavar="URL", help="of the notices (default http://169.254.169.254)")
    parser.add_argument("--address", help="host:port of the cluster's head (default that of the node here)")
    parser.add_argument("--node-id", metavar="HEX", help="node to watch (default that of this machine)")
    parser.add_argument("--poll", default="2s", metavar="TIME", help="between two questions (default 2s)")
    parser.add_argument(
        "--rebalance",
        default="10min",
        metavar="TIME",
        help="leave so long after EC2 recommends it, or off (default 10min)",
    )
    parser.add_argument(
        "--grace", default="25s", metavar="TIME", help="time to leave after SIGTERM, less than until SIGKILL (25s)"
    )
    parser.add_argument("--leave", action="store_true", help="leave now, as on SIGTERM, and end when the node is left")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    return watch(
        WatchOptions(
            cloud=arguments.cloud,
            endpoint=arguments.endpoint,
            address=arguments.address,
            node_id=arguments.node_id,
            poll_s=_seconds("--poll", arguments.poll),
            grace_s=_seconds("--grace", arguments.grace),
            rebalance_s=None if arguments.rebalance == "off" else _seconds("--rebalance", arguments.rebalance),
            leave=arguments.leave,
        )
    )


def _seconds(name: str, text: str) -> float:
    amount = parse_amount(name, text, clock=True)
    if not amount.is_clock:
        raise ConfigError(f"{name} is {text!r}; give a time in s, min or h")
    return amount.seconds


def watch(options: WatchOptions) -> int:
    """Watch until the node is gone; returns 0.

    Raises:
        ConfigError: no cluster, no node of it on this machine, or no cloud.
        ElasticError: the head did not answer for `HEAD_TIMEOUT_S`.
    """
    from elastic.cluster.gcs import ClusterUnreachable, Nodes, cluster_here

    leave = threading.Event()
    with _on_sigterm(leave):
        clouds = [] if options.leave else _clouds(options)
        try:
            nodes = Nodes(options.address or cluster_here())
        except ClusterUnreachable as error:
            raise ConfigError(f"{error}; give the head's host:port as --address") from error
        node = options.node_id or _find_node(nodes, leave)
        if not options.leave:
            _print(f"watching node {node} for {' and '.join([*(f'notices of {c.name}' for c in clouds), 'SIGTERM'])}")
        if options.leave:
            leave.set()
        return _Watcher(options, nodes, node, clouds, leave).run()


def _clouds(options: WatchOptions) -> list[Cloud]:
    """The one cloud to ask for notices, or an empty list."""
    from elastic.notices.clouds import ENDPOINT, Aws, Azure, Gcp, find_cloud

    endpoint = (options.endpoint or ENDPOINT).rstrip("/")
    known: dict[str, Cloud] = {
        "aws": Aws(endpoint, options.rebalance_s),
        "gcp": Gcp(endpoint),
        "azure": Azure(endpoint),
    }
    if options.cloud == "none":
        return []
    return [find_cloud(list(known.values())) if options.cloud == "auto" else known[options.cloud]]


def _find_node(nodes: Nodes, leave: threading.Event) -> str:
    """The id of this machine's node, which may still be starting."""
    from elastic.cluster.gcs import ClusterUnreachable, own_node
    from elastic.compat.ray import address_seen_from, node_ids_here

    deadline = time.monotonic() + NODE_TIMEOUT_S
    address = address_seen_from(nodes.address)
    why = f"no living node of the cluster at {nodes.address} is on this machine ({address})"
    while time.monotonic() < deadline:
        try:
            node = own_node(nodes.alive(), node_ids_here(), address)
        except ClusterUnreachable as error:
            why, node = str(error), None
        if node is not None:
            return node
        if leave.wait(AGAIN_S):
            break
    raise ConfigError(f"{why}; start one with `ray start --address={nodes.address}`, or give --node-id")


class _Watcher:
    """Asks for notices, decides by `to_act_on`, drains; on SIGTERM it waits until the node is left."""

    def __init__(self, options: WatchOptions, nodes: Nodes, node: str, clouds: list[Cloud], leave: threading.Event):
        self._options, self._nodes, self._node, self._clouds, self._leave = options, nodes, node, clouds, leave
        self._acted_on: Notice | None = None
        self._unclear: list[str] = []
        self._answered = time.monotonic()

    def run(self) -> int:
        from elastic.notices.meaning import Notice, to_act_on

        leaving_until: float | None = None
        while self._is_alive():
            seen = self._look()
            if self._leave.is_set():
                if leaving_until is None:
                    leaving_until = time.time() + self._options.grace_s
                    _print(f"told to leave within {self._options.grace_s:g} s")
                seen = [*seen, Notice("told to leave", leaving_until)]
            notice = to_act_on(self._acted_on, seen)
            if notice is not None:
                self._drain(notice)
            if leaving_until is not None and time.time() > leaving_until:
                _print(f"node {self._node} was not left in time")
                return 0
            if leaving_until is None:
                self._leave.wait(self._options.poll_s)
            else:
                time.sleep(min(AGAIN_S, self._options.poll_s))
        _print(f"node {self._node} is gone")
        return 0

    def _look(self) -> list[Notice]:
        """The present notices. An unclear answer is printed once, and asked for again."""
        seen: list[Notice] = []
        unclear: list[str] = []
        for cloud in self._clouds:
            notices, doubts = cloud.look(time.time())
            seen, unclear = [*seen, *notices], [*unclear, *doubts]
        for doubt in unclear:
            if doubt not in self._unclear:
                _print(f"asking again, as it is not clear whether there is a notice: {doubt}")
        self._unclear = unclear
        return seen

    def _drain(self, notice: Notice) -> None:
        from elastic.cluster.gcs import ClusterUnreachable

        remaining_s = notice.deadline - time.time()
        try:
            self._nodes.drain(self._node, notice.deadline, notice.what)
        except ClusterUnreachable as error:
            _print(f"{notice.what}, {remaining_s:.0f} s left, but {error}; trying again")
            return
        self._acted_on = notice
        _print(f"{notice.what}: draining node {self._node}, {remaining_s:.0f} s left")

    def _is_alive(self) -> bool:
        """Whether the head lists the node as living. A head that does not answer may be restarting."""
        from elastic.cluster.gcs import ClusterUnreachable

        try:
            alive = self._node in self._nodes.alive()
        except ClusterUnreachable as error:
            if time.monotonic() - self._answered > HEAD_TIMEOUT_S:
                raise ElasticError(f"{error}; waited {HEAD_TIMEOUT_S:g} s for it") from error
            return True
        self._answered = time.monotonic()
        return alive


@contextmanager
def _on_sigterm(leave: threading.Event) -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda *_: leave.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", file=sys.stderr, flush=True)
