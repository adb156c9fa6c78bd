"""On a cluster that `ray start` left running, actors are forks of their node's server, and Ray sees them end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.own_cluster import OwnCluster

DRIVE = """
import os, signal, sys, time
from pathlib import Path
import ray
from elastic.cluster.forks import forks_here
from elastic.cluster.standing import raylets_here
from elastic.compat.ray import prestart_workers, process_ended

class Actor:
    def facts(self):
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        return os.getpid(), b"fork_server.py" in parent, "torch" in sys.modules, "ray.train" in sys.modules

def start(options):
    return ray.remote(Actor).options(num_cpus=0, **options).remote()

def waiting(of_actors):
    # a process that Ray has started ahead
    before, address = idle(), f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    prestart_workers(address, options["runtime_env"], 1, 600.0, 5.0, of_actors=of_actors)
    deadline = time.monotonic() + 60
    while not idle() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    return idle() - before

def idle():
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    return {p for p in pids if is_idle(p)}

def is_idle(pid):
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        return words.startswith(b"ray::IDLE") and b"fork_server.py" in Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return False

address = sys.argv[1]
ray.init(address=address, log_to_driver=False)
node = ray.nodes()[0]
forks = forks_here(600.0, 2)
options = forks.options(node["NodeID"])
assert options and forks.has([node["NodeID"]]) and not forks.has([node["NodeID"], "another"])
actor = start(options)
pid, forked, torch, _ = ray.get(actor.facts.remote())
assert forked and torch
os.kill(pid, signal.SIGKILL)
began = time.monotonic()
try:
    while True:
        ray.get(actor.facts.remote())
except ray.exceptions.ActorDiedError as error:
    assert process_ended(error)
print("seen after", time.monotonic() - began)
ahead = waiting(of_actors=False)
ray.shutdown()

ray.init(address=address, log_to_driver=False)  # another job
pid, _, torch, train = ray.get(start(options).facts.remote())
assert pid in ahead and torch and train, (pid, ahead, torch, train)

# an actor with this environment makes another: Ray writes its environment otherwise
class Maker(Actor):
    def made(self, options):
        self.one = start(options)
        return ray.get(self.one.facts.remote())

maker = ray.remote(Maker).options(num_cpus=0, **options).remote()
ray.get(maker.facts.remote())
ahead = waiting(of_actors=True)
pid, _, torch, train = ray.get(maker.made.remote(options))
assert pid in ahead and torch and train, (pid, ahead, torch, train)
print("used")
"""


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_an_actor_is_a_fork_whose_death_ray_sees_and_the_next_job_finds_one_that_waits(tmp_path: Path) -> None:
    script = tmp_path / "drive.py"
    script.write_text(DRIVE)
    environment = {"RAY_AUTH_MODE": "disabled"}
    with OwnCluster("--num-cpus=2", "--include-dashboard=false", environment=environment) as cluster:
        command = [sys.executable, str(script), cluster.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("used\n")
