"""`elastic doctor`: what it finds on a machine and in a place for runs, and what it says to do."""

from __future__ import annotations

import json
import os
import re
import signal
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic import cli
from elastic.cluster.examining import judge_autoscaler, rounds
from elastic.compat.ray import Autoscaling
from elastic.tools.doctor import run_doctor, text_of
from elastic.tools.machine import (
    GIB,
    Finding,
    Prober,
    Unanswered,
    examine_reduce,
    facts,
    free_port,
    judge_clock,
    judge_device,
    judge_machine,
    judge_memory,
    judge_reduce,
    judge_versions,
)
from elastic.tools.storing import examine_storage

PERMISSIONS = (Path(__file__).parent.parent / "docs" / "permissions.md").read_text()


def states(findings: list[Finding]) -> list[str]:
    return [f.state for f in findings]


# ---- judging --------------------------------------------------------------------------------------------------------


def test_versions_must_be_equal_and_who_has_which_is_told():
    same = {"python": "3.11.9", "torch": "2.13.0", "ray": "2.60.0", "elastic-train": "0.1.0", "numpy": "1"}
    assert states(judge_versions({"a": same, "b": {**same, "numpy": "2"}})) == ["ok"] * 4
    found = judge_versions({"a": same, "b": {**same, "torch": "2.12.0"}, "c": {**same, "ray": None}})
    assert states(found) == ["ok", "fail", "fail", "ok"]
    assert found[1].found == "torch: 2.12.0 on b; 2.13.0 on a, c"
    assert found[1].do == "install one version of torch everywhere"
    assert found[2].found == "ray: 2.60.0 on a, b; None on c"


@pytest.mark.parametrize(
    ("offset", "unsure", "state"),
    [(0.2, 0.0, "ok"), (-1.5, 0.0, "warn"), (1.5, 0.6, "ok"), (-31.0, 0.1, "fail"), (31.0, 2.0, "warn")],
)
def test_clocks_may_differ_as_much_as_the_answer_took(offset, unsure, state):
    assert judge_clock("a", offset, unsure).state == state


def test_a_full_disk_and_few_files_are_told():
    seen = facts()
    assert states(judge_machine("here", {**seen, "disk_free": 90 * GIB, "files": 65536})) == ["ok", "ok"]
    assert states(judge_machine("here", {**seen, "disk_free": 5 * GIB, "files": 1024})) == ["warn", "warn"]
    assert states(judge_machine("here", {**seen, "disk_free": GIB - 1, "files": -1})) == ["fail", "ok"]


def test_missing_gpus_fail_and_used_memory_is_told():
    seen = {"names": ["L4", "L4"], "memory": [(22 * GIB, 24 * GIB), (9 * GIB, 24 * GIB)]}
    assert judge_device("a", seen, 2).found == "2 x L4"
    assert judge_device("a", seen, 4).state == "fail"
    assert judge_device("a", {"names": ["AVX2"], "memory": []}, 0).found == "CPU (AVX2)"
    assert states(judge_memory("a", seen)) == ["ok", "warn"]


def test_one_who_failed_is_enough_for_a_sum_to_fail():
    fine = {"backend": "gloo", "connect_s": 0.1, "reduce_s": 0.01}
    assert judge_reduce("a - b", [fine, fine], []).found == "gloo: connected in 0.1 s, 4 MiB at 419 MB/s"
    assert judge_reduce("a - b", [fine], ["Timeout"]).state == "fail"


def test_what_an_autoscaler_could_not_start_fails_and_what_waits_in_vain_is_told():
    told = Autoscaling(failed=(("spot", ""),), unserved=(({"CPU": 3.0},),))

    found = judge_autoscaler("10.0.0.1:6379", told, {"spot": "no capacity"})

    assert [(f.state, f.found) for f in found] == [
        ("fail", "nodes of type spot could not be started: no capacity"),
        (
            "warn",
            "it can start no node for 3 CPU, asked for once: no type of node has as much, or as many as it may start "
            "are there",
        ),
    ]
    assert judge_autoscaler("10.0.0.1:6379", Autoscaling(), {}) == []


@given(st.integers(1, 40))
def test_every_pair_of_nodes_is_tried_once_and_nobody_twice_at_a_time(count):
    names = [f"n{i}" for i in range(count)]
    found = rounds(names)
    assert sorted(tuple(sorted(p)) for r in found for p in r) == sorted(
        tuple(sorted(p)) for p in combinations(names, 2)
    )
    assert all(len({n for p in r for n in p}) == 2 * len(r) for r in found)
    assert len(found) <= count


