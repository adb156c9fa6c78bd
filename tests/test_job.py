"""What a job may be: map-style data, and every mistake answered with the line to write instead."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from elastic import Job
from elastic.errors import ConfigError
from elastic.job import job_name, source_hash
from elastic.job_data import check_dataset, eval_sets
from elastic.job_options import job_options
from elastic.run.prepare import prepare
from tests.forked import configure
from tests.tiny_jobs import Plain, Samples


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize("data", [[1, 2], Samples(3), TensorDataset(torch.ones(3)), "abc"])
def test_anything_with_a_length_and_an_index_is_data(data):
    assert check_dataset("train_data()", data) is data


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (DataLoader(Samples(3)), "returned a DataLoader, but data must be map-style; .*`return loader.dataset`"),
        (Stream(), r"returned an IterableDataset, but data must be map-style; .*or `list\(stream\)` if it fits"),
        (iter([1]), "returned a list_iterator, which has no __len__ and __getitem__"),
        (None, "returned a NoneType, which has no __len__ and __getitem__"),
        ({1, 2}, "returned a set, which has no __len__ and __getitem__"),
    ],
    ids=["DataLoader", "IterableDataset", "iterator", "None", "set"],
)
def test_what_is_not_map_style_is_refused_with_what_to_write_instead(data, said):
    with pytest.raises(ConfigError, match=rf"^train_data\(\) {said}"):
        check_dataset("train_data()", data)


def test_evaluation_data_is_one_set_several_by_name_or_none():
    class Some(Job):
        def __init__(self, data):
            self.data = data

        def eval_data(self):
            return self.data

    assert eval_sets(Some(None)) == {}
    assert eval_sets(Some([1, 2])) == {"": [1, 2]}
    assert eval_sets(Some({"a": [1], "b": [2]})) == {"a": [1], "b": [2]}
    with pytest.raises(ConfigError, match=r"^eval_data\(\)\['b'\] returned a NoneType"):
        eval_sets(Some({"a": [1], "b": None}))


def test_an_empty_evaluation_set_is_refused_by_name(tmp_path):
    class Empty(Plain):
        def eval_data(self):
            return {"far": []}

    with pytest.raises(ConfigError, match=r"eval_data\(\) 'far' has no samples"):
        prepare(Empty(), configure(tmp_path, "run"))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda job: job.model(), r"needs a model\(\) method"),
        (lambda job: job.optimizer(None), r"needs an optimizer\(model\) method"),
        (lambda job: job.train_data(), r"needs a train_data\(\) method"),
        (lambda job: job.loss(None, None), r"needs a loss\(model, batch\) method"),
    ],
    ids=["model", "optimizer", "train_data", "loss"],
)
def test_a_job_says_which_method_it_lacks(call, said):
    class Half(Job):
        pass

    with pytest.raises(NotImplementedError, match=f"^Half {said}"):
        call(Half())


def test_a_job_is_named_after_its_module_and_known_by_its_source():
    assert job_name(Plain()) == "tiny-jobs"
    assert job_options(Plain(lr=0.5))["lr"] == 0.5
    assert job_options(Job()) == {}
    assert source_hash(Plain()) == source_hash(Plain(lr=3.0))
    assert len(source_hash(Plain())) == 64
