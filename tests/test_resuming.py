"""Which options a run may be resumed with: what changed is seen, what is new counts as its default, old files too."""

from __future__ import annotations

import enum
import json
import math
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any

import pytest

from elastic import config as cfg
from elastic.config import OptimOptions, TrainConfig
from elastic.errors import ConfigError
from elastic.job import Job
from elastic.job_options import coded_options, job_options, with_options
from elastic.observe.ledger import finite
from elastic.run.resuming import CODED, changes, is_over, refuse_changes


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Size:
    width: int = 3
    depth: tuple[int, ...] = (1, 2)


@dataclass
class Mine(Job):
    most: float = math.inf
    least: float = math.nan
    folder: Path = Path("a/b")
    color: Color = Color.RED
    size: Size = field(default_factory=Size)
    sizes: tuple[int, ...] = (1, 2)
    act: Any = len


def stored(job: Job, config: TrainConfig | None = None) -> dict[str, Any]:
    """As config.json has it now."""
    result = cfg.result_options(config or TrainConfig(), job_options(job))
    return json.loads(json.dumps({CODED: 1, "result": result}, allow_nan=False))


def stored_long_ago(job: Job) -> dict[str, Any]:
    """As earlier versions wrote it."""
    options = {f"job.{k}": v for k, v in job_options(job).items()}
    found = {**cfg.result_options(TrainConfig(), {}), **options}
    return {"result": finite(json.loads(json.dumps(found, default=str)))}


@pytest.mark.parametrize("written", [stored, stored_long_ago])
def test_options_that_json_does_not_have_are_equal_to_themselves(written: Any):
    assert changes(written(Mine()), TrainConfig(), Mine()) == {}
    assert list(changes(written(Mine()), TrainConfig(), Mine(color=Color.BLUE, sizes=(1, 3)))) == [
        "job.color",
        "job.sizes",
    ]


def test_what_changed_is_told_as_one_would_write_it():
    found = changes(stored(Mine()), TrainConfig(optim=OptimOptions(clip_norm=1.0)), Mine(most=3.0, size=Size(4)))

    assert list(found) == ["job.most", "job.size", "optim.clip-norm"]
    refuse_changes(found, tuple(found), "run")
    with pytest.raises(ConfigError, match=r"^--job\.most is 3\.0, but run x was started with inf; give that, another"):
        refuse_changes(found, (), "x")
    with pytest.raises(
        ConfigError, match=r"^--job\.size is Size\(width=4, depth=\(1, 2\)\), but run x was started with"
    ):
        refuse_changes(found, ("job.most",), "x")


def test_an_option_that_is_new_counts_as_its_default_and_one_that_is_gone_is_a_change():
    old = make_dataclass("Old", [("lr", float, 0.1)], bases=(Job,))
    new = make_dataclass("New", [("lr", float, 0.1), ("more", Color, Color.RED)], bases=(Job,))

    assert changes(stored(old()), TrainConfig(), new()) == {}
    assert list(changes(stored(old()), TrainConfig(), new(more=Color.BLUE))) == ["job.more"]
    assert list(changes(stored(new()), TrainConfig(), old())) == ["job.more"]

    derived = ("derived", int, field(init=False, default=0))  # which the job makes by itself
    made = make_dataclass("Made", [("lr", float, 0.1), derived], bases=(Job,))
    assert changes(stored(made()), TrainConfig(), made()) == {}


def test_a_run_is_over_unless_it_is_to_be_longer():
    finished, result = {"status": "finished"}, {"steps": 6}

    assert is_over(finished, result, 6)
    assert is_over(finished, result, 5)
    assert not is_over(finished, result, 7)
    assert not is_over({"status": "stopped"}, result, 6)
    assert not is_over(None, None, 6)


def test_options_go_to_workers_as_they_are_and_what_cannot_is_refused_by_name():
    given = Mine(most=-math.inf, folder=Path("c"), color=Color.BLUE, size=Size(9, (0,)), sizes=())
    sent = json.loads(json.dumps(coded_options(given), allow_nan=False))

    assert job_options(with_options(Mine, sent)).items() >= {"color": Color.BLUE, "size": Size(9, (0,))}.items()
    assert with_options(Mine, sent) == given or math.isnan(given.least)
    assert (with_options(Mine, sent).most, with_options(Mine, sent).sizes) == (-math.inf, ())
    assert "act" not in sent, "a default is there already"
    with pytest.raises(ConfigError, match=r"^--job\.act is a function, which is not kept.*sent to the workers"):
        coded_options(Mine(act=print))
