"""Fork servers of a cluster that runs already: who has one, who may use it, and how it and its forks end."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from elastic.cluster import fork_request, standing
from elastic.cluster.fork_server import differing, more_folders
from tests.forked import wait_until
from tests.test_forking import is_alive

CODE = "0123456789abcdef"
RAY_FOLDER = Path("ray", "_private", "workers")
#: A server that has imported nothing: what it does does not depend on that.
LIGHT = """
import sys
sys.path.insert(0, {root!r})
from elastic.cluster import fork_server
fork_server._import_all = lambda life: True
fork_server._LOOK_S = 0.05
fork_server.main()
"""
#: The process of a node: starts a worker for each line, as a raylet does, in a shell.
RAYLET = """
import subprocess, sys
for line in sys.stdin:
    subprocess.Popen(["bash", "-c", "exec " + line])
"""
GCS = f"10.0.0.1:{os.getpid()}"  # other tests have nodes too, beside these
WORKER = """
import json, os, sys, time
from pathlib import Path
out = Path(sys.argv[1])
umask = os.umask(0)
os.umask(umask)
def inherited():
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            yield number > 2 and os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            pass  # that of the list itself
facts = {
    "pid": os.getpid(), "parent": os.getppid(), "argv": sys.argv[1:], "umask": umask, "python": sys.executable,
    "score": int(Path("/proc/self/oom_score_adj").read_text()), "files": sorted(filter(None, inherited())),
}
out.with_suffix(".new").write_text(json.dumps(facts))
out.with_suffix(".new").rename(out)
if sys.argv[2:] == ["idle"]:  # a process of this name that does nothing
    ends = os.pipe()
    os.dup2(ends[0], 0)
    os.set_inheritable(ends[1], True)
    os.execv("/bin/cat", ["ray::IDLE"])
time.sleep(600)
"""


class Node:
    """A process that looks like a raylet of this user, and starts workers as one does."""

    def __init__(self, folder: Path, script: str = "setup_worker.py", **variables: str):
        self.folder = folder
        self.worker = folder / RAY_FOLDER / "default_worker.py"
        self.worker.parent.mkdir(parents=True, exist_ok=True)
        self.worker.write_text(WORKER)
        command = f"--python_worker_command={sys.executable} {self.worker.with_name(script)} {self.worker}"
        words = [sys.executable, "-c", RAYLET, command, f"--gcs-address={GCS}", "--node_id=ab12"]
        self.process = subprocess.Popen(
            ["raylet/raylet", *words[1:]],
            executable=sys.executable,
            stdin=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, "LD_PRELOAD": "", **variables},
            umask=0o027,
            start_new_session=True,
        )
        self.pid = self.process.pid
        wait_until(lambda: command in standing._words(self.pid), "the words of a process that has just begun")

    @property
    def server(self) -> Path:
        return Path(fork_request.server_folder(self.pid, CODE))

    def start(self, name: str, *more: str, command: str | None = None) -> Path:
        out = self.folder / name
        words = [str(self.worker), str(out), *more]
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command or standing.command(CODE)} {' '.join(words)}\n")
        self.process.stdin.flush()
        return out

    def found(self, out: Path) -> dict[str, Any]:
        wait_until(out.exists, "a worker")
        return json.loads(out.read_text())

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # those that are no forks, too
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    light = tmp_path / "fork_server.py"
    light.write_text(LIGHT.format(root=str(standing.ROOT)))
    monkeypatch.setattr(standing.fork_server, "__file__", str(light))
    found = Node(tmp_path)
    yield found
    found.close()
    wait_until(lambda: not found.server.exists(), "the end of the server with its raylet")


@pytest.mark.processes
def test_a_worker_is_a_fork_with_what_it_was_started_with_and_nothing_of_the_servers(node: Node) -> None:
    assert standing.raylets_here(GCS) == {node.pid: "ab12"}
    assert standing.serve(node.pid, CODE, 600)
    assert standing.serve(node.pid, CODE, 600)  # there is one
    first, second = node.found(node.start("first", "x")), node.found(node.start("second"))
    assert first["parent"] == second["parent"] not in (node.pid, os.getpid())
    assert first["argv"] == [str(node.folder / "first"), "x"]
    assert first["umask"] == 0o027
    assert first["score"] == int(Path("/proc/self/oom_score_adj").read_text())
    assert not [f for f in first["files"] if "lock" in f or "socket" in f or "pidfd" in f]
    assert {p.stat().st_mode & 0o777 for p in (node.server.parent, node.server, node.server / "socket")} <= {
        0o700,
        0o600,
    }
    os.kill(first["pid"], signal.SIGKILL)  # as a raylet ends a worker: by the id with which it has registered
    wait_until(lambda: not is_alive(first["pid"]), "the end of a worker")
    assert is_alive(second["pid"])
    node.close()
    wait_until(lambda: not is_alive(second["pid"]) and not is_alive(second["parent"]), "the end with the raylet")


@pytest.mark.processes
def test_where_no_server_answers_workers_start_as_ray_starts_them(
    node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone = node.found(node.start("alone"))
    assert alone["parent"] == node.pid
    moved = standing.command(CODE).replace(str(fork_request.__file__), "/nowhere/fork_request.py")
    elsewhere = node.found(node.start("elsewhere", "y", command=moved))
    assert (elsewhere["parent"], elsewhere["argv"][1:]) == (node.pid, ["y"])
    assert elsewhere["python"] == sys.executable
    assert standing.serve(node.pid, CODE, 600)
    changed = node.found(node.start("changed", command=f"env OTHER=1 {standing.command(CODE)}"))
    assert changed["parent"] == node.pid
    fork = node.found(node.start("fork"))
    server = fork["parent"]
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: not is_alive(server), "the end of the server")
    assert is_alive(fork["pid"])  # workers that train go on
    os.kill(fork["pid"], signal.SIGKILL)
    assert node.found(node.start("after"))["parent"] == node.pid
    assert standing.serve(node.pid, CODE, 600)
    assert node.found(node.start("again"))["parent"] not in (server, node.pid)


@pytest.mark.processes
def test_a_server_that_nobody_needs_ends_its_idle_forks_and_itself_but_not_while_one_works(node: Node) -> None:
    assert standing.serve(node.pid, CODE, 0.3)
    busy = node.found(node.start("busy"))
    idle = node.found(node.start("idle", "idle"))
    looks = _wakes(busy["parent"])
    wait_until(lambda: _wakes(busy["parent"]) > looks, "looks of the server, at which nothing is to happen")
    assert all(is_alive(p) for p in (busy["pid"], idle["pid"], busy["parent"])), "idle forks may hold objects"
    os.kill(busy["pid"], signal.SIGKILL)
    wait_until(lambda: not is_alive(idle["pid"]), "the end of a fork without work")
    wait_until(lambda: not is_alive(busy["parent"]), "the end of a server without forks")
    assert not node.server.exists()


@pytest.mark.processes
def test_what_a_fork_would_not_have_as_the_raylets_workers_have_it_is_no_fork(node: Node, tmp_path: Path) -> None:
    assert standing.serve(node.pid, CODE, 600)
    limited = f"bash -c 'ulimit -l 16; exec \"$@\"' bash {standing.command(CODE)}"
    assert node.found(node.start("limited", command=limited))["parent"] == node.pid
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to(sys.executable)
    own = f"env VIRTUAL_ENV={tmp_path / 'venv'} {standing.command(CODE)}"
    found = node.found(node.start("own", "x", command=own))
    assert (found["parent"], found["python"]) == (node.pid, str(tmp_path / "venv" / "bin" / "python"))
    assert found["argv"] == [str(node.folder / "own"), "x"]


@pytest.mark.processes
def test_a_worker_whose_asker_has_given_up_is_not_forked(node: Node) -> None:
    assert standing.serve(node.pid, CODE, 600)
    server = node.found(node.start("first"))["parent"]
    os.kill(server, signal.SIGSTOP)
    out = node.folder / "late"
    request = fork_request.requested([str(node.worker), str(out)])
    assert request is not None
    request["environment"] = {k.decode(): v.decode() for k, v in standing._of_workers(node.pid).items()}
    data = json.dumps(request | {"raylet": node.pid}).encode()
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(node.server / "socket"))
        socket.send_fds(link, [len(data).to_bytes(4, "big")], [1, 2])
        link.sendall(data)
    os.kill(server, signal.SIGCONT)
    assert node.found(node.start("second"))["parent"] == server
    wait_until(lambda: "not forked" in (node.server / "log").read_text(), "what the server says")
    children = Path(f"/proc/{server}/task/{server}/children")
    wait_until(lambda: len(children.read_text().split()) == 2, "the end of a fork that nobody waits for")
    assert not out.exists()


def test_folders_of_servers_that_live_elsewhere_are_left_alone(tmp_path: Path) -> None:
    gone, lives, mine = (tmp_path / f"fork-{n}-1-{CODE}" for n in (4194305, 4194306, 4194307))
    for folder in (gone, lives, mine, tmp_path / "fork-of-mine", tmp_path / "fork-x-y-z"):
        folder.mkdir()
        (folder / "lock").touch()
    with (lives / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        standing._clear(mine)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([lives.name, mine.name, "fork-of-mine", "fork-x-y-z"])


def _wakes(process: int) -> int:
    """How often it has run, in tens: nothing but its own looks wakes it here."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[2]) // 10


