"""What the passes of a step did to buffers, put together by one worker; between several: `tests.test_random_jobs`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from elastic.errors import ConfigError
from elastic.parallel.buffers import StepBuffers
from elastic.parallel.moves import average_moves, fingerprint

START = {"mean": [1.0, 2.0], "count": [5, 5], "flag": [False]}


def begun() -> StepBuffers:
    model = nn.Module()
    for name, value in START.items():
        model.register_buffer(name, torch.tensor(value))
    buffers = StepBuffers(model, exact=True)
    buffers.begin()
    return buffers


def after(**values: list) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def put_together(passes: list[dict[str, torch.Tensor]], counts: list[int]) -> dict[str, list]:
    buffers = begun()
    touched = [name for name in START if any(name in one for one in passes)]
    average_moves(buffers, touched, passes, counts, sum(counts), [float(fingerprint(buffers, passes))])
    return {name: buffer.tolist() for name, buffer in buffers.named.items()}


def test_floats_move_by_the_mean_over_microbatches_whether_or_not_a_pass_moved_them():
    found = put_together([after(mean=[2.0, 2.0]), after(mean=[1.0, 5.0]), {}], [1, 2, 1])

    assert found == START | {"mean": [1.25, 3.5]}


def test_what_is_infinite_at_first_becomes_the_mean_of_what_the_passes_made_of_it():
    model = nn.Module()
    model.register_buffer("least", torch.tensor([float("inf"), 1.0]))
    buffers = StepBuffers(model, exact=True)
    buffers.begin()
    passes = [after(least=[2.0, 1.0]), after(least=[4.0, 0.0])]

    average_moves(buffers, ["least"], passes, [1, 1], 2, [0.0])

    assert buffers.named["least"].tolist() == [3.0, 0.5]


@pytest.mark.parametrize("exact", [False, True])
def test_a_buffer_that_only_a_backward_pass_writes_to_is_refused_by_name(exact):
    model = nn.Sequential(nn.BatchNorm1d(2))
    model.register_buffer("size", torch.zeros(1))
    buffers = StepBuffers(model, exact=exact)

    def run(write=lambda gradient: None):
        buffers.begin()
        before = buffers.versions()
        out = model(torch.randn(3, 2))
        changed = buffers.copies_since(before)
        out.register_hook(write)
        out.sum().backward()
        buffers.passed(before, changed)

    run()
    run(lambda gradient: model[0].num_batches_tracked.add_(1) and None)  # as where it is computed again
    assert model[0].num_batches_tracked == 0
    with pytest.raises(ConfigError, match="buffer size is written to in backward passes"):
        run(lambda gradient: model.size.add_(gradient.abs().sum()) and None)


def test_whole_numbers_are_those_of_the_passes_that_moved_them():
    found = put_together([{}, after(count=[6, 5], flag=[True]), after(count=[5, 5]), after(count=[6, 5])], [1] * 4)

    assert found == START | {"count": [6, 5], "flag": [True]}


def test_passes_that_moved_a_whole_number_in_two_ways_are_refused_by_its_name():
    with pytest.raises(RuntimeError, match="buffer count took different values in two microbatches"):
        put_together([after(count=[6, 5]), after(count=[7, 5])], [1, 1])


def test_fingerprints_tell_other_moves_and_not_who_moved():
    buffers = begun()

    def of(*passes: dict[str, torch.Tensor]) -> float:
        return float(fingerprint(buffers, list(passes)))

    assert of({}) == of(after(mean=[9.0, 9.0])) == of(after(count=[5, 5])) == 0.0
    assert of(after(count=[6, 5])) == of({}, after(count=[6, 5])) == of(after(count=[6, 5]), after(count=[5, 5])) != 0.0
    ways = [after(count=[6, 5]), after(count=[5, 6]), after(count=[4, 5]), after(flag=[True]), after(count=[6, 6])]
    assert len({of(way) for way in ways}) == len(ways)
