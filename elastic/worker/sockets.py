"""Gloo's network interface, and the sockets that it opened, which are shut down when a world breaks.

Gloo has no working abort (measured: it returns at once, and the collective waits until its time-out). Shutting down its
connected sockets makes blocked collectives raise at once, also inside DDP; for the operations that gloo does not end
even then, see `parallel/gloo.py`. A listening socket must never be shut down: that ends the process. While members
connect, one of each two listens for the other. If the other is dead by then, gloo waits for it until its time-out
(measured: 30 of 30 s); so this process connects in its place and closes at once.
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
    """Have gloo listen on the interface that has this IPv4 address, unless the user named one.

    By default it takes the address of the host's name, which on many machines is a loopback address that other hosts
    cannot reach.
    """
    interface = interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str | None:
    """The network interface whose first IPv4 address this is; None if no interface has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                request = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # the interface has no IPv4 address
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
    """Sockets that were opened after `before` was taken."""
    return {inode: fd for inode, fd in open_sockets().items() if inode not in before}


def shut_down(sockets: dict[str, int]) -> int:
    """Shut down those that are open as the same sockets and do not listen; returns how many."""
    count = 0
    for duplicate, listens in _streams(sockets):
        if not listens:
            with suppress(OSError):  # the other side has closed it already
                duplicate.shutdown(socket.SHUT_RDWR)
                count += 1
    return count


def any_connected(sockets: dict[str, int]) -> bool:
    """Whether any of them is open as the same socket and does not listen."""
    return any(not listens for _, listens in _streams(sockets))


def knock(sockets: dict[str, int], size: int) -> int:
    """Connect to each listening socket in place of each member that it may wait for, and close at once.

    Gloo identifies a connecting member by a number that it handed out: the numbers count from 0 for each listening
    socket (gloo/transport/tcp/listener.cc), and are the first 8 bytes of a connection.

    Args:
        size: number of the group's members.

    Returns:
        how many connections were accepted.
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
    """Duplicates of those that are open as the same TCP sockets, and whether each listens."""
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
