"""Figures that are no mean over samples: with a weight of their own, made of sums, or other ones for each set."""

from __future__ import annotations

import pytest
import torch

from elastic.errors import ConfigError
from elastic.job import Job
from elastic.parallel.records import OWN_WEIGHT, Records, StepRecord
from elastic.run.plan import evaluation_size
from elastic.worker.returned import check_returned
from elastic.worker.user_code import UserCode, UserCodeError
from tests.forked import configure, train
from tests.surface_jobs import Counted

CPU = torch.device("cpu")


def test_a_metric_with_a_weight_of_its_own_is_divided_by_that():
    records = Records([range(2)], 0, CPU)
    for loss, hits, seen in ((4.0, 3.0, 4.0), (2.0, 0.0, 1.0)):
        metrics = {"even": 1.0, "recall": (torch.tensor(hits), seen), "never": (0, 0)}
        returned = check_returned("loss()", (torch.tensor(loss), 2, metrics), CPU, [], training=False)
        records.add(*returned, (1,))

    found = records.gather(None).result().mean_metrics()

    assert (found["even"], found["recall"]) == (0.5, 0.6)
    assert found["never"] != found["never"]
    assert sorted(found) == ["even", "never", "recall"]
    assert StepRecord(1.0, 2.0, {"a": 3.0, "a" + OWN_WEIGHT: 4.0}, "").mean_metrics() == {"a": 0.75}


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"a": (1.0, -1)}, "the weight of metric 'a' that loss() returned is -1"),
        ({"a": (1.0, None)}, "the weight of metric 'a' that loss() returned is None"),
        ({"a": (None, 1)}, "metric 'a' that loss() returned is None, but it must be one number"),
        ({"a": (1, 2, 3)}, "metric 'a' that loss() returned is a tuple, but it must be one number"),
    ],
)
def test_a_pair_that_is_none_is_refused(metrics, said):
    with pytest.raises(ConfigError) as refused:
        check_returned("loss()", (1.0, 2, metrics), CPU, [], training=False)
    assert said in str(refused.value)


def test_evaluated_has_to_return_numbers():
    class Wrong(Job):
        def evaluated(self, sums, name):
            return {"f1": "good"}

    code = UserCode(Wrong(), CPU, "w", autocast="off")

    with pytest.raises(UserCodeError, match=r"evaluated\(\) returned .* but it is to return numbers by name"):
        code.evaluated("", 1.0, 1.0, {})


@pytest.mark.processes
@pytest.mark.usefixtures("fork_server")
def test_figures_of_sets_are_the_same_at_every_number_of_workers(tmp_path):
    alone = train(Counted(), configure(tmp_path, "alone", eval__batch_size=5), workers=1)
    two = train(Counted(), configure(tmp_path, "two", eval__batch_size=5, parallel__strategy="fsdp"), workers=2)
    fast = train(Counted(), configure(tmp_path, "fast", run__exactness="fast"), workers=2)

    found = alone.result["metrics"]
    assert two.result["metrics"] == found
    assert found["eval/near/far"] == 0.0
    assert found["eval/far/far"] == 1.0
    assert found["eval/near/perplexity"] == pytest.approx(2 ** found["eval/near/loss"])
    rates = [found[f"eval/near/{name}"] for name in ("hits", "called", "ones")]
    assert found["eval/near/f1"] == pytest.approx(2 * rates[0] / (rates[1] + rates[2]))
    assert found["eval/near/largest"] == 5.0
    assert fast.result["metrics"]["eval/near/largest"] == pytest.approx(40 / 4)
    assert set(alone.column("ones")) == {2.0}
    assert (evaluation_size(30, 10, None), evaluation_size(30, 10, 64)) == (12, 64)
