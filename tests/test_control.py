"""Live control from the command line, in plain processes: status, checkpoint, scale, drain and stop of a run that goes
on meanwhile; who may, and what is said where nobody is there to be asked."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from elastic import cli
from elastic.membership.driver import DriverLink
from elastic.membership.protocol import Close, Existing, Gone, Grant, Leaving, Note, Request
from elastic.observe.ledger import gaps_and_doubles
from elastic.run.folder import GRANTS, RunFolder
from elastic.run.prepare import prepare
from elastic.storage import Storage
from elastic.tools.live import connect, drain
from elastic.worker.local import LocalRun
from tests.forked import WAIT_S, B, Ran, Watch, configure, fault, local_run, plan, train
from tests.tiny_jobs import Deep, Everything

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("fork_server")]
ENDLESS = "100000st"


def elastic(*arguments: object, code: int = 0) -> None:
    assert cli.main(list(map(str, arguments))) == code


def while_it_runs(local: LocalRun, script: Callable[[], None], wait_s: float = WAIT_S) -> None:
    """Give commands on the side while this thread looks after the processes; the script stops the run."""

    def stopping() -> None:
        try:
            script()
        finally:
            local.stop("the test is over")

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(stopping)
        local.wait(wait_s)
        done.result()


def test_a_run_is_looked_at_saved_scaled_both_ways_drained_and_stopped_without_a_lost_step_or_bit(tmp_path, capsys):
    watch, url = Watch(), tmp_path / "run"
    run = prepare(Everything(), configure(tmp_path, "run", run__duration=ENDLESS, scaling__max_workers=3))
    seen: dict[str, Any] = {}

    def told(*arguments: object) -> Any:
        elastic(*arguments, "--json")
        return json.loads(capsys.readouterr().out)

    def script() -> None:
        watch.wait_for_step(5)
        seen["status"] = told("status", url)
        seen["saved"] = told("checkpoint", url)
        seen["checkpoints"] = [c["step"] for c in told("checkpoints", "ls", url)["checkpoints"]]
        seen["down"] = told("scale", url, "--max-workers", 2)
        seen["after"] = told("status", url)
        leaver = seen["after"]["workers"][0]["id"]
        seen["drained"] = told("drain", url, leaver)
        seen["up"] = told("scale", url, "--max-workers", 3)
        seen["stopped"] = told("stop", url)

    with local_run(run, 3, on_record=watch) as local:
        while_it_runs(local, script)

    status = seen["status"]
    assert (status["status"], status["asked"], status["phase"]) == ("running", True, "running")
    assert [(w["id"], w["rank"], w["state"]) for w in status["workers"]] == [
        (f"w1-{i}", i, "in the world") for i in range(3)
    ]
    assert all(w["memory_bytes"] > 50 << 20 and w["device_memory"] is None for w in status["workers"])
    assert len(status["rows"]) == len(status["events"]) == 5
    assert seen["saved"]["step"] >= status["step"]
    assert seen["saved"]["step"] in seen["checkpoints"]
    assert (seen["down"]["was"], seen["down"]["world_size"]) == (3, 2)
    assert len(seen["after"]["workers"]) == 2
    assert seen["up"]["world_size"] == 3
    assert seen["stopped"]["status"] == "stopped"

    ran = Ran(run, None)
    sizes = [e["detail"]["size"] for e in ran.events("world_formed")]
    assert sizes == [3, 2, 1, 3]
    assert [e["member"] for e in ran.events("handed_over")][1] == seen["drained"]["worker"]
    assert [e["detail"]["max_workers"] for e in ran.events("scaled")] == [2, 3]
    newest = ran.events("world_formed")[-1]["detail"]
    assert [(m["id"], m["pid"]) for m in run.folder.status()["members"]] == list(zip(newest["ids"], newest["pids"]))
    assert not ran.events("member_lost")
    assert "stopped by" in ran.result["message"]
    steps = seen["stopped"]["step"]
    assert steps == ran.result["steps"] == seen["stopped"]["checkpoint"]
    assert gaps_and_doubles(ran.rows, B) == []
    assert len([r for r in ran.rows if "sample_hash" in r]) == steps, "a step was done twice"
    twin = train(
        Everything(),
        configure(tmp_path, "twin", run__duration=ENDLESS, run__stop_after=f"{steps}st", batch__microbatches=10),
        workers=1,
    )
    assert ran.sha == twin.sha
    assert os.listdir(url / GRANTS) == [], "grants count once"


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp"])
def test_a_sharded_run_is_scaled_both_ways_without_a_lost_step_or_bit(tmp_path, capsys, strategy):
    watch, url = Watch(), tmp_path / "run"
    options: dict[str, Any] = {"run__duration": ENDLESS, "batch__microbatches": 10}
    places = {"parallel__strategy": strategy, "scaling__max_workers": 4, "scaling__workers_per_node": 2}
    run = prepare(Deep(), configure(tmp_path, "run", **options, **places))

    def script() -> None:
        watch.wait_for_step(4)
        elastic("scale", url, "--max-workers", 2)
        elastic("scale", url, "--max-workers", 4)
        elastic("stop", url)

    with local_run(run, 4, on_record=watch) as local:
        while_it_runs(local, script)

    ran = Ran(run, None)
    assert [e["detail"]["size"] for e in ran.events("world_formed")] == [4, 2, 4]
    steps = ran.result["steps"]
    assert gaps_and_doubles(ran.rows, B) == []
    assert len([r for r in ran.rows if "sample_hash" in r]) == steps, "a step was done twice"
    twin = train(Deep(), configure(tmp_path, "twin", **options, run__stop_after=f"{steps}st"), workers=1)
    assert ran.sha == twin.sha


def test_a_run_in_object_storage_is_steered_as_well(front, bucket, tmp_path, capsys):
    watch, url = Watch(), f"{bucket}/runs/run"
    run = prepare(Everything(), configure(f"{bucket}/runs", "run", run__duration=ENDLESS))
    with local_run(run, 2, on_record=watch) as local:
        watch.wait_for_step(3)
        elastic("runs", f"{bucket}/runs", "--status", "running", "--json")
        (listed,) = json.loads(capsys.readouterr().out)["runs"]
        elastic("status", url, "--last", 2, "--json")
        seen = json.loads(capsys.readouterr().out)
        elastic("checkpoint", url)
        elastic("stop", url)
        local.wait(WAIT_S)

    assert (listed["name"], listed["status"]) == ("run", "running")
    assert seen["asked"], "the server was found and convinced by the bucket alone"
    assert [r["step"] for r in seen["rows"]] == [seen["step"] - 1, seen["step"]]
    assert Ran(run, None).result["status"] == "stopped"
    assert Storage(f"{url}/{GRANTS}").names() == []


def test_a_server_that_is_killed_meanwhile_is_convinced_and_asked_again(tmp_path, gate):
    watch, held = Watch(), gate("held")
    run = prepare(Everything(), configure(tmp_path, "run", run__duration=ENDLESS))
    faults = plan(fault("step.forward", 6, 0, "hold", file=held))
    with local_run(run, 2, on_record=watch, environment=faults, own_host={}) as local:
        watch.wait_for_step(5)
        said: list[str] = []

        def say(text: str) -> None:
            said.append(text)
            if len(said) == 1:
                local.hosting.process.kill()
                watch.wait_for(lambda record: record.get("kind") == "resumed")
                held.unlink()

        drained = drain(connect(run.folder, "drain"), "w1-0", 0.0, say, WAIT_S)
        local.stop()
        local.wait(WAIT_S)

    ran = Ran(run, None)
    assert local.hosting.restarts == 1
    assert drained["worker"] == "w1-0"
    assert [e["member"] for e in ran.events("handed_over")] == ["w1-0"]
    assert ran.column("world_size")[-1] == 1
    assert gaps_and_doubles(ran.rows, B) == []


def test_a_parked_run_is_stopped_with_its_state_saved_and_a_scale_that_cannot_be_is_refused(tmp_path, capsys):
    watch, url = Watch(), tmp_path / "run"
    options = {"scaling__max_workers": 3, "scaling__min_workers": 2}
    run = prepare(Everything(), configure(tmp_path, "run", run__duration=ENDLESS, **options))
    with local_run(run, 2, on_record=watch) as local:
        watch.wait_for_step(3)
        for most, why in ((1, "fewer than the run's --scaling.min-workers 2"), (11, "--batch.microbatches 10")):
            elastic("scale", url, "--max-workers", most, code=2)
            assert why in capsys.readouterr().err
        elastic("drain", url, "w1", code=2)
        assert "WORKER is 'w1', which is several of w1-0, w1-1" in capsys.readouterr().err
        elastic("drain", url, "w1-0", "--timeout", "1s", code=1)
        assert "still to let worker w1-0 go" in capsys.readouterr().err
        local.processes[1].kill()
        watch.wait_for(lambda record: record.get("kind") == "parked")

        elastic("status", url)
        shown = capsys.readouterr().out
        elastic("stop", url)
        stopped = capsys.readouterr()
        local.wait(WAIT_S)

    assert "parked" in shown.splitlines()[0]
    assert "between worlds, to go" in shown
    ran = Ran(run, None)
    assert ran.result["status"] == "stopped"
    assert stopped.out.startswith(f"stopped after step {ran.result['steps']} of 100000; newest checkpoint: step ")
    assert "asked to save and end" in stopped.err
    assert ran.state()["step"] == ran.result["steps"] >= 3


def test_a_live_run_prunes_its_own_checkpoints_when_asked_and_is_never_removed(tmp_path, capsys):
    watch, url = Watch(), tmp_path / "runs" / "run"
    options = {"checkpoint__every": "2st", "checkpoint__keep_last": 50}
    run = prepare(Everything(), configure(tmp_path / "runs", "run", run__duration=ENDLESS, **options))

    def told(*arguments: object) -> Any:
        elastic(*arguments, "--json")
        return json.loads(capsys.readouterr().out)

    with local_run(run, 2, on_record=watch) as local:
        watch.wait_for_step(12)
        before = {c["step"] for c in told("checkpoints", "ls", url)["checkpoints"]}
        would = {r["step"] for r in told("checkpoints", "prune", url, "--keep-last", 1)["would_remove"]}
        assert {2, 4} <= would
        assert before - {max(before)} <= would
        gone = {r["step"] for r in told("checkpoints", "prune", url, "--keep-last", 1, "--yes")["removed"]}
        assert would <= gone
        left = {c["step"] for c in told("checkpoints", "ls", url)["checkpoints"]}
        assert not gone & left
        assert max(left) > max(gone)
        elastic("checkpoints", "prune", url, "--keep-last", 0, code=2)
        assert "--keep-last is 0; give 1 or more" in capsys.readouterr().err
        best = told("checkpoints", "prune", url, "--mode", "max", "--metric", "eval/near/loss")
        assert best["would_remove"] == [], "the run's own policy, but for what was given"
        (run_told,) = told("prune", tmp_path / "runs", "--older-than", "0s", "--yes")["runs"]
        assert (run_told["do"], run_told["why"][:5]) == ("keep", "live:")
        step = told("status", url)["step"]
        watch.wait_for_step(step + 5)
        local.stop()
        result = local.wait(WAIT_S)

    ran = Ran(run, None)
    assert ran.state()["step"] == result["steps"] > step
    assert gaps_and_doubles(ran.rows, B) == []
    assert not ran.events("checkpoint_failed")


def test_only_who_may_write_into_the_folder_is_obeyed_and_only_in_what_control_is_for(tmp_path):
    watch = Watch()
    run = prepare(Everything(), configure(tmp_path, "run", run__duration=ENDLESS))
    with local_run(run, 1, on_record=watch) as local:
        watch.wait_for_step(1)
        folder, secret, grant = run.folder, secrets.token_urlsafe(32), secrets.token_hex(16)
        server = folder.status()["server"]

        def answer(what: str | Request, key: str = secret) -> int:
            try:
                DriverLink(server, key).request(what)
            except urllib.error.HTTPError as error:
                return error.code
            return 200

        ask = Grant(grant, secret)
        assert answer("/run") == 401
        assert answer(ask) == 401, "nothing was left in the folder"
        folder.leave_grant(grant, secrets.token_urlsafe(32))
        assert answer(ask) == 401, "the hash is another's"
        folder.withdraw_grant(grant)
        assert answer(Grant("../../status", secret)) == 400
        folder.leave_grant(grant, secret)
        held = folder.storage.read(f"{GRANTS}/{grant}.json").decode()
        assert answer(ask, key="") == 200
        assert answer("/run") == 200
        assert answer(ask) == 401, "a grant counts once"
        closed = ("/group", "/status", "/follow", "/worker?id=x")
        for what in (*closed, Gone([], True), Close("failed"), Note("a", "b"), Leaving("n", 1.0), Existing([])):
            assert answer(what) == 401, what
        for key in (json.loads(held)["sha256"], grant, "", "é"):
            assert answer("/run", key=key) == 401
        token = local.token
        local.stop()
        local.wait(WAIT_S)

    assert secret not in held
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert token.encode() not in written
    assert secret.encode() not in written


# ---- nobody there ---------------------------------------------------------------------------------------------------


@pytest.fixture
def left(tmp_path: Path) -> Callable[..., Path]:
    """Makes the folder of a run whose status says this."""

    def make(name: str = "run", job: str = "digits", **status: object) -> Path:
        folder = RunFolder(Storage(str(tmp_path / "runs" / name)))
        values = {
            "status": "running",
            "heartbeat": time.time(),
            "epoch": 1,
            "step": 7,
            "total_steps": 9,
            "message": "",
            "world": {"generation": "1-1", "size": 2},
            "owner": "ann@host-7 (process 41)",
            "host": "host-7",
            **status,
        }
        folder.write_status(values)
        folder.write_config({"job": {"name": job}, "config": {}})
        return tmp_path / "runs" / name

    return make


VERBS = (("stop",), ("checkpoint",), ("scale", "--max-workers", "2"), ("drain", "w1-0"))


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_without_a_live_run_a_command_says_so_and_exits_with_one(left, capsys, verb):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        cases = {
            "is not live (finished after step 7)": {"status": "finished"},
            "is not live (lost after step 7)": {"heartbeat": time.time() - 90},
            "gives no address of its server": {},
            "is served on host-7 for that machine alone": {"server": nobody},
            "cannot be reached": {"server": nobody, "host": os.uname().nodename},
        }
        for number, (why, status) in enumerate(cases.items()):
            url = left(f"run{number}", **status)
            elastic(verb[0], url, *verb[1:], code=1)
            told = capsys.readouterr().err
            assert why in told
            assert told.startswith(f"error: run {url} ")
            assert told.count("\n") == 1
            assert list(url.glob(f"{GRANTS}/*")) == [], "what was left for the server is taken back"


def test_runs_are_listed_with_what_became_of_them_and_filtered(left, capsys):
    left("a", status="finished")
    left("b", job="codegpt")
    left("c", heartbeat=time.time() - 61)
    left("d", owner_process={"pid": 1})
    (left("e") / "status.json").write_text("{")
    new = left("f")
    (new / "status.json").unlink()
    runs = new.parent
    (runs / "notes.txt").write_text("no run")
    (runs / "empty").mkdir()

    def told(*options: object) -> dict[str, str]:
        elastic("runs", runs, "--json", *options)
        return {r["name"]: r["status"] for r in json.loads(capsys.readouterr().out)["runs"]}

    everything = {"a": "finished", "b": "running", "c": "lost", "d": "running", "e": "unreadable", "f": "new"}
    assert told() == everything
    assert told("--status", "running,lost") == {"b": "running", "c": "lost", "d": "running"}
    assert told("--job", "code*") == {"b": "running"}
    assert told("--name", "[ab]", "--status", "finished") == {"a": "finished"}
    elastic("runs", runs)
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["run", "status", "job", "step", "workers", "heartbeat", "disk", "owner"]
    assert table[2].split()[:5] == ["b", "running", "codegpt", "7/9", "2"]
    elastic("runs", runs, "--status", "lost,failed", "--exit-code", code=1)
    assert "c " in capsys.readouterr().out
    elastic("runs", runs, "--status", "failed", "--exit-code", code=0)
    elastic("runs", runs, "--status", "dead", code=2)
    assert "--status is 'dead'; give some of running, parked, lost" in capsys.readouterr().err
    elastic("runs", runs / "a", code=2)
    assert "which is a run; give the folder of runs" in capsys.readouterr().err
    elastic("runs", runs / "nowhere", code=2)
    assert "which is no folder; give that of --run.storage" in capsys.readouterr().err


HOSTILE = (
    b"[]",
    b"null",
    b"5",
    b'"x"',
    b"",
    b"\xff\xfe",
    b"[" * 100_000,
    b"1" * 5000,
    b'{"format": 1}',
    b'{"format": {}}',
    b'{"format": 1, "job": 5}',
    b'{"format": 1, "job": {"name": []}, "config": 7}',
    b'{"format": 1, "status": "running", "heartbeat": 1e300, "owner_process": 5}',
    b'{"format": 1, "status": "running", "heartbeat": 1e300, "world": 5, "step": {}, "owner": []}',
    b'{"format": 1, "status": "running", "heartbeat": 1e300, "owner_process": null, "owner": "x", "message": null, '
    b'"step": 1, "world": null, "members": null, "server": "http://[::1"}',
)


@pytest.mark.parametrize("name", ["status.json", "config.json", "result.json", "claims/000001.json"])
def test_a_run_that_cannot_be_read_hides_no_other(left, capsys, name):
    runs = left("whole", status="finished").parent
    for number, text in enumerate(HOSTILE):
        path = left(f"bad{number}", status="finished") / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text)
    loop = left("loop") / name
    loop.unlink(missing_ok=True)
    loop.parent.mkdir(exist_ok=True)
    loop.symlink_to(loop)
    (runs / "folder").symlink_to(runs / "folder")
    for verb in (("runs", runs), ("runs", runs, "--json"), ("prune", runs, "--older-than", "1d")):
        elastic(*verb)
        assert "whole" in capsys.readouterr().out
    for number in range(len(HOSTILE)):
        cli.main(["status", str(runs / f"bad{number}")])
        assert "Traceback" not in capsys.readouterr().err


def test_what_a_terminal_would_obey_is_spelled_out_and_json_is_json(left, capsys):
    evil = "\x1b]0;pwned\x07\x1b[2J\u202e\r"
    run = left("evil", owner=evil, message=evil, status="failed")
    (run / "events.jsonl").write_text(
        json.dumps({"time": 1.0, "kind": evil, "member": evil, "detail": evil}) + "\n5\n[]\nnull\n"
    )
    row = {"time": 1.0, "step": 7, "loss": float("nan"), "world_size": 1, "generation": "1-1", "sample_hash": "x"}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    elastic("runs", run.parent)
    elastic("status", run)
    elastic("status", f"nowhere{evil}", code=2)
    said = "".join(capsys.readouterr())
    assert "pwned" in said
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(said)

    elastic("status", run, "--json")
    out = capsys.readouterr().out
    seen = json.loads(out, parse_constant=pytest.fail)
    assert (seen["format"], seen["rows"][0]["loss"]) == (1, None)


def test_a_run_whose_process_was_killed_is_lost_at_once(left, capsys):
    from elastic.run.process import identity

    left("killed", owner_process={**identity(), "started": 1})

    elastic("runs", left("other").parent, "--json")

    assert {r["name"]: r["status"] for r in json.loads(capsys.readouterr().out)["runs"]}["killed"] == "lost"
