"""Gloo's network interface, and the sockets that it opened, to be shut down when a world breaks.

Gloo has no working abort (measured: it returns at once, and the collective waits out its time-out). Shutting down
its connected sockets makes blocked collectives raise at once, also inside DDP; of those that gloo forgets to tell see
`parallel/gloo.py`. A listening socket must never be touched: that ends the process. While members connect, one of each
two listens for the other; if that one is dead by then, gloo waits for it to the end of its time-out (measured: 30 of
30 s), so somebody else comes in its place and goes.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

KNOCK_S = 1.0
_SIOCGIFADDR = 0x8915  # netdevice(7)


def use_interface_of(address: str) -> None:
    """Let gloo listen on the interface that has this IPv4 address, unless the user named one.

    Left alone it takes the address of the host's name, which on many machines is a loopback address that no other
    host can reach.
    """
    interface = interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str | None:
    """The network interface whose first IPv4 address this is, or None where no interface has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                request = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(request[20:24]) == address:
                return name
    return None


def open_sockets() -> dict[str, int]:
    """This process's sockets: inode name -> file descriptor."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:  # closed while we looked
            continue
        if target.startswith("socket:"):
            found[target] = int(name)
    return found


def opened_since(before: dict[str, int]) -> dict[str, int]:
    """Sockets that came since `before` was taken."""
    return {inode: fd for inode, fd in open_sockets().items() if inode not in before}


def shut_down(sockets: dict[str, int]) -> int:
    """Shut down those that are still the same sockets and do not listen; returns how many."""
    count = 0
    for duplicate, listens in _streams(sockets):
        if not listens:
            with suppress(OSError):  # already closed by the other side
                duplicate.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def any_connected(sockets: dict[str, int]) -> bool:
    """Whether any is still the same socket and does not listen."""
    return any(not listens for _, listens in _streams(sockets))


def knock(sockets: dict[str, int], size: int) -> int:
    """Come to each that listens as the members that it waits for, and go at once; returns how many came.

    Gloo tells who comes by a number that it handed out for each member: they count from 0 for each listening socket
    (gloo/transport/tcp/listener.cc), and are the first 8 bytes of a connection.

    Args:
        size: members of the group.
    """
    count = 0
    for duplicate, listens in _streams(sockets):
        if not listens:
            continue
        for number in range(size):
            with suppress(OSError), socket.create_connection(duplicate.getsockname()[:2], KNOCK_S) as caller:
                caller.sendall(struct.pack("=q", number))
                count += 1
    return count


def _streams(sockets: dict[str, int]) -> Iterator[tuple[socket.socket, bool]]:
    """Of those that are still the same, duplicates of the TCP sockets, and whether they listen."""
    now = open_sockets()
    for inode, fd in sockets.items():
        if now.get(inode) != fd:
            continue
        try:
            duplicate = socket.socket(fileno=os.dup(fd))
        except OSError:  # closed while we looked
            continue
        with duplicate:
            if duplicate.family in (socket.AF_INET, socket.AF_INET6) and duplicate.type == socket.SOCK_STREAM:
                yield duplicate, bool(duplicate.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
