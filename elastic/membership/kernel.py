"""Asks the kernel whether the machine of a silent worker answers: a kernel acknowledges packets for every live process.

A process that ends or is killed closes its connection. A process that is stopped, or whose interpreter lock is held,
sends nothing, but its kernel goes on acknowledging packets, among them keep-alive probes (RFC 9293). On a machine that
is gone or cut off nothing acknowledges them.
"""

from __future__ import annotations

import math
import socket
import struct

PROBES = 127  # most unanswered probes that Linux allows before it ends the connection
MOST_S = 32767  # longest interval between two probes that Linux allows
_LAST_ANSWER = struct.Struct("=I")
_LAST_ANSWER_AT = 56  # tcpi_last_ack_recv in struct tcp_info, milliseconds


def watch(connection: socket.socket, lease_s: float) -> float:
    """Probe the peer whenever it is silent, seldom enough that a connection outlives a silence as long as the lease.

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
