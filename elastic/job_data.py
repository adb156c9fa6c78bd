"""The data sets of a job: checked to be map-style, and measured for the command."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from elastic.errors import ConfigError
from elastic.job import Job, MapDataset
from elastic.job_code import job_code

_INSTEAD = {
    "DataLoader": "return the loader's dataset itself: `return loader.dataset` (batching and order are Elastic's)",
    "IterableDataset": "return `elastic.Lanes.of(stream)` for one of datasets, `elastic.Lanes(open)` for any other, "
    "or `list(stream)` if it fits in memory",
    "Ray Dataset": "return rows by index, for example `return dataset.to_pandas().to_dict('records')`",
}


def check_dataset(where: str, data: object) -> MapDataset:
    """Refuse a dataset that is not map-style; the message has the line to write instead.

    Args:
        where: what returned it, for messages.

    Raises:
        ConfigError: a DataLoader, an IterableDataset, a Ray Dataset, or anything without `len` and indexing.
    """
    names = {f"{c.__module__}.{c.__name__}" for c in type(data).__mro__}
    found = None
    if any(n.startswith("torch.utils.data") and n.endswith(".DataLoader") for n in names):
        found = "DataLoader"
    elif any(n.startswith("torch.utils.data") and n.endswith(".IterableDataset") for n in names):
        found = "IterableDataset"
    elif any(n.startswith("ray.data") for n in names):
        found = "Ray Dataset"
    if found:
        article = "an" if found[0] == "I" else "a"
        raise ConfigError(f"{where} returned {article} {found}, but data must be map-style; {_INSTEAD[found]}")
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise ConfigError(
            f"{where} returned a {type(data).__name__}, which has no __len__ and __getitem__; "
            "return a map-style dataset"
        )
    return data


def eval_sets(job: Job) -> dict[str, MapDataset]:
    """Return the job's held-out data by name (`""` for a set without a name), checked.

    Raises:
        ConfigError: a set is not map-style.
    """
    data = job.eval_data()
    if data is None:
        return {}
    named = dict(data) if isinstance(data, Mapping) else {"": data}
    return {name: check_dataset(f"eval_data()[{name!r}]" if name else "eval_data()", d) for name, d in named.items()}


def training_data(job: Job, call: Callable[[Callable[[], Any]], Any] | None = None) -> tuple[MapDataset, int]:
    """Return the job's training data and its number of samples, for the command itself.

    Args:
        call: calls `train_data`; by default it is called directly.

    Raises:
        ConfigError: it is not map-style, or the job's code raised.
    """
    with job_code("train_data()"):
        data = job.train_data() if call is None else call(job.train_data)
    checked = check_dataset("train_data()", data)
    with job_code("the length of what train_data() returned"):
        return checked, len(checked)


def held_out_sizes(job: Job) -> dict[str, int]:
    """Return how many samples each held-out set has, by name, for the command itself.

    Raises:
        ConfigError: a set is not map-style, or the job's code raised.
    """
    with job_code("eval_data()"):
        sets = eval_sets(job)
    with job_code("the length of what eval_data() returned"):
        return {name: len(data) for name, data in sets.items()}