@pytest.mark.processes
def test_raylets_whose_workers_are_others_than_rays_have_no_server(tmp_path: Path) -> None:
    node = Node(tmp_path, script="fork_request.py")  # as on an embedded cluster
    try:
        assert not standing.serve(node.pid, CODE, 600)
        assert not node.server.exists()
    finally:
        node.close()
    assert not standing.serve(node.pid, CODE, 600)


def test_a_folder_that_others_can_enter_is_not_trusted(tmp_path: Path) -> None:
    assert fork_request.is_private(str(tmp_path)) == (tmp_path.stat().st_mode & 0o077 == 0)
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path)
    assert not any(fork_request.is_private(str(tmp_path / name)) for name in ("open", "link", "absent"))


def test_folders_before_those_of_the_server_can_be_added_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").touch()
    hooks = str(tmp_path / "hooks")
    assert more_folders({}, {"PYTHONPATH": "/job"}) == ["/job"]
    assert more_folders({"PYTHONPATH": "/a"}, {"PYTHONPATH": "/job:/a"}) == ["/job"]
    assert more_folders({"PYTHONPATH": "/a"}, {"PYTHONPATH": "/a:/job"}) is None
    assert more_folders({"PYTHONPATH": "/a"}, {}) is None
    assert more_folders({}, {"PYTHONPATH": hooks}) is None
    assert differing({}, {"PYTHONPATH": hooks}) == ["PYTHONPATH"]
    assert differing({}, {"PYTHONPATH": "/job", "LD_PRELOAD": ""}) == []


def test_the_fingerprint_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(standing.ROOT / "elastic" / "cluster", tmp_path / "elastic" / "cluster")
    monkeypatch.setattr(standing, "ROOT", tmp_path)
    before = standing.fingerprint()
    assert standing.fingerprint() == before
    (tmp_path / "elastic" / "cluster" / "new.py").touch()
    assert standing.fingerprint() != before
