"""A worker is killed at each point of a step: the others go on, with the same bits, and each sample counts once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elastic.observe.ledger import gaps_and_doubles
from tests.forked import B, configure, train
from tests.tiny_jobs import Everything

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]

POINTS = [
    ("step.forward", 2),
    ("step.reduce", 4),
    ("step.before_fence", 5),
    ("step.after_fence", 5),
    ("eval.begin", 3),
    ("checkpoint.before_stage", 4),
    ("checkpoint.staged", 4),
    ("world.assigned", -1),
    ("world.connected", -1),
    ("step.after_fence", 1),
    ("step.before_fence", 12),
]


def kill_once(point: str, step: int, rank: int, mark: Path) -> dict[str, Any]:
    return {"point": point, "step": step, "rank": rank, "do": "kill", "only": str(mark)}


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(("point", "step"), POINTS)
def test_a_kill_at(point, step, rank, undisturbed, tmp_path):
    config = configure(tmp_path, "run", eval__every="3st", checkpoint__every="4st")

    ran = train(Everything(), config, workers=3, faults=[kill_once(point, step, rank, tmp_path / "mark")])

    assert ran.sha == undisturbed.sha
    assert ran.column("loss") == undisturbed.column("loss")
    assert ran.evaluations == undisturbed.evaluations
    assert gaps_and_doubles(ran.rows, B) == []
    assert len(ran.history) == len([r for r in ran.rows if "sample_hash" in r]), "a step was done twice"
    assert len(ran.events("member_lost")) == 1
