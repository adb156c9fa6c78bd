"""A run's figures where people already look: in Prometheus' format, and on a dashboard that asks for none other."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from elastic.observe.figures import FIGURES, Figures, exposition

ROOT = Path(__file__).parent.parent
ROW = {"sample_hash": "0", "step": 7, "time": 100.0, "step_s": 1.0, "loss": 2.5, "samples": 448, "lr": 0.1}


def test_records_become_figures_that_prometheus_reads():
    figures = Figures(total_steps=100)
    figures.hear({"kind": "world_formed", "detail": {"size": 3, "ids": ["a", "b", "c"]}})
    figures.hear(ROW)
    figures.hear({"kind": "member_lost", "time": 101.0})
    figures.hear({"kind": "world_formed", "detail": {"size": 2}})
    figures.hear({**ROW, "step": 8, "time": 105.0, "loss": None, "samples": 512})
    figures.hear({"kind": "checkpoint_committed", "time": 106.0, "step": 8, "detail": {"bytes": 1000}})
    figures.hear({"step": 8, "eval/loss": 1.0})
    found = {}
    for family in text_string_to_metric_families(exposition('a "run"', figures.values())):
        (sample,) = family.samples
        assert sample.labels == {"run": 'a "run"'}
        assert family.documentation
        found[sample.name] = sample.value

    assert math.isnan(found.pop("elastic_loss"))
    wanted = {
        "elastic_step": 8,
        "elastic_total_steps": 100,
        "elastic_world_size": 2,
        "elastic_workers_lost_total": 1,
        "elastic_worlds_formed_total": 2,
        "elastic_worlds_broken_total": 1,
        "elastic_stall_seconds_total": 4,
        "elastic_steps_done_total": 2,
        "elastic_samples_total": 512,
        "elastic_checkpoint_time_seconds": 106,
        "elastic_checkpoint_bytes": 1000,
    }
    assert {name: found[name] for name in wanted} == wanted
    assert "elastic_tokens_total" not in found, "this run has none"

    figures.hear({"kind": "parked"})
    assert figures.values()["elastic_parked"] == 1
    assert figures.values()["elastic_world_size"] == 0


def test_the_dashboard_asks_for_figures_that_there_are():
    board = json.loads((ROOT / "docs" / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    names = {name for expr in asked for name in re.findall(r"elastic_\w+", expr)}

    assert names <= set(FIGURES)
    assert len(names) > 15
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places)
