"""What a worker's arithmetic depends on: what bitwise sets, what is left to the job, and what workers compare."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from elastic.parallel.device import describe
from tests.forked import configure, train
from tests.tiny_jobs import Plain

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]


class Coarse(Plain):
    """Chooses how float32 products are rounded, while it builds its model."""

    def model(self):
        torch.set_float32_matmul_precision("medium")
        return super().model()


class _Unwritten(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.inner(x)
        return found + torch.empty_like(found)


class Careless(Plain):
    """Reads memory that nobody wrote."""

    def model(self):
        return _Unwritten(super().model())


def test_the_precision_of_products_is_the_jobs_choice_and_part_of_what_makes_devices_alike():
    before = describe(torch.device("cpu"))
    torch.set_float32_matmul_precision("medium")
    try:
        after = describe(torch.device("cpu"))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = "none"

    assert {key for key in before if before[key] != after[key]} == {"precision"}
    assert describe(torch.device("cpu")) == before


def test_what_the_job_sets_while_it_is_built_is_in_what_its_device_is(tmp_path):
    ran = train(Coarse(), configure(tmp_path, "run", run__stop_after="2st"), workers=1)

    device = json.loads(ran.events("worker_warm")[0]["detail"]["device"])
    assert device["precision"] == "matmul=bf16 conv=ieee"
    assert ran.result["hardware"]["precision"] == device["precision"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_who_reads_unwritten_memory_is_found_while_the_job_is_tried(strategy, tmp_path):
    options = {"run__stop_after": "2st", "parallel__strategy": strategy}

    ran = train(Careless(), configure(tmp_path, "run", **options), workers=1)

    assert "reads a tensor that it has not written, as torch.empty()" in str(ran.failure)
    assert not ran.rows
