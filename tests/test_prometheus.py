"""A live run's figures, as Prometheus gets them: without a token, and from this machine. Where Debian's Prometheus is
installed, a real one scrapes them."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from elastic.run.prepare import prepare
from tests.forked import WAIT_S, Watch, configure, local_run, wait_until
from tests.tiny_jobs import Plain

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server"), pytest.mark.timeout(120)]
PROGRAM = shutil.which("prometheus")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())


def test_a_live_run_is_scraped(tmp_path: Path) -> None:
    port, watch = free_port(), Watch()
    options = {"run__duration": "100000st", "scaling__max_workers": 1, "observe__port": port}
    run = prepare(Plain(), configure(tmp_path, "scraped", **options))
    with local_run(run, 1, on_record=watch) as local:
        watch.wait_for_step(3)
        families = text_string_to_metric_families(get(f"http://127.0.0.1:{port}/metrics"))
        found = {sample.name: sample for family in families for sample in family.samples}
        assert found["elastic_step"].value >= 3
        assert found["elastic_world_size"].value == 1
        assert found["elastic_step"].labels == {"run": "scraped"}
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(f"http://127.0.0.1:{port}/status")
        if PROGRAM is not None:
            assert step_in_prometheus(PROGRAM, tmp_path, port) >= 3
        local.stop("the test is over")
        local.wait(WAIT_S)


def step_in_prometheus(program: str, folder: Path, port: int) -> float:
    """What a real Prometheus has of the run's step, once it has scraped it."""
    own = free_port()
    targets = [{"targets": [f"127.0.0.1:{port}"]}]
    config = {"scrape_configs": [{"job_name": "elastic", "scrape_interval": "1s", "static_configs": targets}]}
    (folder / "prometheus.yml").write_text(json.dumps(config))  # which is YAML too
    arguments = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    log = (folder / "prometheus.log").open("w")
    found: list[Any] = []

    def scraped() -> bool:
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        with suppress(OSError):
            query = urllib.parse.quote('elastic_step{run="scraped"}')
            found[:] = json.loads(get(f"http://127.0.0.1:{own}/api/v1/query?query={query}"))["data"]["result"]
        return bool(found)

    with log, subprocess.Popen([program, *arguments, f"--web.listen-address=127.0.0.1:{own}"], stderr=log) as process:
        try:
            wait_until(scraped, "a scrape")
        finally:
            process.terminate()
    return float(found[0]["value"][1])
