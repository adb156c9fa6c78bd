"""What a run is: its data, its batches, its augmentation, whoever joins; and whether its bits are those of one run."""

from __future__ import annotations

import pytest
import torch

from elastic.data.loader import Fetcher, Loader, Order
from elastic.data.samples import fetches_together
from tests.forked import configure, train
from tests.identity_jobs import Augmented, Noisy

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]


def loader(kind: str, workers: int = 0) -> Loader:
    job = Augmented(kind)
    order = Order(seed=0, dataset_size=100, global_size=30, microbatches=10)
    fetcher = Fetcher(job.train_data(), job.collate_fn, 0, 100)
    return Loader(fetcher, order, workers=workers, prefetch=1, total_steps=2)


# ---- augmentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["batches", "split"])
def test_fast_sees_the_same_samples_at_every_world_size(tmp_path, kind):
    options = {"run__exactness": "fast", "run__duration": "2st", "eval__every": "1st", "optim__warmup": None}

    ran = [train(Augmented(kind), configure(tmp_path, f"run-{w}", **options), w) for w in (1, 2, 3)]

    first = [[r.column("loss")[0], r.evaluations[1]["eval/loss"]] for r in ran]
    assert first[1] == pytest.approx(first[0], rel=1e-5)
    assert first[2] == pytest.approx(first[0], rel=1e-5)


@pytest.mark.parametrize("kind", ["items", "together", "subset"])
def test_samples_are_the_same_however_many_microbatches_a_pass_has(kind):
    found = loader(kind)
    found.start(0, [(0, 3)])
    together = found.next(0, 0, 3).batch
    found.start(0, [(0, 1), (1, 1), (2, 1)])

    alone = [found.next(0, i, 1).batch for i in range(3)]

    assert torch.equal(together.x, torch.cat([batch.x for batch in alone]))


@pytest.mark.parametrize(("kind", "together"), [("items", False), ("subset", True), ("split", False)])
def test_a_subset_fetches_together_if_what_it_is_of_does(kind, together):
    assert fetches_together(Augmented(kind).train_data()) is together


@pytest.mark.parametrize(("kind", "draws"), [("items", False), ("together", False), ("batches", True), ("mixup", True)])
def test_what_is_drawn_for_a_whole_batch_is_found_at_warm_up(kind, draws):
    assert loader(kind).draws_together() is draws


def test_a_dataset_that_opens_its_files_at_the_first_sample_is_sent_to_loader_processes_unopened():
    class Lazy(Noisy):
        file = None

        def __getitem__(self, i):
            self.file = self.file or open(__file__)  # noqa: SIM115
            return super().__getitem__(i)

    job = Augmented("mixup")
    fetcher = Fetcher(data := Lazy(), job.collate_fn, 0, 100)
    order = Order(seed=0, dataset_size=100, global_size=30, microbatches=10)
    found = Loader(fetcher, order, workers=1, prefetch=1, total_steps=2)

    assert found.draws_together()
    assert data.file is None
    found.close()
