"""What loss(), evaluate() and sample() return: mistakes are refused in a sentence, and lose nothing that is trained."""

from __future__ import annotations

import copy
import math
import random
import re
import sys
from collections import deque
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.config import RunOptions, TrainConfig
from elastic.data.fetching import Fetcher, ItemError, Order
from elastic.data.loader import Loader
from elastic.data.samples import halves
from elastic.errors import ConfigError, RunFailed
from elastic.observe.ledger import COLUMNS
from elastic.worker.evaluate import held_out_batch
from elastic.worker.rehearsal import SEPARATE, Rehearsal
from elastic.worker.returned import check_returned
from elastic.worker.sums import Sums, adds_up, counts, mistake
from elastic.worker.traces import without_trace
from elastic.worker.user_code import UserCode
from tests.error_jobs import FaultySamples
from tests.forked import LONG, configure, sample_at, train
from tests.mistaken_jobs import Averaged, Carrying, Crowded, Evaluated, Mistaken
from tests.tiny_jobs import CONFIG, Plain

CPU = torch.device("cpu")
WEIGHT = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
in_processes = pytest.mark.processes
STEP = 6


def graph(values: torch.Tensor | None = None) -> torch.Tensor:
    """A loss with a graph: two numbers, or their sum."""
    return (WEIGHT * 3).sum() if values is None else WEIGHT * values


def check(found, *, training=True, parameters=(WEIGHT,)):
    name = "loss()" if training else "evaluate()"
    return check_returned(name, found, CPU, parameters, training=training)


# ---- what is wrong by itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (None, "loss() returned None; return (sum, weight, metrics), for example"),
        (graph(), "loss() returned a Tensor of shape (); return"),
        ((graph(), 2), "loss() returned a tuple of 2; return"),
        ((None, 2, {}), "the loss that loss() returned is None, but it must be a tensor; return"),
        ((2.5, 2, {}), "is the number 2.5, but it must be a tensor; return the tensor itself, without .item()"),
        ((np.float32(2), 2, {}), "return the tensor itself, without .item(), float() or .numpy()"),
        ((graph(torch.ones(2)), 2, {}), "has the shape (2,), but it must be one number, the sum over the batch; give"),
        ((graph().detach(), 2, {}), "has no graph, so no parameter would get a gradient; return it without .detach()"),
        ((torch.tensor(3), 2, {}), "is torch.int64, which has no gradients; return a sum of floating-point numbers"),
        ((graph() * 1j, 2, {}), "is complex (torch.complex64), but only real numbers can be made smaller"),
        ((torch.empty((), device="meta"), 2, {}), "is on the meta device, so it has no value"),
        ((graph(), None, {}), "the weight that loss() returned is None; return the number of samples or tokens"),
        ((graph(), "8", {}), "the weight that loss() returned is the text '8'; return the number"),
        ((graph(), -1, {}), "the weight that loss() returned is -1; return the number"),
        ((graph(), torch.tensor(-2.0), {}), "the weight that loss() returned is -2; return the number"),
        ((graph(), torch.ones(3), {}), "the weight that loss() returned has the shape (3,), but it must be one number"),
        ((graph(), graph(), {}), "has a graph, but nothing is learned through it; give it .detach()"),
        ((graph(), 2, None), "the metrics that loss() returned are None, but they must be a dict of sums; return {}"),
        ((graph(), 2, [("a", 1)]), "the metrics that loss() returned are a list, but they must be a dict"),
        ((graph(), 2, {1: 2}), "loss() returned a metric named 1; give each metric a name that is text"),
        ((graph(), 2, {"f": torch.ones(3)}), "metric 'f' that loss() returned has the shape (3,), but it must be one"),
        ((graph(), 2, {"f": np.ones(3)}), "metric 'f' that loss() returned is a ndarray of shape (3,), but it must be"),
        ((graph(), 2, {"f": "good"}), "metric 'f' that loss() returned is the text 'good', but it must be one number"),
        ((graph(), 2, {"f": None}), "metric 'f' that loss() returned is None, but it must be one number"),
        ((graph(), 2, {"f": {"a": 1}}), "metric 'f' that loss() returned is a dict, but it must be one number"),
        ((graph(), 2, {"f": 2j}), "metric 'f' that loss() returned is the number 2j, but it must be one number"),
        ((graph(), 2, {"lr": 2}), "metric 'lr' that loss() returned is named like a column that rows have already"),
        ((graph(), 2, {"eval/f": 2}), "metric 'eval/f' that loss() returned is named like a column"),
    ],
)
def test_what_a_loss_cannot_be_is_said_in_one_sentence(found, sentence):
    with pytest.raises(ConfigError) as raised:
        check(found)

    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_loss_without_a_graph_is_told_when_nothing_is_trained():
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    with pytest.raises(ConfigError, match="since no parameter of the model is trained"):
        check((frozen.sum(), 2, {}), parameters=(frozen,))


