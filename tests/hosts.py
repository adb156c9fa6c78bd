"""Hosts on one machine: network namespaces with addresses of their own, joined by a switch whose ports can be cut.

    with Hosts() as hosts:
        a, b = hosts.add(), hosts.add()
        process = a.popen("python", "-m", "http.server", "--bind", a.address)
        hosts.cut(a)   # packets are dropped: no connection is reset, nobody is told
        hosts.heal(a)
        hosts.kill(b)  # every process there

The switch lies in a namespace too, so nothing of this is seen outside, and deleting the namespaces removes it all.
Hosts share files and process ids with the machine. Needs root and iproute2: see `missing`.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

_NAMES = itertools.count()
_CLONE_NEWNET = 0x40000000
_KILL_TIMEOUT_S = 10.0


def missing() -> str | None:
    """Why there can be no hosts here, or None."""
    if shutil.which("ip") is None:
        return "network namespaces need the command ip (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"elastic-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, timeout=30)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    try:
        linked = subprocess.run(
            ["ip", "-n", probe, "link", "add", "port", "type", "veth"], capture_output=True, text=True, timeout=30
        )
    finally:
        _ip("netns", "del", probe)
    return f"links cannot be made here: {linked.stderr.strip()}" if linked.returncode else None


def enter(namespace: str) -> None:
    """Be in this network namespace, with the threads and processes that this thread starts from now on."""
    handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        _set_namespace(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Host:
    """A host: its name (that of its namespace), its address, and its port at the switch."""

    name: str
    address: str
    port: str

    def command(self, *command: str) -> list[str]:
        """A command as it is run on this host; its process id is that of the process it starts."""
        return ["ip", "netns", "exec", self.name, *command]

    def popen(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command(*command), **options)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, and those and the processes that it starts, are on this host."""
        outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            enter(self.name)
            yield
        finally:
            _set_namespace(outside)
            os.close(outside)

    def answer_to(self, address: str) -> None:
        """Have a further address, which no other host sees."""
        _ip("-n", self.name, "address", "add", f"{address}/32", "dev", "lo")

    def pids(self) -> set[int]:
        """Processes on this host, without the one that asks."""
        found = _ip("netns", "pids", self.name).split()
        return set(map(int, found)) - {os.getpid()}


@dataclass
class Hosts:
    """A switch and the hosts at it. As a context manager it leaves neither processes nor namespaces behind."""

    network: str = "10.77.0"
    all: list[Host] = field(default_factory=list)

    def __enter__(self) -> Hosts:
        self._prefix = f"elastic-{os.getpid()}-{next(_NAMES)}"
        self._switch = f"{self._prefix}-switch"
        self._numbers = itertools.count(1)
        _ip("netns", "add", self._switch)
        try:
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
        except BaseException:
            _ip("netns", "del", self._switch)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for host in list(self.all):
                self.remove(host)
        finally:
            _ip("netns", "del", self._switch)

    def add(self) -> Host:
        """A new host with no process."""
        number = next(self._numbers)
        host = Host(f"{self._prefix}-{number}", f"{self.network}.{number}", f"port{number}")
        _ip("netns", "add", host.name)
        self.all.append(host)
        _ip("-n", self._switch, "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        _ip("-n", self._switch, "link", "set", host.port, "master", "bridge", "up")
        _ip("-n", host.name, "link", "set", "lo", "up")
        _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.name, "link", "set", "eth0", "up")
        return host

    def cut(self, host: Host) -> None:
        """Drop whatever goes to the host and comes from it."""
        _ip("-n", self._switch, "link", "set", host.port, "down")

    def heal(self, host: Host) -> None:
        """Join it again."""
        _ip("-n", self._switch, "link", "set", host.port, "up")

    def kill(self, host: Host) -> None:
        """SIGKILL of every process on the host, as when its power fails, except that their peers are told."""
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        while pids := {pid for pid in host.pids() if not _ended(pid)}:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {pids} on {host.name} did not end within {_KILL_TIMEOUT_S:.0f} s")
            time.sleep(0.02)

    def remove(self, host: Host) -> None:
        """Kill it and take it away."""
        try:
            self.kill(host)
        finally:
            self.all.remove(host)
            _ip("netns", "del", host.name)


def _ended(pid: int) -> bool:
    """Whether a process ended, though its parent has not asked for its exit code."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _set_namespace(handle: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(handle, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
