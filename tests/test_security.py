"""What a run keeps to itself: it listens where it is told to, and leaves no secret behind."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fsspec.config import conf

from elastic import cli
from elastic.config import to_dict
from elastic.errors import ConfigError
from elastic.run.host import HostSettings
from elastic.run.prepare import prepare, report
from elastic.storage import Storage
from elastic.worker.run import WorkerRun
from tests import leaks
from tests.forked import LONG, STDERR, WAIT_S, Watch, configure, local_run, sample_at, train
from tests.tiny_jobs import Everything, Plain

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.usefixtures("fork_server")]


def listening(pids: set[int]) -> set[str]:
    """The addresses, as /proc has them, on which these processes accept connections."""
    found = set()
    for pid in pids:
        sockets = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_, inode = line.split()[:10]
                if state == "0A" and f"socket:[{inode}]" in sockets:
                    found.add(local.partition(":")[0])
    return found


def test_nothing_listens_on_another_address_than_the_run_was_given(tmp_path):
    watch = Watch()
    run = prepare(Everything(), configure(tmp_path, "run", run__duration="100000st", scaling__max_workers=2))
    with local_run(run, 2, on_record=watch, own_host={}) as local:
        watch.wait_for_step(3)
        host = local.hosting.process.pid
        there = {host, *(p.pid for p in local.processes)}
        there |= {child for pid in there for child in leaks.descendants(pid)}
        addresses, hosts = listening(there), listening({host})
        local.stop()
        local.wait(WAIT_S)

    assert hosts == {"0100007F"}, "the membership server and the rendezvous store"
    assert addresses == {"0100007F"}, "gloo too"


CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary/in+the/Environment",
    "AWS_SESSION_TOKEN": "canary=in=the=session",
    "MODEL_HUB_TOKEN": "canary_in_another_token",
}
SIGNED = "https://ann:canary-in-a-url@host/data?X-Amz-Signature=canary-in-a-signature"


@dataclass
class Talkative(Plain):
    """Its error tells everything it knows."""

    password: str = field(default="", metadata={"help": "of the place where the data lies"})
    source: str = field(default="", metadata={"help": "where the data lies"})

    def loss(self, model, batch):
        if model.training and (batch[2] == self.fault_at).any():
            known = [os.environ[name] for name in CANARIES]
            raise RuntimeError(f"{known} {self.source} {SIGNED} {conf}")
        return super().loss(model, batch)


def test_no_secret_is_in_the_folder_the_output_or_the_error_of_a_run(tmp_path, monkeypatch, capsys, caplog):
    for name, canary in CANARIES.items():
        monkeypatch.setenv(name, canary)
    monkeypatch.setenv(STDERR, str(tmp_path / "workers.txt"))
    monkeypatch.setenv("FSSPEC_S3", json.dumps({"secret": "canary-in-fsspec", "endpoint_url": SIGNED}))
    monkeypatch.setitem(conf, "s3", json.loads(os.environ["FSSPEC_S3"]))
    caplog.set_level(logging.INFO)
    job = Talkative(samples=LONG, fault_at=sample_at(11), password="canary-in-an-option", source=SIGNED)
    config = configure(tmp_path, "run", run__max_failures=0, checkpoint__every="2st", eval__every="2st")

    ran = train(job, config, workers=2)
    said = [ran.failure, report(ran.run)]
    for verb in (["runs", tmp_path], ["status", tmp_path / "run"], ["checkpoints", "show", tmp_path / "run"]):
        for form in ([], ["--json"]):
            assert cli.main([*map(str, verb), *form]) == 0
    assert cli.main(["status", f"nowhere{SIGNED}"]) == 2
    with pytest.raises(ConfigError) as refused:
        Storage(SIGNED)
    said += [repr(refused.value), *capsys.readouterr(), caplog.text]

    assert ran.failure is not None
    assert "RuntimeError" in ran.failure
    assert "step 11" in ran.failure
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.json", "status.json", "result.json", "events.jsonl", "metrics.jsonl", "manifest.json"} <= {
        path.name for path in files
    }
    for path in files:
        assert b"canary" not in path.read_bytes(), path
    for text in said:
        assert "canary" not in text
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["job"]["options"]["password"] == "***"
    assert stored["job"]["options"]["source"] == "https://***@host/data?***"


def test_a_run_goes_on_although_its_secrets_are_others_by_now(tmp_path):
    for secret, steps in (("old-password", "2st"), ("new-password", "4st")):
        job = Talkative(password=secret, source=SIGNED.replace("canary", secret))
        ran = train(job, configure(tmp_path, "run", run__stop_after=steps), workers=1)
    assert ran.result["steps"] == 6


def test_the_token_of_a_run_is_not_in_what_is_printed_of_its_parts(tmp_path):
    run = prepare(Plain(), configure(tmp_path, "run"))
    parts = WorkerRun(run.job, run.config, run.plan, run.digest, "runs", "http://127.0.0.1:1", "canary")
    assert "canary" not in repr(parts)
    assert "canary" not in repr(HostSettings(None, "canary", "127.0.0.1"))  # type: ignore[arg-type]
    assert "canary" not in json.dumps(to_dict(run.config))