def test_what_evaluate_returns_needs_no_graph_but_the_rest():
    assert check((torch.tensor(2.0), 3, {"lr": 1}), training=False) == (torch.tensor(2.0), 3, {"lr": 1})
    assert check((2.5, 3, {}), training=False) == (2.5, 3, {})
    with pytest.raises(ConfigError, match=r"metric 'loss' that evaluate\(\) returned would be eval/loss"):
        check((2.5, 3, {"loss": 1}), training=False)
    with pytest.raises(ConfigError, match=r"has the shape \(2,\)"):
        check((torch.ones(2), 3, {}), training=False)


numbers = st.one_of(
    st.integers(0, 2**40),
    st.floats(0, 1e30),
    st.booleans(),
    st.fractions(0, 10),
    st.integers(0, 99).map(np.int32),
    st.floats(0, 9, width=32).map(np.float32),
    st.integers(0, 9).map(np.array),
    st.floats(0, 9).map(torch.tensor),
    st.integers(0, 9).map(lambda n: torch.tensor([n])),
)


@settings(max_examples=40)
@given(st.sampled_from([(), (1,), (1, 1)]), numbers, st.dictionaries(st.text(min_size=1), numbers | st.floats()))
def test_every_kind_of_number_passes_as_it_is(shape, weight, metrics):
    found = (graph().reshape(shape), weight, {k: v for k, v in metrics.items() if k not in COLUMNS})

    assert check(found) is found


def test_a_fraction_of_a_sample_is_a_weight_and_so_is_none():
    assert check((graph(), Fraction(1, 3), {}))
    assert check((graph(), 0, {}))


# ---- means and sums ---------------------------------------------------------------------------------------------


def triple(losses, of, weight=len, metrics=None):
    """What `of` makes of all losses, of the first half and of the other."""
    cuts = [losses, *halves(losses)]
    named = metrics or {}
    return [Sums(len(c), of(c), weight(c), {n: m(c) for n, m in named.items()}) for c in cuts]


def mean(losses):
    return math.fsum(losses) / len(losses)


def one(_):
    return 1


def surely(losses, of, weight=len, metrics=None):
    """What this batch leaves no doubt of."""
    return mistake("loss()", triple(losses, of, weight, metrics), sure=True)


several = st.lists(st.floats(0.01, 100), min_size=2, max_size=9)
apart = several.filter(lambda v: abs(mean(halves(v)[0]) - mean(halves(v)[1])) > 0.01 * max(v))


@given(several)
def test_sums_with_counts_and_means_with_ones_pass(losses):
    assert (
        mistake("loss()", triple(losses, sum, len, {"count": len, "squares": lambda c: sum(v * v for v in c)})) is None
    )
    assert mistake("loss()", triple(losses, mean, one)) is None
    assert counts(triple(losses, sum))
    assert adds_up(triple(losses, sum))
    assert not counts(triple(losses, mean, one))


@given(apart)
def test_a_mean_with_a_count_is_found_and_a_sum_with_a_one(losses):
    assert "loss() returned a mean, " in (mistake("loss()", triple(losses, mean)) or "")
    assert "which counts none of them" in (mistake("loss()", triple(losses, sum, one)) or "")
    assert "metric 'm' that loss() returned is a mean" in (
        mistake("loss()", triple(losses, sum, len, {"n": len, "m": mean})) or ""
    )
    assert surely(losses, mean)
    assert surely(losses, sum, one)


def test_a_sum_that_lies_between_those_of_its_halves_by_chance_is_no_mean():
    """As where a model takes another branch by what the batch begins with."""
    found = [Sums(3, 5.19088, 3, {}), Sums(1, 0.725303, 1, {}), Sums(2, 6.10489, 2, {})]
    assert mistake("loss()", found)
    assert mistake("loss()", found, sure=True) is None


