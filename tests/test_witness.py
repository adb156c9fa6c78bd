"""A worker that dies is known to have died at once, by a process beside it that ends its connection."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(60)]


class Worker:
    """A worker and the server's end of its connection. This process keeps all that the worker has open after its death,
    as the kernel does while it frees the worker's memory."""

    def __init__(self) -> None:
        server = socket.create_server(("127.0.0.1", 0))
        self.kept = socket.create_connection(server.getsockname())
        self.connection, _ = server.accept()
        self.connection.settimeout(20)
        server.close()
        ours, theirs = socket.socketpair()
        descriptors = [self.kept.fileno(), theirs.fileno()]
        command = [sys.executable, "-m", "tests.witnessed_worker", *map(str, descriptors)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, pass_fds=descriptors, text=True, **pipes)  # type: ignore[call-overload]
        theirs.close()
        with ours:
            _, self.also_kept, _, _ = socket.recv_fds(ours, 1, 1)
        knows, pid = self.process.stdout.readline().split()
        assert knows == "True"
        self.witness = int(pid)

    def does(self, what: str) -> str:
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.connection.close()
        self.kept.close()
        for descriptor in self.also_kept:
            os.close(descriptor)


@pytest.fixture
def worker() -> Iterator[Worker]:
    found = Worker()
    yield found
    found.close()


def test_the_connection_of_a_killed_worker_ends_though_another_process_holds_it_open(worker: Worker):
    assert (worker.does("send"), worker.connection.recv(1)) == ("1", b"x")
    worker.process.kill()
    assert worker.connection.recv(1) == b""


def test_a_worker_outlives_its_witness_and_hears_of_its_death(worker: Worker):
    os.kill(worker.witness, signal.SIGKILL)
    while worker.does("have") == "True":  # until the kernel has ended it
        pass
    assert worker.does("anew") == "True"
    assert (worker.does("send"), worker.connection.recv(1)) == ("1", b"x")


def test_a_witness_that_is_ended_leaves_the_connection_as_it_is(worker: Worker):
    assert worker.does("end") == "ended"
    with pytest.raises(ProcessLookupError):
        os.kill(worker.witness, 0)
    assert (worker.does("send"), worker.connection.recv(1)) == ("1", b"x")
    worker.connection.settimeout(0.3)
    with pytest.raises(TimeoutError):
        worker.connection.recv(1)
