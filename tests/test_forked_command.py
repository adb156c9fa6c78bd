"""Commands that are forked from one server are as apart as commands of their own."""

from __future__ import annotations

import pytest

from tests.forked_command import ForkedCommand


@pytest.mark.ray
def test_drivers_forked_from_one_server_draw_different_ids(fork_server: None) -> None:
    """Ray's C++ draws the id with which a driver tries the object store; equal ones end the driver."""
    runs = [ForkedCommand("-c", "import ray; print(ray.ObjectID.from_random().hex())") for _ in range(3)]
    for run in runs:
        assert run.wait(30) == 0, run.output
    assert len({run.output for run in runs}) == len(runs), [run.output for run in runs]
