"""Training runs whose storage is a real S3: the ledger in segments, checkpoints, resuming, the same bits."""

from __future__ import annotations

import pytest

from elastic.checkpoint.reader import newest_first
from elastic.observe.ledger import METRICS
from elastic.run.prepare import prepare
from elastic.storage import Storage
from tests import forked
from tests.forked import Watch
from tests.tiny_jobs import Everything

pytestmark = pytest.mark.processes


def test_a_run_on_s3_pauses_resumes_elsewhere_and_ends_with_the_bits_of_an_undisturbed_one(bucket, front, undisturbed):
    config = forked.configure(f"{bucket}/runs", "run", eval__every="3st", run__stop_after="5st")
    paused = forked.train(Everything(), config, workers=2)
    resumed = forked.train(Everything(), forked.configure(f"{bucket}/runs", "run", eval__every="3st"), workers=1)

    assert (paused.failure, resumed.failure) == (None, None)
    assert resumed.sha == undisturbed.sha
    assert resumed.column("step") == list(range(1, 13))
    assert resumed.column("sample_hash") == undisturbed.column("sample_hash")
    assert resumed.events("restored")[-1]["detail"]["rung"] == "checkpoint"
    names = resumed.storage.names()
    assert "metrics.jsonl" in names
    assert "metrics.jsonl.d" not in [n for n in names if resumed.storage.names(f"{METRICS}.d")]
    assert [c.step for c in newest_first(resumed.storage)] == [12, 5]
    refused = [r for r in front.records() if r.status == 412 and ".probe" not in r.key]
    assert refused == [], "something was created twice"


def test_slow_downs_and_cut_connections_during_a_run_change_no_bit(bucket, front, undisturbed):
    front.fault(method="PUT", key="rank-0000.pack", status=503, count=2)
    front.fault(method="PUT", key="rank-0001.pack", cut="request", count=1)
    front.fault(method="PUT", key="manifest.json", cut="response", count=1)
    front.fault(method="PUT", key="metrics.jsonl", status=503, count=1)

    config = forked.configure(f"{bucket}/runs", "run", eval__every="3st", checkpoint__every="6st")
    ran = forked.train(Everything(), config, workers=2)

    assert ran.failure is None
    assert front.unused() == 0
    assert ran.sha == undisturbed.sha
    assert [e["step"] for e in ran.events("checkpoint_committed")] == [6, 12]
    assert ran.events("checkpoint_failed") == []


def test_a_run_waits_for_a_store_that_is_away_while_it_saves(seaweed, bucket, front, undisturbed, gate):
    """Rows, events, a checkpoint and the heartbeat wait; no step is done twice, and none of the others is lost."""
    held, watch = gate("held"), Watch()
    config = forked.configure(f"{bucket}/runs", "run", eval__every="3st", checkpoint__every="4st")
    run = prepare(Everything(), config)
    faults = forked.plan(
        forked.fault("upload.begin", 4, 0, "hold", file=held), forked.fault("step.forward", 6, 1, "hold", file=held)
    )
    with forked.local_run(run, 2, on_record=watch, environment=faults) as local:
        watch.wait_for_step(3)
        front.records()
        front.move(1)  # where nobody listens
        held.unlink()
        asked: list[str] = []
        forked.wait_until(lambda: bool(asked.extend(r.key for r in front.records())) or len(asked) > 5, "requests")
        front.move(seaweed.port)
        local.wait(forked.WAIT_S)

    ran = forked.Ran(run, None)
    assert ran.sha == undisturbed.sha
    assert [e["step"] for e in ran.events("checkpoint_committed")] == [4, 8, 12]
    assert ran.events("checkpoint_failed") == []
    assert [row["step"] for row in ran.rows if "sample_hash" in row] == list(range(1, 13))


def test_a_run_without_its_storage_s_permission_starts_nothing(bucket, monkeypatch):
    from s3fs import S3FileSystem

    from elastic.errors import ConfigError
    from jobs.bench.seaweed import credentials

    for name, value in credentials("reader").items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()

    with pytest.raises(ConfigError, match=r"which cannot write: PermissionError"):
        forked.train(Everything(), forked.configure(f"{bucket}/runs", "run"), workers=1)

    assert Storage(f"{bucket}/runs").names() == []