def test_sums_in_short_number_formats_add_up_by_their_own_digits():
    here = triple([0.37, 1.41, 2.93, 7.7, 11.3], lambda cut: float(torch.tensor(sum(cut)).bfloat16()), one)
    assert not adds_up(here)
    assert mistake("loss()", here) is None
    short = [replace(sums, close=4 * torch.finfo(torch.bfloat16).eps) for sums in here]
    assert adds_up(short)
    assert "which counts none of them" in (mistake("loss()", short) or "")


@given(
    several,
    st.sampled_from(
        [
            max,
            lambda c: math.sqrt(sum(v * v for v in c)),
            lambda c: math.fsum(c) + 7e4,  # a penalty of the weights beside it
            lambda c: 3.5,
            lambda c: 0.0,
            lambda c: len(c) * math.log(sum(map(math.exp, (v / 20 for v in c)))),  # as contrastive ones grow
            lambda c: sum(c) * len(c),
            lambda c: sum(sorted(c)[-2:]),
            lambda c: math.nan,
        ]
    ),
)
def test_losses_that_are_neither_pass(losses, of):
    assert mistake("loss()", triple(losses, of, len, {"m": of})) is None


@given(several)
def test_what_a_batch_adds_to_the_losses_of_its_parts_is_seen(losses):
    """A penalty for each call, and what a sample's loss owes to those beside it."""
    assert not adds_up(triple(losses, lambda c: sum(c) + 0.01 * sum(losses)))
    assert not adds_up(triple(losses, lambda c: sum(c) * len(c)))
    assert adds_up(triple(losses, lambda c: math.nan))


def test_a_batch_that_cannot_be_had_is_left_to_the_first_step_to_tell():
    class Nothing:
        def first_batches(self, count):
            return []

    code = UserCode(Plain(), CPU, "w", autocast="off")
    rehearsal = Rehearsal(Plain(), TrainConfig(), code, Nothing(), {}, eval_size=4)

    rehearsal.run(torch.nn.Linear(1, 1), 1, None)

    assert rehearsal.separate == 0


def test_a_held_out_item_that_raises_is_named_and_where_collate_fn_does_all_are():
    class Collates(Plain):
        def collate_fn(self, samples):
            raise ValueError("of two lengths")

    data = FaultySamples(10, "corrupt", 7, "no image")

    for job, ids, samples, line in (
        (Plain(), [5, 6, 7, 8], (7,), "ValueError: no image"),
        (Collates(), [5, 6], (5, 6), "ValueError: of two lengths"),
    ):
        with pytest.raises(ItemError) as raised:
            held_out_batch(job, data, ids, (0, "near", 0))
        assert (raised.value.samples, raised.value.line) == (samples, line)


def rehearse(job, exactness="fast"):
    """Try a job, in this process."""
    config = TrainConfig(run=RunOptions(exactness=exactness), batch=CONFIG.batch)
    data, model = job.train_data(), job.model()
    before = copy.deepcopy(model.state_dict())
    order = Order(seed=0, dataset_size=len(data), global_size=30, microbatches=10)
    loader = Loader(Fetcher(data, job.collate_fn, 0, len(data)), order, workers=0, prefetch=0, total_steps=1)
    code = UserCode(job, CPU, "w", autocast="off")
    rehearsal = Rehearsal(job, config, code, loader, job.eval_data(), eval_size=6)
    try:
        rehearsal.run(model, 1, None)
    finally:
        assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    return rehearsal


