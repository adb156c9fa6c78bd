"""What a run is: its data, its batches, its augmentation, whoever joins; and whether its bits are those of one run."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from elastic.data.fetching import Fetcher, Order
from elastic.data.identity import places
from elastic.data.loader import Loader
from elastic.data.memory import KEPT, VALUES, look
from elastic.data.samples import fetches_together
from elastic.errors import ConfigError, RunFailed
from elastic.run.prepare import prepare
from elastic.worker.belongings import movable
from tests.forked import WAIT_S, Ran, Watch, configure, fault, local_run, plan, train
from tests.identity_jobs import Augmented, Differing, Noisy, NoisyBatches, NoisyTogether
from tests.tiny_jobs import Plain

pytestmark = [pytest.mark.processes, pytest.mark.long, pytest.mark.usefixtures("fork_server")]


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


# ---- the data of a run -----------------------------------------------------------------------------------------------


def part(storage, environment, workers=1, **options):
    """A part of the run `run`, whose workers have this environment; what it failed with, if it did."""
    config = configure(storage, "run", run__duration="6st", scaling__max_workers=workers, **options)
    run = prepare(Differing(), config)
    failure = None
    with local_run(run, workers, environment=environment) as local:
        try:
            local.wait(WAIT_S)
        except RunFailed as error:
            failure = str(error)
    return Ran(run, failure)


def test_a_run_whose_data_changed_is_not_resumed_unless_that_is_allowed(tmp_path, monkeypatch):
    order = Order(seed=0, dataset_size=100, global_size=30, microbatches=10)
    needed = {*range(10), *order.span(0, 0, 10).ids.tolist()}  # of the evaluation and of the first step
    broken = next(place for place in places(100) if place not in needed)
    begun = part(tmp_path, {"BROKEN": str(broken)}, run__stop_after="1st")  # it is not needed yet
    assert begun.result["exactness_held"] is True
    config = configure(tmp_path, "run", run__duration="6st")

    monkeypatch.setenv("SAMPLES", "120")
    with pytest.raises(ConfigError) as longer:
        prepare(Differing(), config)
    assert str(longer.value) == (
        "train_data() has 120 samples, run run was started with 100; give the same data, another --run.name, or "
        "--run.allow-change data"
    )
    monkeypatch.delenv("SAMPLES")
    monkeypatch.setenv("CONTENT", "0.377")
    with pytest.raises(ConfigError, match=r"sample \d+ of train_data\(\) is not what it was when step 1 of run run"):
        prepare(Differing(), config)
    monkeypatch.delenv("CONTENT")
    failed = part(tmp_path, {"CONTENT": "0.377"})  # only the workers see it
    assert " of train_data() is not what it was when step 1 was saved; give the same data" in failed.failure
    monkeypatch.setenv("SAMPLES", "120")

    allowed = part(tmp_path, {}, run__allow_change=("data",))

    assert allowed.result["steps"] == 6
    reason = "train_data() has 120 samples, and had 100 up to step 1"
    assert (allowed.result["exactness_held"], allowed.result["exactness_lost"]) == (False, [reason])
    assert [e["detail"] for e in allowed.events("exactness_lost")] == [reason]


def test_data_that_are_random_under_one_seed_are_said_once(tmp_path):
    exact = part(tmp_path / "exact", {"UNSEEDED": "1"}, workers=2)
    fast = part(tmp_path / "fast", {"UNSEEDED": "1"}, workers=2, run__exactness="fast")

    said = "samples of train_data() are others each time they are fetched, under one seed"
    assert (exact.result["exactness_held"], exact.result["exactness_lost"]) == (False, [said])
    assert [e["detail"] for e in exact.events("exactness_lost")] == [said]
    assert [e["detail"] for e in fast.events("notice") if "under one seed" in e["detail"]] == [said]


class Remembering(Noisy):
    """Samples that go by those which were fetched before, in some way."""

    def __init__(self, how: str, own: object = None):
        super().__init__()
        self.how, self.own, self.kept, self.last, self.calls = how, own, {}, 0.0, 0
        self.buffer = self.x[0].clone()

    def __getitem__(self, i):
        self.calls += self.how == "counts"
        if self.how == "keeps read" and i not in self.kept:
            self.kept[i] = self.x[i].clone()
        if self.how == "keeps drawn":
            if i not in self.kept:
                self.kept[i] = super().__getitem__(i)
            return self.kept[i]
        x, y = super().__getitem__(i)
        if self.how == "mixes":
            self.last, x = x, x + self.last
        elif self.how == "draws itself":
            if i not in self.kept:
                self.kept[i] = self.x[i] + self.own.random()
            x = self.kept[i]
        elif self.how == "one buffer":
            x = self.buffer.copy_(x)
        elif self.how == "refers to a count":
            self.kept["count"] = self.kept.get("count", 0) + 1
            return x, y, self.kept
        return x, y


class Memorable(Augmented):
    """Its collate_fn mixes a batch with the one before, or writes to what it is given."""

    last = 0.0

    def collate_fn(self, samples):
        if self.kind == "writes":
            samples = [(x.mul_(2), y) for x, y in samples]
        batch = super().collate_fn(samples)
        self.last, x = batch.x.mean(), batch.x + self.last * (self.kind == "mixes")
        return replace(batch, x=x)


def remembered(data, job):
    order = Order(seed=0, dataset_size=100, global_size=30, microbatches=10)
    return look(Fetcher(data, job.collate_fn, 0, 100), order.span(0, 0, 1), lambda: movable({"train_data()": data}))


@pytest.mark.parametrize(
    ("data", "job", "said"),
    [
        (Remembering("keeps drawn"), Augmented(), KEPT),
        (Remembering("mixes"), Augmented(), VALUES),
        (Remembering("refers to a count"), Augmented(), VALUES),
        (Noisy(), Memorable("mixes"), VALUES),
        (Remembering("draws itself", random.Random(0)), Augmented(), "train_data().own is a generator of its own"),
        (Remembering("draws itself", np.random.default_rng(0)), Augmented(), "train_data().own is a generator"),
        (Remembering("keeps read"), Augmented("mixup"), None),
        (NoisyTogether(), Augmented(), None),
        (NoisyBatches(), Augmented("batches"), None),
        (Noisy(), Memorable("writes"), None),
    ],
    ids=lambda value: getattr(value, "how", None) or getattr(value, "kind", "") or None,
)
def test_samples_that_go_by_what_was_fetched_before_are_found(data, job, said):
    found = remembered(data, job).broken

    assert [said in found[0]] == [True] if said else found == []


def test_counts_of_samples_are_told_and_a_buffer_that_is_used_again_is_refused():
    assert remembered(Remembering("counts"), Augmented()).counts == ["train_data().calls"]
    with pytest.raises(ConfigError, match=r"sample \d+ of train_data\(\) is overwritten when another one is fetched"):
        remembered(Remembering("one buffer"), Augmented())


def test_exactness_is_not_held_by_data_that_keep_what_they_drew(tmp_path):
    """Two epochs: a worker that has another share in the second one has other samples."""
    options = {"run__duration": "6st", "optim__warmup": None}
    exact, fast = (
        train(Augmented("keeps"), configure(tmp_path, e, run__exactness=e, **options), 2) for e in ("bitwise", "fast")
    )

    assert (exact.result["exactness_held"], exact.result["exactness_lost"]) == (False, [KEPT])
    assert [e["detail"] for e in exact.events("exactness_lost")] == [KEPT]
    assert KEPT in [e["detail"] for e in fast.events("notice")]


# ---- whoever joins ---------------------------------------------------------------------------------------------------


def test_a_newcomer_that_differs_is_left_out_and_named_and_the_run_goes_on(tmp_path):
    held = tmp_path / "held"
    held.touch()
    config = configure(tmp_path, "run", run__duration="6st", run__exactness="fast", scaling__max_workers=9)
    run, watch = prepare(Differing(), config), Watch()
    holding = plan(fault("step.forward", 3, 0, "hold", file=held))
    with local_run(run, 1, on_record=watch, environment=holding) as local:
        watch.wait_for_step(2)
        differing = {
            "WIDTH": (
                "8",
                "its model has parameter 0.weight float32[8, 6], the world's parameter 0.weight float32[4, 6]",
            ),
            "RATE": ("0.2", "its optimizer has group 0 of 4 parameters, "),
            "CONTENT": ("0.377", "its train_data() has another sample 11 than the world's"),
            "HELD_OUT": ("12", "its eval_data() has 12 samples, the world's 10"),
            "TAUGHT": ("1", "its models of the job has teacher[0].weight float32["),
            "METRIC": ("seen", "its result of loss() has metric seen, the world's metric right"),
            "SAMPLES": ("120", "train_data() has 120 samples on node"),
        }
        for name, (value, _) in differing.items():
            local.add_worker(environment={name: value})
        for number, (name, (_, words)) in enumerate(differing.items(), start=1):
            kind = "member_lost" if name == "SAMPLES" else "notice"
            told = watch.wait_for(lambda r, m=f"w1-{number}", k=kind: r.get("kind") == k and r.get("member") == m)
            assert words in told["detail"]
        local.add_worker(environment={"REFUSES": "1"})  # it is alike, and fails at what the others give it
        watch.wait_for(lambda r: "to take in" in str(r.get("detail")))
        held.unlink()
        local.wait(WAIT_S)

    ran = Ran(run, None)
    assert ran.column("world_size") == [1] * 6
    assert [len(e["detail"]["ids"]) for e in ran.events("world_formed")] == [1, 2, 1]
    assert any("could not take part" in e["detail"] and "do not fit" in e["detail"] for e in ran.events("member_lost"))


# ---- exactness is a finding ------------------------------------------------------------------------------------------


DEFAULT = {"ATEN_CPU_CAPABILITY": "default"}


def test_exactness_is_held_by_a_run_that_was_paused_and_not_where_other_kernels_or_options_came(tmp_path):
    part(tmp_path, {}, run__stop_after="2st")
    paused = part(tmp_path, {}, run__stop_after="2st").result
    changed = part(tmp_path, {**DEFAULT, "TAUGHT": "1"}, run__seed=5, run__allow_change=("run.seed",))

    assert (paused["steps"], paused["exactness_held"]) == (4, True)
    kernels, seed, teacher = found = [e["detail"] for e in changed.events("exactness_lost")]
    assert kernels.startswith("kernels or device name was ")
    assert kernels.endswith(" and is 'DEFAULT' from step 4 on")
    assert seed == "--run.seed was 0 and is 5 from step 4 on"
    assert teacher == "the models that the job holds beside the one it trains have other values from step 4 on"
    assert (changed.result["exactness_held"], changed.result["exactness_lost"]) == (False, found)


def test_a_sharded_run_that_came_back_to_its_kernels_knows_that_it_left_them(tmp_path):
    options = {"parallel__strategy": "fsdp", "workers": 2}
    part(tmp_path, {}, run__stop_after="2st", **options)
    part(tmp_path, DEFAULT, run__stop_after="2st", **options)
    last = part(tmp_path, {}, **options)

    found = [e["detail"] for e in last.events("exactness_lost")]
    assert [reason.rpartition(" from ")[2] for reason in found] == ["step 2 on", "step 4 on"]
    assert (last.result["exactness_held"], last.result["exactness_lost"]) == (False, found)


class _SeededForEach:
    """Draws from a generator of its own, which it seeds for each sample; has a file whose parts are read when asked."""

    def __init__(self) -> None:
        self.generator = torch.Generator()
        self.file = _Lazy()

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        self.generator.manual_seed(index)
        return torch.rand(3, generator=self.generator)


class _Lazy(Mapping):
    """As `numpy.load` and h5py give them."""

    def __len__(self) -> int:
        return 3

    def __iter__(self):
        return iter("abc")

    def __getitem__(self, key: str):
        raise AssertionError("read as a whole")


def test_a_generator_that_is_seeded_for_each_sample_and_a_file_that_is_read_in_parts_are_left_alone():
    data = _SeededForEach()
    order = Order(seed=0, dataset_size=64, global_size=8, microbatches=2)

    found = look(Fetcher(data, Plain().collate_fn, 0, 64), order.span(0, 0, 1), lambda: movable({"data": data}))

    assert (found.broken, found.counts) == ([], [])
