"""Jobs as scripts of the field have them train as one plain process does, at every exactness, strategy and world size,
or are refused by name. Some cells here; `make test-long` has all."""

from __future__ import annotations

import pytest

from tests import field_grid
from tests.field_grid import CASES, CELLS

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]
PAUSED = "2 then 3 then 1"
SOME = [
    ("annealed", ("bitwise", "fsdp", PAUSED)),
    ("codebook", ("fast", "fsdp", PAUSED)),
    ("packed", ("fast", "ddp", "3")),
    ("nested", ("fast", "fsdp", "2")),
    ("bank", ("fast", "ddp", "1")),
    ("backwards", ("fast", "fsdp", "2")),
    ("inner", ("fast", "fsdp", "2")),
    ("pre_clipped", ("bitwise", "fsdp", "2")),
    ("drifting", ("bitwise", "ddp", "1")),
    ("schedule_free", ("fast", "fsdp", "2")),
    ("sharp", ("fast", "ddp", "1")),
]


@pytest.mark.parametrize(("name", "cell"), SOME, ids=[f"{name} {' '.join(cell)}" for name, cell in SOME])
def test_a_job_of_the_field_trains_right_or_is_refused(name, cell, tmp_path):
    assert field_grid.judge(name, cell, tmp_path).faults == []


@pytest.mark.long
@pytest.mark.minutes
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CASES)
def test_jobs_of_the_field_train_right_or_are_refused_in_every_cell(name):
    assert [(found.cell, found.faults) for found in field_grid.grid([name], CELLS) if found.faults] == []
