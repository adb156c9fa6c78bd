"""Data in shards, in lanes and in an order of the job's own, and updates that take turns, on Ray: the bits of one plain
process through a death."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastic.observe.ledger import EVENTS, METRICS, gaps_and_doubles, read_records
from elastic.phases import Cycle
from elastic.storage import Storage
from jobs.bench.nodes import LocalCluster, result
from tests.forked import B, configure, fault, train
from tests.forked_command import ForkedCommand
from tests.phase_jobs import Turns
from tests.shard_jobs import OfShards, Streamed, write
from tests.surface_jobs import Drawn

PROGRAM = """
import ray, elastic
from tests.forked import configure
from tests.shard_jobs import OfShards, Streamed
from tests.surface_jobs import Drawn
from tests.phase_jobs import Turns
ray.init(address={address!r}, log_to_driver=False)
config = configure({folder!r}, {name!r}, scaling__max_workers=2, scaling__min_workers=2, batch__microbatches=10)
elastic.ElasticTrainer({job}, config).fit()
"""


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(400)
def test_shards_lanes_samplers_and_turns_on_ray_have_the_bits_of_one_process_through_a_death(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    """All at once: two workers each, on three nodes of two; one waits for the workers of another."""
    write(tmp_path, "tar")
    urls = str(tmp_path / "*.tar")
    jobs = {"shards": OfShards(urls=urls), "lanes": Streamed(), "sampler": Drawn(), "turns": Turns()}
    texts = {"shards": f"OfShards(urls={urls!r})", "lanes": "Streamed()", "sampler": "Drawn()", "turns": "Turns()"}
    runs = {}
    for name, text in texts.items():
        faults = [fault("step.reduce", step=5, rank=1, only=tmp_path / f"{name}-died")]
        variables = {"ELASTIC_FAULTS": json.dumps(faults)}
        runs[name] = ForkedCommand(
            "-c",
            PROGRAM.format(address=cluster.address, folder=str(tmp_path), name=name, job=text),
            environment={
                **variables,
                "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": variables}}),
            },
        )

    for name, run in runs.items():
        assert run.wait(300) == 0, run.output
        assert (tmp_path / f"{name}-died").exists()
    for name, job in jobs.items():
        alone = train(job, configure(tmp_path, f"{name}-alone"), 1, beside_ray=True)
        found, storage = result(tmp_path / name), Storage(str(tmp_path / name))
        assert found["weights_sha256"] == alone.sha
        assert found["exactness_held"]
        cycle = Cycle(tuple(job.phases))
        assert gaps_and_doubles(read_records(storage, METRICS), B, cycle) == []
        assert "member_lost" in {event["kind"] for event in read_records(storage, EVENTS)}