def test_the_table_says_what_to_do_below_what_is_wrong():
    found = [Finding("disk", "a", "ok", "much"), Finding("clock", "b", "warn", "+2 s", "set it")]
    assert text_of(found).splitlines()[1:] == [
        "ok     disk   a      much",
        "look   clock  b      +2 s",
        "      -> set it",
        "",
        "2 checks: a run would work; look at 1",
    ]
    assert "1 would make a run fail" in text_of([*found, Finding("x", "a", "fail", "y", "z")])


@pytest.mark.parametrize(("states_found", "code"), [(["ok"], 0), (["ok", "warn"], 0), (["warn", "fail", "ok"], 1)])
def test_the_exit_code_is_one_if_a_run_would_fail(states_found, code, capsys):
    arguments = cli.parser().parse_args(["doctor", "--address", "auto"])
    found = [Finding("disk", f"n{i}", state, "so much") for i, state in enumerate(states_found)]
    assert run_doctor(lambda address, storage: found, arguments) == code
    assert ("would make a run fail" in capsys.readouterr().out) == bool(code)


# ---- trying ---------------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_machine_and_a_folder_that_will_do(tmp_path, capsys):
    assert cli.main(["doctor", "--storage", str(tmp_path / "runs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {f["check"] for f in found} >= {"versions", "disk", "ports", "device", "matmul", "all-reduce", "storage"}
    assert not [f for f in found if f["state"] == "fail"]
    assert list((tmp_path / "runs").iterdir()) == [], "nothing is left behind"


@pytest.mark.processes
def test_a_prober_that_waits_in_vain_or_dies_is_told_of():
    host = "127.0.0.1"
    with Prober() as one, Prober() as other:
        alone = {"rank": 1, "size": 2, "store": (host, free_port(host)), "interface": "lo", "timeout_s": 1}
        with pytest.raises(Unanswered, match=r"DistNetworkError|DistStoreError|Timed? ?out"):
            one.ask(do="reduce", **alone)
        finding = examine_reduce("a - b", (one, other), (host, free_port(host)), ("lo", "lo"))
        assert finding.state == "ok", "the next one works"
        with pytest.raises(Unanswered, match=r"matmul took longer than 0 s"):
            one.ask(0.0, do="matmul")
        os.kill(other._process.pid, signal.SIGKILL)
        with pytest.raises(Unanswered, match=r"device ended its process with code -9"):
            other.ask(do="device")


def test_a_folder_that_cannot_be_written_fails(tmp_path):
    (tmp_path / "file").touch()
    (found,) = examine_storage(str(tmp_path / "file" / "runs"))
    assert (found.state, found.do) == ("fail", "let this user create files there")
    assert "cannot create files: NotADirectoryError" in found.found
    (found,) = examine_storage("ftp://ann:canary@host/runs")
    assert found.state == "fail"
    assert "canary" not in repr(found)


DENIED = [
    ({"method": "PUT", "key": r"/one"}, "s3:PutObject"),
    ({"method": "GET", "key": r"/one$"}, "s3:GetObject"),
    ({"method": "GET", "key": r"list-type=2"}, "s3:ListBucket"),
    ({"method": "POST", "key": r"/large\?uploads"}, "s3:PutObject and s3:AbortMultipartUpload"),
    ({"method": "GET", "key": r"\?uploads|&uploads"}, "s3:ListBucketMultipartUploads"),
    ({"method": "POST|DELETE", "key": r"delete|/one$"}, "s3:DeleteObject"),
]


@pytest.mark.processes
def test_each_permission_that_object_storage_denies_is_named(front, bucket):
    assert set(states(examine_storage(f"{bucket}/runs"))) == {"ok"}
    for fault, permission in DENIED:
        front.fault(**fault, status=403, code="AccessDenied", count=99)
        found = [f for f in examine_storage(f"{bucket}/runs") if f.state == "fail"]
        front.clear()
        assert any(f.do.startswith(f"allow {permission} on arn:aws:s3:::{bucket[5:]}") for f in found), permission
        for name in re.findall(r"s3:\w+", permission):
            assert f'"{name}"' in PERMISSIONS, "the documented policy allows it"
            assert f"`{name}`" in PERMISSIONS, "and says what for"
