"""`ray job submit` from a user's own folder to a cluster that has only the wheel, and asks for a token."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic import cli
from elastic.checkpoint.reader import newest_first
from elastic.observe.ledger import EVENTS, METRICS, gaps_and_doubles, kept_history, read_records
from elastic.storage import Storage
from jobs.bench.nodes import Command, free_port
from tests.own_cluster import OwnCluster, install_wheel
from tests.ray_cluster import wait_until

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(480)]
TOKEN = "the-token-of-this-cluster"
#: `ray job`, without the rest of the command `ray`, which imports Ray Serve for seconds.
JOB = "from ray.dashboard.modules.job.cli import job_cli_group; job_cli_group(prog_name='ray job')"
FAST_STOP = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "0"}})


class JobApi:
    """The `ray job` commands against one cluster, run in one user's folder."""

    def __init__(self, url: str, folder: Path, address: str):
        self._url, self._folder, self.address = url, folder, address

    def start(self, *arguments: str, token: str = TOKEN) -> Command:
        """A command under way. The test's Python runs it: that of Ray's script is the same."""
        return Command(
            "-c",
            JOB,
            arguments[0],
            "--address",
            self._url,
            *arguments[1:],
            cwd=self._folder,
            environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PYTHONPATH": ""},
        )

    def submit(self, name: str, *arguments: str, options: tuple[str, ...] = ()) -> Command:
        """Submit the job of the folder as the user would, under this submission id."""
        return self.start(
            "submit", "--submission-id", name, "--working-dir", ".", *options, "--", "python", "job.py", *arguments
        )


@pytest.fixture
def api(tmp_path: Path) -> Iterator[JobApi]:
    """A cluster with dashboard and token, and a user's folder with one job in it."""
    parts = ("dashboard", "dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "ray-client-server")
    ports = {part: free_port() for part in parts}
    folder = tmp_path / "user"
    folder.mkdir()
    job = folder / "job.py"
    assert cli.main(["init", str(job)]) == 0
    job.write_text(job.read_text().replace("    elastic.main", "    print(elastic.__file__)\n    elastic.main"))
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "PYTHONPATH": str(install_wheel(tmp_path)),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    options = ("--num-cpus=2", "--dashboard-host=127.0.0.1", *(f"--{part}-port={port}" for part, port in ports.items()))
    with OwnCluster(*options, environment=environment) as cluster:
        yield JobApi(f"http://127.0.0.1:{ports['dashboard']}", folder, cluster.address)
        while Command.started:
            Command.started.pop().end()


def newest_step(run: Path) -> int:
    """Step of the newest committed checkpoint; 0 for none."""
    found = next(newest_first(Storage(str(run))), None)
    return found.step if found else 0


def test_a_job_is_submitted_stopped_with_and_without_time_to_save_and_resumed(api: JobApi, tmp_path: Path) -> None:
    storage, run = tmp_path / "runs", tmp_path / "runs" / "mine"
    options = (
        "--run.storage",
        str(storage),
        "--run.name",
        "mine",
        "--run.duration",
        "100000st",
        "--checkpoint.every",
        "25st",
        "--observe.log-every",
        "0.2",
    )

    # it is submitted, and killed at once when something is committed: that is there, and nothing else is said
    first = api.submit("first", *options, options=("--no-wait", "--runtime-env-json", FAST_STOP))
    assert first.wait() == 0, first.output
    logs = api.start("logs", "-f", "first")
    logs.wait_for_step(1)
    wait_until(lambda: newest_step(run) > 0)
    assert api.start("stop", "first").wait() == 0
    logs.wait()
    assert str(tmp_path / "installed" / "elastic") in logs.output
    # "parked" if the host saw its workers die before it died itself
    assert json.loads((run / "status.json").read_text())["status"] in ("running", "parked")
    committed = newest_step(run)

    # the same name goes on, and a terminal's lines come back; this time it has the time to save when it is stopped
    second = api.submit("second", *options)
    second.wait_for_step(committed + 10)
    stopped = api.start("stop", "second")
    assert stopped.wait() == 0, stopped.output
    assert second.wait() == 0, second.output
    assert "saving and ending" in second.output
    assert "was stopped" in second.output
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "stopped"

    # no step is missing, none counts twice
    history = kept_history(read_records(Storage(str(run)), METRICS))
    assert gaps_and_doubles(read_records(Storage(str(run)), METRICS), 64) == []
    assert history[-1]["step"] == newest_step(run) == status["step"] >= committed + 10
    events = list(read_records(Storage(str(run)), EVENTS))
    restored = [e["step"] for e in events if e["kind"] == "restored" and e["step"]]
    first = [e for e in events if e["kind"] == "checkpoint_committed" and e["generation"].startswith("1-")]
    assert restored[-1] == first[-1]["step"] >= committed, "its host may have lived to commit one more"

    # bad input ends the job with its exit code and one sentence; who has no token has no cluster
    bad = api.submit("bad", *options, "--run.seed", "5")
    assert bad.wait() == 1, bad.output
    assert "exit code 2" in bad.output
    assert "error: --run.seed is 5, but run mine was started with 0" in bad.output
    stranger = api.start("list", token="another")
    assert stranger.wait() != 0
    assert "second" not in stranger.output

    # who joins as a driver is let in with the token alone, and told so in one sentence
    check = f"from elastic.cluster.embedded import check_answers; check_answers({api.address!r})"
    for token, code in ((TOKEN, 0), ("another", 1)):
        joined = Command("-c", check, environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})
        assert joined.wait() == code, joined.output
    assert "ConfigError: --cluster.address is " in joined.lines[-1]
    assert ".cc:" not in joined.output
    assert "the cluster wants a token, and this process has none or another one" in joined.lines[-1]
