"""Whether the machine of a silent worker answers: its kernel does so for every process that lives.

A process that ends, or is killed, closes its connection. One that is stopped, or whose interpreter's lock is held,
says nothing, but its kernel goes on acknowledging what comes, probes (RFC 9293, keep-alive) among it. Nobody does that
on a machine that is gone or cut off.
"""

from __future__ import annotations

import math
import socket
import struct

PROBES = 127  # the most that Linux lets go unanswered before it ends the connection
MOST_S = 32767  # between two probes, of Linux too
_LAST_ANSWER = struct.Struct("=I")
_LAST_ANSWER_AT = 56  # tcpi_last_ack_recv in struct tcp_info, milliseconds


def watch(connection: socket.socket, lease_s: float) -> float:
    """Have the peer probed whenever it says nothing; who says nothing for the lease must not lose its connection by it.

    Returns:
        seconds between two probes.
    """
    every_s = min(MOST_S, max(1, math.ceil(2 * lease_s / PROBES)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, every_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, every_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    return float(every_s)


def silence_s(connection: socket.socket) -> float:
    """Seconds since the peer's kernel acknowledged anything, infinite if the connection is closed."""
    try:
        information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        return math.inf
    return float(_LAST_ANSWER.unpack_from(information, _LAST_ANSWER_AT)[0]) / 1000.0
