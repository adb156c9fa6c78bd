"""Workers of an embedded cluster are forks: what is asked for, what is refused, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic.cluster import fork_request
from elastic.cluster.fork_server import differing
from elastic.cluster.forking import Forking
from tests.forked import wait_until

RAY_FOLDER = Path("ray", "_private", "workers")
WORKER = """
import json, os, sys, time
from pathlib import Path
first = sys.path[0]
from ray._raylet import ActorClassID
import numpy, torch

out = Path(sys.argv[1])
facts = {
    "pid": os.getpid(), "group": os.getpgid(0), "parent": os.getppid(), "argv": sys.argv,
    "path": first, "folder": os.getcwd(),
    "variable": os.environ.get("OF_THE_RAYLET"), "id": ActorClassID.from_random().hex(), "name": __name__,
    "number": float(numpy.random.rand()), "niceness": os.getpriority(os.PRIO_PROCESS, 0),
}
out.with_suffix(".new").write_text(json.dumps(facts))
out.with_suffix(".new").rename(out)
print("printed", flush=True)
time.sleep(600)
"""


class Server:
    """A fork server, and a folder like Ray's with a worker that tells what it finds."""

    def __init__(self, forking: Forking, folder: Path):
        self._forking, self._folder, self._environment = forking, folder, dict(os.environ)
        self.script = folder / RAY_FOLDER / "default_worker.py"
        self.script.parent.mkdir(parents=True)
        self.script.write_text(WORKER)
        self.script.with_name("setup_worker.py").write_text("import sys; print('ordinary', *sys.argv[1:])")

    def ask(self, *more: str, raylet: bool = False, **variables: str) -> subprocess.Popen[str]:
        """Ask for a worker, as a raylet does.

        Args:
            raylet: the request has a parent of its own, which ends when its standard input does.
        """
        command = [sys.executable, fork_request.__file__, str(self.script), *more]
        if raylet:
            command = ["sh", "-c", '"$@"; read line', "raylet", *command]
        environment = {**self._environment, fork_request.SOCKET: self._forking.path, **variables}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=environment, cwd=self._folder, **pipes)

    def worker(self, name: str, raylet: bool = False, **variables: str) -> dict[str, Any]:
        """What a worker found that was asked for."""
        out = self._folder / name
        asked = self.ask(str(out), raylet=raylet, **variables)
        wait_until(out.exists, "a forked worker")
        return {**json.loads(out.read_text()), "asked": asked}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Forking() as forking:
        with forking.nodes():
            pass  # as if a cluster had started
        yield Server(forking, tmp_path_factory.mktemp("ray"))


def is_alive(pid: int) -> bool:
    try:
        return b") Z" not in Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError:
        return False


@pytest.mark.processes
def test_workers_are_forks_that_find_what_they_were_asked_for_with(server: Server) -> None:
    first, second = server.worker("first"), server.worker("second", RAY_JOB_ID="7")
    assert first["parent"] == second["parent"] != os.getpid()
    assert first["argv"] == [str(server.script), str(server.script.parents[3] / "first")]
    assert first["path"] == str(server.script.parent)
    assert first["name"] == "__main__"
    assert first["folder"] == str(server.script.parents[3])
    assert first["niceness"] == os.getpriority(os.PRIO_PROCESS, 0)
    assert first["id"] != second["id"]
    assert first["number"] != second["number"]
    for found in (first, second):
        assert found["group"] == found["pid"]  # Ray ends the group of a worker that has ended
        assert found["asked"].stdout.readline() == "printed\n"
        os.kill(found["pid"], signal.SIGKILL)


@pytest.mark.processes
def test_a_worker_ends_with_its_raylet_and_all_end_with_the_driver(server: Server, tmp_path: Path) -> None:
    one, other = server.worker("one", raylet=True), server.worker("other", raylet=True)
    one["asked"].kill()
    wait_until(lambda: not is_alive(one["pid"]), "the end of a worker whose raylet was killed")
    assert is_alive(other["pid"])
    changed = server.ask("x", LD_PRELOAD="", OF_THE_RAYLET="read at the start")
    assert changed.communicate()[0] == f"ordinary {server.script} x\n"
    server._forking.close()
    assert not is_alive(other["pid"])
    other["asked"].kill()
    for asked in (one["asked"], other["asked"]):
        asked.wait()
    assert server.ask("y").communicate()[0] == f"ordinary {server.script} y\n"


@pytest.mark.processes
def test_a_server_that_is_not_needed_ends_at_once() -> None:
    before = time.monotonic()
    Forking().close()
    assert time.monotonic() - before < 1  # its imports take longer


def context(**values: Any) -> str:
    usual = {"command_prefix": [], "env_vars": {}, "py_executable": sys.executable, "java_jars": []}
    return f"--serialized-runtime-env-context={json.dumps({**usual, **values})}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["-s", "/x/ray/_private/workers/default_worker.py"],  # flags of Python
        ["/x/other.py"],
        [],
        ["/x/ray/_private/workers/default_worker.py", "--language=JAVA"],
        ["/x/ray/_private/workers/default_worker.py", context(env_vars={"A": "1"})],
        ["/x/ray/_private/workers/default_worker.py", context(command_prefix=["cd /x &&"])],
        ["/x/ray/_private/workers/default_worker.py", context(py_executable="/other/python")],
        ["/x/ray/_private/workers/default_worker.py", context(override_worker_entrypoint="/in/a/container.py")],
    ],
)
def test_what_only_rays_script_can_do_is_left_to_it(arguments: list[str]) -> None:
    assert fork_request.requested(arguments) is None


def test_a_request_has_what_a_process_inherits() -> None:
    worker = "/x/ray/_private/workers/default_worker.py"
    found = fork_request.requested([worker, "--a=1", context(), "--language=PYTHON"])
    assert found is not None
    assert found["command"] == [worker, "--a=1"]
    assert found["folder"] == os.getcwd()
    assert found["raylet"] == os.getppid()


def test_variables_that_a_process_reads_when_it_starts_count_and_those_of_ray_do_not() -> None:
    assert differing({"A": "1"}, {"A": "1", "RAY_JOB_ID": "7"}) == []
    assert differing({"A": "1", "B": "2"}, {"A": "2"}) == ["A", "B"]
