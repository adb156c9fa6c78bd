"""The sockets that gloo opened, to be shut down when a world breaks.

Gloo has no working abort (measured: it returns at once, and the collective waits out its time-out). Shutting down
its connected sockets makes every blocked collective raise at once, also inside DDP. A listening socket must never be
touched: that ends the process.
"""

from __future__ import annotations

import os
import socket


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
