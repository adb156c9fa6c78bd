"""How a run is doing: figures with goals, verdicts and advice, from rows that may be anything."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.observe.health import GOOD, NOTED, POOR, Sign, health


def _rows(count: int = 40, **columns: Any) -> list[dict[str, Any]]:
    row = {"sample_hash": "0", "step_s": 1.0, "compute_s": 0.9, "sync_s": 0.03, "data_s": 0.01, "world_size": 4}
    row |= {"count": 64, "device_memory": 0.8, "loss": 2.0, "grad_norm": 1.0, **columns}
    return [{**row, "step": s, "tokens": 640 * s, "samples": 64 * s} for s in range(1, count + 1)]


def _of(rows: list[dict[str, Any]], events: list[dict[str, Any]] | None = None) -> dict[str, Sign]:
    return {sign.name: sign for sign in health(rows, events or ())}


def test_a_run_that_does_well():
    device = json.dumps({"name": "NVIDIA H100 80GB HBM3", "type": "cuda"})
    warm = {"kind": "worker_warm", "detail": {"device": device, "flops_per_sample": 25e12}}
    rows = [{"gradient_bytes": 1e9}, *_rows()]
    found = _of(rows, [warm])

    judged = {n: s for n, s in found.items() if s.verdict != NOTED}
    assert all(sign.verdict == GOOD and not sign.advice for sign in judged.values()), judged
    assert {"device memory", "computing", "synchronising", "waiting for data", "loss", "gradient norm"} < set(judged)
    assert found["throughput"].value == 64
    assert found["throughput of tokens"].value == 640
    assert found["bandwidth of gradients"].value == 1.5e9 / 0.03
    assert round(found["model FLOP/s utilisation"].value or 0, 3) == round(25e12 * 16 / 989e12, 3)


def test_what_is_wrong_is_named_with_what_to_try():
    rows = _rows(compute_s=0.5, sync_s=0.3, data_s=0.15, device_memory=0.2)
    rows[-1]["loss"] = None
    for row in rows[-6:]:
        row["grad_norm"] = 50.0
    found = _of(rows)

    for name, advice in {
        "device memory": "--batch.pass-size",
        "computing": "what else",
        "synchronising": "--precision.grad-compression",
        "waiting for data": "--data.workers",
        "loss": "not finite",
        "gradient norm": "grows fast",
    }.items():
        assert found[name].verdict == POOR, name
        assert advice in found[name].advice
    assert found["bandwidth of gradients"].value is None
    assert "close to running out" in _of(_rows(device_memory=0.97))["device memory"].advice


_VALUES = st.one_of(st.none(), st.floats(), st.integers(-3, 9), st.text(max_size=2), st.booleans())
_NAMES = [
    "step_s",
    "compute_s",
    "sync_s",
    "data_s",
    "world_size",
    "count",
    "device_memory",
    "loss",
    "grad_norm",
    "tokens",
    "gradient_bytes",
]


@given(
    st.lists(
        st.fixed_dictionaries(
            {"step": st.one_of(st.integers(0, 9), _VALUES)}, optional=dict.fromkeys([*_NAMES, "sample_hash"], _VALUES)
        )
    )
)
@settings(max_examples=100, deadline=None)
def test_whatever_rows_say_the_signs_are_strict_json(rows):
    json.dumps([sign.to_json() for sign in health(rows)], allow_nan=False)
