"""The fork server of an embedded cluster, as its driver uses it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elastic.cluster.fork_request import SOCKET

_END_S = 10.0


class Forking:
    """Starts the server, which imports for seconds: the sooner the better, since it does so while this process goes on.
    Where it cannot be, workers start as Ray starts them.
    """

    def __init__(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="elastic-fork-")  # only this user can enter it
        self.path = str(Path(self._folder, "socket"))
        self._process: subprocess.Popen[bytes] | None = None
        self._used = False
        if not hasattr(os, "pidfd_open"):
            return
        with socket.socket(socket.AF_UNIX) as listening:
            try:
                listening.bind(self.path)
            except OSError:  # the path is too long
                return
            listening.listen(128)
            with Path(self._folder, "log").open("wb") as log:
                script = str(Path(__file__).with_name("fork_server.py"))
                self._process = subprocess.Popen(
                    [sys.executable, script, str(listening.fileno()), self._folder],
                    env=dict(os.environ),  # as Ray gives it to a node: without what C libraries added
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=[listening.fileno()],
                    start_new_session=True,  # no terminal ends it: this process does
                )

    @contextmanager
    def nodes(self) -> Iterator[None]:
        """Nodes that are started inside get their workers from the server, if there is one."""
        from elastic.compat.ray import bare_nodes  # it imports Ray: the server starts before

        script = str(Path(__file__).with_name("fork_request.py")) if self._process is not None else None
        self._used = True
        os.environ[SOCKET] = self.path
        try:
            with bare_nodes(script):
                yield
        finally:
            del os.environ[SOCKET]

    def __enter__(self) -> Forking:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server and what it forked. To be called when the cluster has ended."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            if not self._used:
                self._process.kill()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        shutil.rmtree(self._folder, ignore_errors=True)
