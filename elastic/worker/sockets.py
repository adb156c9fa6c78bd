"""Gloo's network interface, and the sockets that it opened, to be shut down when a world breaks.

Gloo has no working abort (measured: it returns at once, and the collective waits out its time-out). Shutting down
its connected sockets makes every blocked collective raise at once, also inside DDP. A listening socket must never be
touched: that ends the process.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

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
    """Shut down those that are still the same sockets and have a peer; returns how many."""
    now, count = open_sockets(), 0
    for inode, fd in sockets.items():
        if now.get(inode) != fd:
            continue
        try:
            duplicate = socket.socket(fileno=os.dup(fd))
        except OSError:
            continue
        try:
            duplicate.getpeername()
            duplicate.shutdown(socket.SHUT_RDWR)
            count += 1
        except OSError:  # a listener, or already closed
            pass
        finally:
            duplicate.close()
    return count