@pytest.mark.parametrize(
    ("job", "exactness", "sentence"),
    [
        (
            Carrying(how="counts"),
            "fast",
            "depends on what the pass before left in job.passes; a step has several passes, which workers share",
        ),
        (
            Carrying(how="global"),
            "fast",
            "depends on what the pass before left in tests.mistaken_jobs._PASSES[0]; a step",
        ),
        (Carrying(how="writes"), "fast", "loss() changes parameters of the model (0.weight) again in each pass, but a"),
        (
            Carrying(how="follows"),
            "fast",
            "(1.teacher.weight, 1.teacher.bias) again in each pass, but a step has several",
        ),
        (Carrying(how="rebinds"), "bitwise", "(1.teacher.weight, 1.teacher.bias) again in each pass, but a step has"),
        (
            Carrying(how="begins"),
            "fast",
            "loss() changes parameters of the model (0.bias) again in each pass, but a step",
        ),
        (
            Carrying(how="queue"),
            "fast",
            "a pass moves the buffer 1.next by how many samples it has, but a step has",
        ),
        (
            Carrying(how="adds"),
            "fast",
            "a pass moves the buffer 1.seen by a sum over its samples, but a step has several",
        ),
        (Carrying(how="adds"), "bitwise", "a pass moves the buffer 1.seen by a sum over its samples, but a step has"),
        (Carrying(how="remembers"), "fast", "a pass moves the buffer 1.seen by a sum over its samples, but a step has"),
        (Carrying(how="registers"), "fast", "the model has 1.mean, which model() did not make, so a resumed run or a"),
        (Carrying(how="clamps"), "bitwise", "loss() changes parameters of the model (0.weight) but a step has several"),
        (Carrying(how="in place"), "fast", "loss() writes to the tensors of its batch, which are those that the data"),
        (
            Evaluated(how="trains"),
            "fast",
            "evaluate() changes parameters of the model (0.weight, 0.bias, 2.weight, ...)",
        ),
    ],
)
def test_what_a_pass_leaves_to_those_after_it_is_refused_by_name(job, exactness, sentence):
    with pytest.raises(RunFailed, match=re.escape(sentence)):
        rehearse(job, exactness)


def test_what_comes_to_the_same_however_many_passes_there_are_is_let_alone():
    job = Carrying(how="harmless")
    assert rehearse(job, "bitwise").unseeded == ""
    assert job.passes == 0
    rehearse(Carrying(how="clamps"), "fast")
    rehearse(Carrying(how="passes"), "fast")
    assert rehearse(Carrying(how="averages"), "fast").separate == 0


def test_what_is_left_in_a_buffer_by_more_than_a_mean_has_one_microbatch_a_pass():
    assert (
        SEPARATE[rehearse(Carrying(how="decays"), "fast").separate]
        == "what is left in a buffer goes by how many samples a pass has"
    )


def test_a_trial_needs_no_more_memory_than_a_step_in_which_something_is_compiled():
    torch.compile(lambda x: x, backend="eager")  # loads the compiler
    rehearse(Evaluated(how="large"))


def test_random_numbers_that_no_seed_decides_are_found():
    for exactness in ("bitwise", "fast"):
        found = rehearse(Carrying(how="entropy"), exactness).unseeded
        assert found.startswith("loss() returns another value each time for one batch")


class Forgetful(torch.nn.Module):
    """Keeps things from pass to pass, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.norm, self.seen, self.means, self.last = torch.nn.BatchNorm1d(3), 0, deque(maxlen=4), torch.zeros(3)
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x):
        self.norm.train()
        self.seen += 1
        self.means.append(x.mean())
        self.last += x.mean(0)
        self.total = self.total + x.sum(0)
        self.cache = x
        return self.norm(x) * torch.rand(3)


def _what(module):
    """All that a `Forgetful` keeps, as plain values."""
    tensors = {**module.state_dict(), "last": module.last, "cache": module.cache}
    modes = [m.training for m in module.modules()]
    return {n: t.tolist() for n, t in tensors.items()}, module.seen, [m.item() for m in module.means], modes


def test_a_trial_leaves_nothing_behind():
    model, job = Forgetful(), Averaged()
    model.norm.eval()
    job.center, job.teacher, job.seen = torch.zeros(3), Forgetful(), {}
    for one in (model, job.teacher):
        one(torch.ones(4, 3))
        one.norm.eval()

    def everything():
        drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        return _what(model), _what(job.teacher), job.center.tolist(), job.seen, sorted(vars(job)), drawn

    before = copy.deepcopy(everything())

    with without_trace(model, job):
        assert not model.training
        assert not torch.is_grad_enabled()
        job.center += model(torch.randn(4, 3)).sum(0) + job.teacher(torch.randn(4, 3)).sum(0)
        job.seen["a"] = random.random() + np.random.rand()
        job.more = 1
        assert everything() != before

    assert everything() == before


def test_a_job_that_exits_has_failed_and_says_where():
    """The end of a worker's process would say nothing, and be followed by that of the next."""
    code = UserCode(Plain(), CPU, "w", autocast="off")
    with pytest.raises(RunFailed, match="worker w failed at warming up: SystemExit: no batch today"):
        code.guard(lambda: sys.exit("no batch today"))


