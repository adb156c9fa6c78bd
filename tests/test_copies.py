"""What tells equal copies from others: fingerprints of updates, digests of state, and the first thing that differs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.worker import copies
from elastic.worker.flags import NEUTRAL

BYTES = st.binary(min_size=1, max_size=10_000)


def of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@given(BYTES, st.data())
def test_weighted_sums_see_a_changed_byte_and_two_that_change_places(data, draw):
    at, other = (draw.draw(st.integers(0, len(data) - 1)) for _ in range(2))
    changed, swapped = bytearray(data), bytearray(data)
    changed[at] ^= draw.draw(st.integers(1, 255))
    swapped[at], swapped[other] = swapped[other], swapped[at]

    assert copies.weighted_sums(of(data)) == copies.weighted_sums(of(data).clone())
    assert copies.weighted_sums(of(bytes(changed))) != copies.weighted_sums(of(data))
    assert (copies.weighted_sums(of(bytes(swapped))) == copies.weighted_sums(of(data))) == (swapped == data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (4, 3)])
def test_a_tensor_s_digest_has_its_dtype_shape_and_bytes(dtype, shape):
    tensor = torch.ones(shape).to(dtype)

    assert copies.tensor_digest(tensor) == copies.tensor_digest(tensor.clone())
    assert copies.tensor_digest(tensor) != copies.tensor_digest(tensor.unsqueeze(0))
    assert copies.tensor_digest(tensor) != copies.tensor_digest(tensor.double())
    if tensor.numel():
        assert copies.tensor_digest(tensor) != copies.tensor_digest(tensor * 0)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.booleans())
def test_the_fence_says_whether_all_who_apply_said_the_same(fingerprints, spare):
    said = [copies.for_all(f) for f in fingerprints] + [NEUTRAL] * spare

    largest = [max(column) for column in zip(*said)]

    assert copies.equal(largest) == (len(set(fingerprints)) == 1)
    assert copies.equal(NEUTRAL)


def test_an_update_s_fingerprint_has_its_norm_rates_options_and_which_gradients_there_are():
    one, two = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    one.grad = torch.zeros(2)
    optimizer = torch.optim.AdamW([one, two], lr=0.1)
    found = [copies.update_fingerprint((1.0, 2.0), optimizer)]
    found.append(copies.update_fingerprint((1.0, 2.0 + 1e-15), optimizer))
    optimizer.param_groups[0]["lr"] = 0.2
    found.append(copies.update_fingerprint((1.0, 2.0), optimizer))
    optimizer.param_groups[0]["betas"] = (0.9, 0.95)
    found.append(copies.update_fingerprint((1.0, 2.0), optimizer))
    two.grad = torch.zeros(2)
    found.append(copies.update_fingerprint((1.0, 2.0), optimizer))

    assert len(set(found)) == len(found)
    assert all(0 <= f < 1 << 61 for f in found)


def test_the_order_in_which_a_worker_holds_its_state_is_no_difference():
    entries = [("model/weight", "", "a"), ("optimizer/weight/exp_avg", "", "b"), ("optimizer/bias/exp_avg", "0", "c")]

    assert copies._digest(entries) == copies._digest(entries[::-1])
    assert copies._digest(entries) != copies._digest([*entries[1:], ("model/weight", "", "d")])


def test_the_first_difference_is_named_with_those_who_differ_from_most():
    same = [("a", "", "1"), ("b", "0", "2")]

    assert copies.first_difference([("w0", same), ("w1", same), ("w2", same)]) is None
    assert copies.first_difference([("w0", same), ("w1", [("a", "", "1"), ("b", "1", "3")])]) is None  # other shards
    assert copies.first_difference([("w0", same), ("w1", same), ("w2", [("a", "", "9"), ("b", "0", "8")])]) == (
        "a",
        ["w2"],
    )
    assert copies.first_difference([("w0", same), ("w1", [("b", "0", "2")]), ("w2", same)]) == ("a", ["w1"])
