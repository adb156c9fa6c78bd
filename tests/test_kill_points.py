"""Workers are killed at each point of a step, one after another: the others go on, with the same bits, and each sample
counts once."""

from __future__ import annotations

import pytest

from elastic.observe.ledger import gaps_and_doubles
from tests.forked import B, configure, fault, train
from tests.tiny_jobs import Everything

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]

#: Kills of a run: point, step, and rank in the world of that moment, which is smaller by one after each. Each point has
#: the first rank and the last one. The first world is formed before step 1, so those without a step come first.
RUNS = {
    "forming": [
        ("world.assigned", None, 0),
        ("world.connected", None, 3),
        ("step.forward", 1, 2),
        ("step.after_fence", 1, 0),
    ],
    "connecting": [
        ("world.assigned", None, 4),
        ("world.connected", None, 0),
        ("step.after_fence", 1, 2),
        ("step.forward", 2, 0),
    ],
    "first": [("eval.begin", 3, 0), ("step.reduce", 4, 3), ("checkpoint.staged", 4, 0), ("step.before_fence", 5, 1)],
    "last": [("eval.begin", 3, 4), ("step.reduce", 4, 0), ("checkpoint.staged", 4, 2), ("step.before_fence", 5, 0)],
    "saving": [
        ("checkpoint.before_stage", 4, 0),
        ("step.after_fence", 5, 3),
        ("step.before_fence", 12, 0),
        ("eval.begin", 12, 1),
    ],
    "ending": [
        ("checkpoint.before_stage", 4, 4),
        ("step.after_fence", 5, 0),
        ("step.forward", 12, 2),
        ("step.before_fence", 12, 1),
    ],
}


@pytest.mark.parametrize("kills", RUNS.values(), ids=list(RUNS))
def test_kills_one_after_another(kills, undisturbed, tmp_path):
    config = configure(tmp_path, "run", eval__every="3st", checkpoint__every="4st")
    marks = [tmp_path / f"killed-{number}" for number in range(len(kills))]
    faults = [fault(*kill, only=mark) for kill, mark in zip(kills, marks)]

    ran = train(Everything(), config, workers=5, faults=faults)

    assert all(mark.exists() for mark in marks)
    assert ran.sha == undisturbed.sha
    assert ran.column("loss") == undisturbed.column("loss")
    assert ran.evaluations == undisturbed.evaluations
    assert gaps_and_doubles(ran.rows, B) == []
    assert len(ran.history) == len([r for r in ran.rows if "sample_hash" in r]), "a step was done twice"
    assert len(ran.events("member_lost")) == len(kills)