@pytest.mark.parametrize("how", ["backward", "zero-grad"])
def test_a_loss_that_touches_gradients_is_refused_by_name(how):
    """It would take away what earlier passes of a step left, or give a cut model gradients that nobody waits for."""
    job = Mistaken(how=how, at_step=2)
    model, data = job.model(), job.train_data()
    code, batch = UserCode(job, CPU, "w", autocast="off"), job.collate_fn([data[i] for i in range(3)])
    code.watches_gradients = True

    code.loss(model, batch)[0].backward()  # as any other
    job.after_step(model, 1)

    with pytest.raises(
        RunFailed, match=r"loss\(\) changes the gradient of parameter 0\.weight: it calls backward\(\), zero"
    ):
        code.loss(model, batch)


# ---- in runs ----------------------------------------------------------------------------------------------------


def committed(found):
    return [event["step"] for event in found.events("checkpoint_committed")]


@pytest.mark.usefixtures("fork_server")
@in_processes
@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("detached", "the loss that loss() returned has no graph, so no parameter would get a gradient"),
        ("vector", "metric 'accuracy' that loss() returned has the shape (3,), but it must be one number"),
    ],
)
def test_a_mistake_of_one_worker_ends_the_run_with_a_sentence_and_the_state_before_it(how, sentence, tmp_path):
    job = Mistaken(samples=LONG, how=how, fault_at=sample_at(STEP, 7))

    found = train(job, configure(tmp_path, "run"), workers=2)

    assert found.failure is not None
    assert found.failure.startswith(sentence)
    assert found.failure.endswith(f"(worker w1-1 (rank 1 of 2), step {STEP}, microbatch 7)")
    assert committed(found) == [STEP - 1]
    assert found.column("step") == list(range(1, STEP))


@pytest.mark.usefixtures("fork_server")
@in_processes
@pytest.mark.parametrize(
    "options", [{"run__exactness": "fast"}, {}, {"parallel__strategy": "fsdp"}], ids=["fast", "bitwise", "fsdp"]
)
def test_metrics_that_one_worker_names_otherwise_end_the_run_and_no_process(options, tmp_path):
    job = Mistaken(samples=LONG, how="more-names", fault_at=sample_at(STEP, 7))

    found = train(job, configure(tmp_path, "run", **options), workers=2)

    assert found.failure is not None
    assert found.failure.startswith(
        "loss() returned the metrics accuracy for some microbatches and accuracy, precision for others; return the same"
    )
    assert found.column("step") == list(range(1, STEP))
    assert [e["member"] for e in found.events("member_lost") if "member" in e] == []


@pytest.mark.usefixtures("fork_server")
@in_processes
def test_metrics_that_all_workers_name_otherwise_are_those_of_that_step(tmp_path):
    job = Mistaken(samples=LONG, how="more-names", at_step=STEP)

    found = train(job, configure(tmp_path, "run"), workers=2)

    assert found.failure is None
    assert [row["step"] for row in found.history if "precision" in row] == [STEP]
    assert found.history[STEP - 1]["precision"] == 1.0
    assert all("accuracy" in row for row in found.history)
    assert {key for row in found.history for key in row} <= COLUMNS | {"accuracy", "precision"}


@pytest.mark.usefixtures("fork_server")
@in_processes
def test_a_microbatch_without_weight_counts_for_nothing_and_a_step_without_any_is_refused(tmp_path):
    one = Mistaken(samples=LONG, how="no-weight", fault_at=sample_at(STEP, 7))
    all_ = Mistaken(samples=LONG, how="no-weight", at_step=STEP)

    passed = train(one, configure(tmp_path, "one"), workers=2)
    ended = train(all_, configure(tmp_path, "all"), workers=2)

    assert passed.failure is None
    assert ended.failure is not None
    assert ended.failure.startswith(f"all weights of step {STEP} are 0, so its loss has no mean (samples ")
    assert committed(ended) == [STEP - 1]


@pytest.mark.usefixtures("fork_server")
@in_processes
@pytest.mark.parametrize(("how", "strategy"), [("sample", "ddp"), ("sample", "fsdp"), ("sample-dict", "ddp")])
def test_a_sample_that_fails_is_an_event_of_a_finished_run(how, strategy, tmp_path):
    found = train(Evaluated(how=how), configure(tmp_path, "run", parallel__strategy=strategy), workers=2)

    assert found.failure is None
    assert found.result["status"] == "finished"
    assert found.result["sample"] == ("1" if how == "sample-dict" else None)
    details = [event["detail"].splitlines()[0] for event in found.events("sample_failed")]
    assert set(details) == ({"sample() failed, ValueError: no text today"} if how == "sample" else set())


