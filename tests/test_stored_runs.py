"""What was written once loads for ever: runs stored by earlier versions are resumed and end with their recorded hash.

A stored run is never changed. A new format gets a new folder beside it.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elastic.checkpoint.chunks import all_chunks
from elastic.checkpoint.format import FORMAT, READABLE
from elastic.checkpoint.reader import newest_first, read_manifest
from elastic.config import from_dict
from elastic.data.fetching import Order
from elastic.run.folder import RunFolder
from elastic.run.prepare import prepare
from elastic.storage import Storage
from elastic.worker.weights import weights_sha256
from tests.exact_job import Exact
from tests.forked import Ran, train

STORED = Path(__file__).parent / "stored_runs"
FINAL = "a395b3649a06c25cfd818ec9b91810a81559909295249afd51577d7fc663497e"


def test_the_recorded_hash_is_that_of_exact_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # the first optimizer sets it, and leaves it set
    job = Exact()
    model = job.model()
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    optimizer, data = job.optimizer(model), job.train_data()
    order = Order(seed=0, dataset_size=64, global_size=16, microbatches=8)
    for step in range(8):
        samples = [data[i] for i in order.span(step, 0, 8).ids.tolist()]
        x = torch.stack([s[0] for s in samples]).double()
        loss, weight, _ = job.loss(model, (x, torch.stack([s[1] for s in samples])))
        optimizer.zero_grad()
        (loss / weight).backward()
        optimizer.step()
    for parameter in model.parameters():
        parameter.data = parameter.data.float()

    assert weights_sha256(model) == FINAL


def test_there_is_one_of_every_format_and_of_all_that_a_manifest_can_say():
    found = {}
    for name in (p.name for p in STORED.iterdir() if p.is_dir()):
        storage = Storage(str(STORED / name / "exact"))
        found[name] = [read_manifest(storage, c) for c in newest_first(storage)]

    assert {m.format for manifests in found.values() for m in manifests} == set(READABLE)
    assert all(name == f"format-{m.format}" for name, manifests in found.items() for m in manifests)
    storage = Storage(str(STORED / f"format-{FORMAT}" / "exact"))
    newest = next(newest_first(storage))
    chunks = all_chunks(storage, newest.folder, read_manifest(storage, newest))
    packs = {c.pack for entry in chunks.values() for c in entry.chunks}
    assert any("/" in pack for pack in packs), "what did not change lies in the checkpoint before"
    assert len(packs) == 3


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("name", sorted(p.name for p in STORED.iterdir() if p.is_dir()))
@pytest.mark.parametrize("workers", [1, 2])
def test_a_stored_run_is_resumed_and_ends_with_its_recorded_hash(name: str, workers: int, tmp_path: Path):
    shutil.copytree(STORED / name / "exact", tmp_path / "exact")
    stored = RunFolder(Storage(str(tmp_path / "exact"))).config()
    assert stored is not None
    config = from_dict(stored["config"])
    config = replace(config, run=replace(config.run, storage=str(tmp_path), stop_after=None))

    ran: Ran = train(Exact(), config, workers)

    assert ran.failure is None
    restored = [e for e in ran.events("restored") if e["generation"].startswith("2-")]
    assert next((e["step"], e["detail"]["rung"]) for e in restored) == (4, "checkpoint")
    assert ran.result["status"] == "finished"
    assert ran.sha == FINAL
    assert [row["step"] for row in ran.history] == list(range(1, 9))
    assert prepare(Exact(), config).finished is not None
