"""Of what Ray writes to a driver's console, what is shown."""

from __future__ import annotations

import logging
import os

import pytest
from ray._private import worker as ray_worker
from ray._private.authentication import authentication_token_setup as token_setup

from elastic.cluster.noise import cpp_lines_hidden, hidden, hide_token_hint, worth_showing

CPP = "[2026-11-28 14:49:00,451 {} 24253 24253] (gcs_server) gcs_placement_group_scheduler.cc:273: Failed to remove 1"


@pytest.mark.parametrize(
    ("source", "line", "shown"),
    [
        ("gcs_server", CPP.format("E"), None),
        ("gcs_server", CPP.format("C"), CPP.format("C")),
        ("4711", CPP.format("W"), None),
        ("4711", "[2026-11-28] what a user prints", "[2026-11-28] what a user prints"),
        ("autoscaler", "Adding 2 node(s) of type gpu.", None),
        ("raylet", "A worker died or was killed while executing a task by an unexpected system error. To", None),
        ("raylet", "3 Workers killed due to memory pressure (OOM)", "3 Workers killed due to memory pressure (OOM)"),
        (
            "raylet",
            "Raylet is terminated. Termination is unexpected. Possible reasons include: (1) SIGKILL\n  [state-dump]",
            "Raylet is terminated. Termination is unexpected.",
        ),
        (
            "raylet",
            "The node with node id: e1 has been marked dead because the detector has missed too many heartbeats from "
            "it. This can happen when a \t(1) raylet crashes",
            "The node with node id: e1 has been marked dead because the detector has missed too many heartbeats from "
            "it.",
        ),
    ],
)
def test_what_the_run_says_itself_is_left_out_and_what_matters_stays(source, line, shown):
    assert worth_showing(source, [line]) == ([] if shown is None else [shown])


def test_inside_a_driver_prints_what_is_worth_it_without_colours_where_nobody_looks(capsys, monkeypatch):
    monkeypatch.delenv("RAY_COLOR_PREFIX", raising=False)
    monkeypatch.delenv("RAY_SCHEDULER_EVENTS", raising=False)
    data = {"ip": "a", "localhost": "a", "is_err": False}
    before = ray_worker.print_worker_logs
    with hidden():
        for pid, line in (("gcs_server", CPP.format("E")), ("7", "hello")):
            ray_worker.print_to_stdstream({**data, "pid": pid, "lines": [line]}, ignore_prefix=False)
    assert capsys.readouterr().out == "(pid=7) hello\n"
    assert ray_worker.print_worker_logs is before


def test_of_what_is_written_to_standard_error_meanwhile_only_lines_in_c_are_lost(capfd):
    with cpp_lines_hidden():
        os.write(2, f"{CPP.format('W')}\nwhat a user prints\n{CPP.format('C')}\n".encode())
        assert capfd.readouterr().err == ""
    os.write(2, f"{CPP.format('W')}\n".encode())

    assert capfd.readouterr().err.splitlines() == ["what a user prints", CPP.format("C"), CPP.format("W")]


def test_a_token_is_no_news_but_that_there_is_none_is(caplog):
    hide_token_hint()
    with caplog.at_level(logging.WARNING):
        token_setup._warn_token_auth_enabled()
        token_setup._warn_token_auth_disabled()
    (said,) = caplog.messages
    assert said.startswith("Token authentication is disabled")