@pytest.mark.usefixtures("fork_server")
@in_processes
@pytest.mark.parametrize(
    ("job", "strategy", "sentence"),
    [
        (Averaged(how="mean"), "ddp", "loss() returned a mean, "),
        (Averaged(how="mean"), "fsdp", "loss() returned a mean, "),
        (Averaged(how="sum-for-1"), "ddp", "loss() returned a sum, "),
        (Averaged(how="metric"), "ddp", "metric 'perplexity' that loss() returned is a mean, "),
        (Evaluated(how="mean"), "ddp", "evaluate() returned a mean, "),
        (
            Carrying(how="counts"),
            "fsdp",
            "depends on what the pass before left in job.passes; a step has several passes, which workers share",
        ),
        (Evaluated(how="raises"), "ddp", "'Sequential' object has no attribute 'no_such_method'"),
        (Evaluated(how="raises"), "fsdp", "has no attribute 'no_such_method'"),
        (Evaluated(how="loss"), "ddp", "metric 'loss' that evaluate() returned would be eval/loss"),
        (Evaluated(how="names"), "ddp", "two held-out figures would be eval/far/loss; rename a metric, or a set"),
    ],
    ids=lambda value: getattr(value, "how", None),
)
def test_what_would_go_wrong_after_hours_is_found_before_the_first_step(job, strategy, sentence, tmp_path):
    found = train(job, configure(tmp_path, "run", parallel__strategy=strategy, run__max_failures=0), workers=2)

    assert found.failure is not None
    assert sentence in found.failure
    assert found.rows == []


@pytest.mark.usefixtures("fork_server")
@in_processes
def test_the_best_by_a_figure_that_no_evaluation_has_is_refused_before_the_first_step(tmp_path):
    options = {"checkpoint__keep_best": 1, "checkpoint__best_metric": "eval/nosuch"}
    found = train(Plain(), configure(tmp_path, "run", run__max_failures=0, **options), workers=1)

    assert found.failure is not None
    assert "by --checkpoint.best-metric eval/nosuch, but evaluations have eval/" in found.failure
    assert found.rows == []


@pytest.mark.usefixtures("fork_server")
@in_processes
def test_means_with_the_weight_1_and_losses_that_do_not_add_up_are_the_same_at_every_world_size_in_fast(tmp_path):
    one, three, plain, alone, two = (
        train(job, configure(tmp_path, name, run__exactness="fast"), workers)
        for name, job, workers in (
            ("1", Averaged(how="mean-for-1"), 1),
            ("3", Averaged(how="mean-for-1"), 3),
            ("p", Plain(), 1),
            ("a", Averaged(how="grows"), 1),
            ("2", Averaged(how="grows"), 2),
        )
    )

    assert three.column("loss") == pytest.approx(one.column("loss"), rel=1e-4)
    assert one.column("loss") == pytest.approx(plain.column("loss"), rel=1e-4)
    assert "count passes, not samples" in str(one.events("worker_warm"))
    assert two.column("loss") == pytest.approx(alone.column("loss"), rel=1e-4)
    assert "is not the sum of the losses of its parts" in str(two.events("worker_warm"))


@pytest.mark.usefixtures("fork_server")
@in_processes
def test_a_loss_that_does_not_add_up_is_found_later_where_the_first_batches_do_not_show_it(tmp_path):
    options = {"run__exactness": "fast", "run__duration": "18st", "batch__pass_size": 15}
    order = Order(seed=0, dataset_size=600, global_size=30, microbatches=10)
    soon, late = (
        train(
            Crowded(samples=600, fault_at=int(order.span(step, 0, 1).ids[0])), configure(tmp_path, name, **options), 2
        )
        for name, step in (("soon", 3), ("late", 16))
    )

    assert "the loss of a batch is not the sum" in str(soon.events("worker_warm"))
    assert "passes are of one microbatch each from step 17 on" in str(late.events("notice"))
    assert (late.failure, late.column("step")[-1], late.events("member_lost")) == (None, 18, [])


@pytest.mark.usefixtures("fork_server")
@in_processes
def test_a_loss_that_only_works_in_training_trains(tmp_path):
    found = train(Averaged(how="train-only"), configure(tmp_path, "run"), workers=1)

    assert found.failure is None
    assert found.result["status"] == "finished"
