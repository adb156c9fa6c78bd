"""What loss(), evaluate() and sample() return: mistakes are refused in a sentence, and lose nothing that is trained."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.errors import ConfigError
from elastic.worker.returned import COLUMNS, check_returned
from tests.forked import LONG, configure, sample_at, train
from tests.mistaken_jobs import Evaluated, Mistaken

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
    st.integers(0, 2**40), st.floats(0, 1e30), st.booleans(), st.fractions(0, 10),
    st.integers(0, 99).map(np.int32), st.floats(0, 9, width=32).map(np.float32), st.integers(0, 9).map(np.array),
    st.floats(0, 9).map(torch.tensor), st.integers(0, 9).map(lambda n: torch.tensor([n])),
)  # fmt: skip


@settings(max_examples=40)
@given(st.sampled_from([(), (1,), (1, 1)]), numbers, st.dictionaries(st.text(min_size=1), numbers | st.floats()))
def test_every_kind_of_number_passes_as_it_is(shape, weight, metrics):
    found = (graph().reshape(shape), weight, {k: v for k, v in metrics.items() if k not in COLUMNS})

    assert check(found) is found


def test_a_fraction_of_a_sample_is_a_weight_and_so_is_none():
    assert check((graph(), Fraction(1, 3), {}))
    assert check((graph(), 0, {}))


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
    assert found.result["sample"] == ("{'a': 1}" if how == "sample-dict" else None)
    details = [event["detail"].splitlines()[0] for event in found.events("sample_failed")]
    assert set(details) == ({"sample() failed, ValueError: no text today"} if how == "sample" else set())
