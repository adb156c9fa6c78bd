"""Who drives a run: names that resume, options that may not change, one driver at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from elastic import cli
from elastic.checkpoint.reader import newest_first
from elastic.config import DataOptions
from elastic.errors import ConfigError, RunFailed
from elastic.observe.ledger import gaps_and_doubles
from elastic.run.folder import RunFolder
from elastic.run.prepare import open_run, prepare
from elastic.storage import Storage
from elastic.sweep.folder import SweepFolder
from tests.forked import LONG, WAIT_S, B, Ran, Watch, configure, local_run, sample_at, train
from tests.tiny_jobs import Everything, Plain

# ---- without processes -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return RunFolder(Storage(str(tmp_path / "run")))


def _status(folder, status, age_s=0.0):
    folder.write_status({"status": status, "heartbeat": time.time() - age_s, "owner": "ann@host-7 (process 41)"})
    _age(folder, "status.json", age_s)


def _age(folder, name, age_s):
    os.utime(folder.storage.path(name), times=(time.time() - age_s,) * 2)


def test_claims_grow_by_one(folder):
    for epoch in (1, 2, 3):
        assert folder.claim(take_over=False) == epoch
        folder.release(epoch)
    assert folder.newest_epoch() == 3


FOREIGN = (
    ".000001.json.swp",
    ".nfs000000000001",
    ".DS_Store",
    "notes.txt",
    "000001.json~",
    "000009.conflict.json",
    "x",
)


def _litter(place):
    """What editors, desktops, NFS and tools that copy folders leave behind; one is a folder."""
    place.mkdir(parents=True, exist_ok=True)
    for name in FOREIGN[:-1]:
        (place / name).write_bytes(b"\x00{")
    (place / FOREIGN[-1]).mkdir()


def test_what_others_leave_beside_claims_and_drivers_is_no_claim(folder, tmp_path):
    _litter(tmp_path / "run" / "claims")
    assert folder.newest_epoch() == 0
    assert folder.claim(take_over=False) == 1
    assert folder.newest_epoch() == 1

    _litter(tmp_path / "sweep" / "drivers")
    sweep = SweepFolder(Storage(str(tmp_path / "sweep")))
    sweep.claim({"name": "sweep"}, take_over=False)
    assert {"000001.json", *FOREIGN} == set(os.listdir(tmp_path / "sweep" / "drivers"))


def test_the_second_of_two_commands_is_refused_before_the_first_has_a_status(folder):
    folder.claim(take_over=False)

    said = r"driven by .*@.* \(process \d+\) \(which claimed it 0 s ago\).*--run\.take-over"
    with pytest.raises(ConfigError, match=said):
        folder.claim(take_over=False)
    assert folder.newest_epoch() == 1

    assert folder.claim(take_over=True) == 2
    _age(folder, "claims/000002.json", 61)
    assert folder.claim(take_over=False) == 3
    folder.storage.replace("claims/000003.json", b"{")
    with pytest.raises(ConfigError, match=r"which claimed it 0 s ago"):
        folder.claim(take_over=False)


def test_the_second_of_two_sweep_commands_is_refused_before_the_first_has_written_its_own(tmp_path, monkeypatch):
    first, second = (SweepFolder(Storage(str(tmp_path / "sweep"))) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(first, "update", lambda **_: None)
        first.claim({"name": "sweep"}, take_over=False)

    with pytest.raises(ConfigError, match=r"driven by .*@.*--take-over"):
        second.claim({"name": "sweep"}, take_over=False)

    second.claim({"name": "sweep"}, take_over=True)


def test_a_claim_of_a_process_that_is_gone_or_let_it_go_holds_up_nobody(folder):
    script = (
        "import sys; from elastic.run.folder import RunFolder; from elastic.storage import Storage; "
        "RunFolder(Storage(sys.argv[1])).claim(take_over=False)"
    )
    subprocess.run([sys.executable, "-c", script, folder.storage.url], check=True, timeout=WAIT_S)

    assert folder.claim(take_over=False) == 2
    folder.release(2)
    assert folder.claim(take_over=False) == 3


@pytest.mark.parametrize("ahead_s", [-3600, -90, 90, 3600])
def test_clocks_that_differ_change_nothing_about_who_is_live(folder, monkeypatch, ahead_s):
    """`ahead_s`: of the second command's clock before that of the first one's."""
    folder.claim(take_over=False)
    real = time.time
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + ahead_s)
        with pytest.raises(ConfigError, match=r"which claimed it \d s ago"):
            folder.claim(take_over=False)
    folder.write_status({"status": "running", "heartbeat": time.time(), "owner": "ann@host-7 (process 41)", "epoch": 1})
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + ahead_s)
        with pytest.raises(ConfigError, match=r"driven by ann@host-7 \(process 41\) \(heartbeat \d s ago\)"):
            folder.claim(take_over=False)
    _age(folder, "status.json", 61)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: real() + ahead_s)
        assert folder.claim(take_over=False) == 2


def test_the_clock_of_an_object_store_is_read_from_what_it_stores(monkeypatch):
    storage = Storage(f"memory://clock-{time.time_ns()}")
    began = time.time()
    assert began - 2 <= storage.now() <= time.time() + 2
    assert storage.names() == []


DAMAGED = (
    b"",
    b"{",
    b"[]",
    b"null",
    b"5",
    b"\xff\x00",
    b"[" * 100_000,
    b'{"format": 1}',
    b'{"format": 1, "status": 5, "heartbeat": 1}',
    b'{"format": 1, "status": "running", "heartbeat": "x"}',
    b'{"format": 1, "status": "running", "heartbeat": 1, "owner_process": "me"}',
)


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_status_holds_up_nobody_and_is_told_in_one_sentence(folder, text, capsys):
    folder.write_config({"job": {"name": "digits"}, "config": {}})
    folder.storage.replace("status.json", text)

    with pytest.raises(ConfigError, match=r"status\.json is damaged \(.*\); remove it"):
        folder.status()
    for verb in ("status", "stop"):
        assert cli.main([verb, folder.storage.url]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert "status.json is damaged" in said
        assert said.count("\n") == 1
    assert folder.claim(take_over=False) == 1


@pytest.mark.parametrize("state", ["running", "parked"])
def test_a_live_claim_is_refused_naming_its_owner_unless_it_is_taken_over(folder, state):
    folder.claim(take_over=False)
    _status(folder, state, age_s=30)

    said = r"driven by ann@host-7 \(process 41\) \(heartbeat 30 s ago\).*--run\.take-over"
    with pytest.raises(ConfigError, match=said):
        folder.claim(take_over=False)

    assert folder.claim(take_over=True) == 2


@pytest.mark.parametrize(("state", "age_s"), [("running", 61), ("finished", 0), ("failed", 0), ("stopped", 0)])
def test_a_run_that_nobody_drives_any_more_is_claimed(folder, state, age_s):
    _status(folder, state, age_s)

    assert folder.claim(take_over=False) == 1


def test_the_run_of_a_driver_that_was_killed_on_this_machine_is_claimed_at_once(folder):
    script = "import json; from elastic.run.process import identity; print(json.dumps(identity())); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        owner = json.loads(driver.stdout.readline())
        values = {"status": "running", "heartbeat": time.time(), "owner": "ann@here", "owner_process": owner}
        folder.write_status(values)
        with pytest.raises(ConfigError, match="driven by ann@here"):
            folder.claim(take_over=False)
        folder.write_status({**values, "owner_process": {**owner, "boot": "another machine's"}})
        driver.kill()
        driver.wait()
        with pytest.raises(ConfigError, match="driven by ann@here"):
            folder.claim(take_over=False)
        folder.write_status(values)
        assert folder.claim(take_over=False) == 1


def test_of_two_drivers_at_the_same_moment_one_is_refused(folder, monkeypatch):
    monkeypatch.setattr(folder, "newest_epoch", lambda: 0)
    monkeypatch.setattr(folder, "_driver", lambda *_, **__: None)
    folder.claim(take_over=False)

    with pytest.raises(ConfigError, match="was claimed by another driver at this moment"):
        folder.claim(take_over=False)


def test_a_folder_of_a_newer_version_is_refused_naming_both_formats(folder):
    folder.storage.replace("status.json", json.dumps({"format": 2}).encode())

    with pytest.raises(ConfigError, match=r"status\.json has format 2, this version reads 1"):
        folder.status()


def test_a_run_without_a_name_gets_one_of_its_own(tmp_path):
    names = {prepare(Plain(), configure(tmp_path, None)).name for _ in range(5)}

    assert len(names) == 5
    assert all(name.startswith(f"tiny-jobs-{time.strftime('%Y')}") for name in names)


def test_preparing_writes_nothing(tmp_path):
    prepare(Plain(), configure(tmp_path / "runs", "run"))

    assert not (tmp_path / "runs").exists()


@pytest.fixture
def opened(tmp_path):
    """A run that was started, with V chosen from its batch."""
    config = configure(tmp_path, "run", batch__global_size=32, batch__microbatches=None, scaling__max_workers=2)
    open_run(prepare(Plain(lr=0.5), config))
    return config


def test_a_resumed_run_keeps_its_microbatches_at_any_number_of_workers(opened):
    assert prepare(Plain(lr=0.5), opened).plan.microbatches == 8

    larger = prepare(Plain(lr=0.5), replace(opened, scaling=replace(opened.scaling, max_workers=4)))

    assert larger.plan.microbatches == 8
    with pytest.raises(ConfigError, match=r"--batch.microbatches is 8, less than --scaling.max-workers 16"):
        prepare(Plain(lr=0.5), replace(opened, scaling=replace(opened.scaling, max_workers=16)))


@pytest.mark.parametrize(
    ("job", "change", "said"),
    [
        (Plain(lr=0.5), {"run": {"seed": 1}}, "--run.seed is 1, but run run was started with 0"),
        (Plain(lr=0.1), {}, "--job.lr is 0.1, but run run was started with 0.5"),
        (Plain(lr=0.5), {"batch": {"microbatches": 4}}, "--batch.microbatches is 4, but run run was started with 8"),
        (Plain(lr=0.5), {"run": {"duration": "13st"}}, "--run.duration is '13st', but run run was started with '12st'"),
    ],
)
def test_a_changed_result_option_is_refused_by_name_unless_it_is_allowed(opened, job, change, said):
    changed = replace(opened, **{part: replace(getattr(opened, part), **values) for part, values in change.items()})
    key = said.split()[0].removeprefix("--")

    with pytest.raises(ConfigError) as caught:
        prepare(job, changed)
    assert said in str(caught.value)
    assert f"--run.allow-change {key}" in str(caught.value)

    allowed = replace(changed, run=replace(changed.run, allow_change=(key,)))
    assert prepare(job, allowed).digest != prepare(Plain(lr=0.5), opened).digest


def test_an_operational_option_may_change(opened):
    changed = replace(opened, data=DataOptions(workers=3))

    assert prepare(Plain(lr=0.5), changed).digest == prepare(Plain(lr=0.5), opened).digest


def test_changed_code_is_noticed(opened):
    run = prepare(Plain(lr=0.5), opened)
    assert not run.changed_code
    stored = run.folder.config()
    run.folder.write_config({**{k: v for k, v in stored.items() if k != "format"}, "source": "0" * 64})

    assert prepare(Plain(lr=0.5), opened).changed_code


# ---- with processes --------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_finished_run_is_not_run_again(undisturbed):
    config = undisturbed.run.config

    again = prepare(Everything(), config)

    assert again.finished is not None
    assert again.finished["weights_sha256"] == undisturbed.sha
    assert again.finished["status"] == "finished"
    with pytest.raises(ConfigError, match=r"--run\.seed is 1, but run undisturbed was started with 0"):
        prepare(Everything(), replace(config, run=replace(config.run, seed=1)))


@pytest.mark.processes
def test_a_run_that_is_taken_over_ends_for_the_older_driver_and_is_whole_for_the_newer(undisturbed_epoch, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    job = Everything(samples=LONG, fault="hold", fault_at=sample_at(step=6), fault_file=str(gate))
    older = prepare(job, configure(tmp_path, "run", checkpoint__every="1st", scaling__max_workers=2))
    watch = Watch()
    with local_run(older, 2, on_record=watch) as local:
        watch.wait_for(lambda r: r.get("kind") == "checkpoint_committed" and r["step"] == 5)
        with pytest.raises(ConfigError, match=r"is being driven by .*give --run.take-over"):
            open_run(prepare(job, configure(tmp_path, "run")))
        newer = prepare(job, configure(tmp_path, "run", run__take_over=True))

        epoch = open_run(newer)

        gate.unlink()
        with pytest.raises(RunFailed, match="claim 2 took the run over from claim 1"):
            local.wait(WAIT_S)
    assert epoch == 2
    assert older.folder.result() is None, "a fenced driver writes no result"

    ran = train(job, configure(tmp_path, "run", run__take_over=True), workers=1)

    assert ran.failure is None
    assert ran.sha == undisturbed_epoch.sha
    assert ran.column("loss") == undisturbed_epoch.column("loss")
    assert gaps_and_doubles(ran.rows, B) == []
    # What the older driver was about to commit after it lost the run is nowhere to be seen.
    assert [e["step"] for e in ran.events("checkpoint_committed")] == [1, 2, 3, 4, 5, 12]


@pytest.mark.processes
def test_the_command_trains_in_two_processes_and_ends_with_0(undisturbed, tmp_path):
    command = [
        sys.executable,
        "-m",
        "elastic.worker",
        "--module",
        "tests.tiny_jobs",
        "--class",
        "Everything",
        "--workers",
        "2",
        "--run.storage",
        str(tmp_path),
        "--run.name",
        "run",
        "--run.exactness",
        "bitwise",
        "--eval.every",
        "3st",
        "--scaling.max-workers",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}

    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)

    assert done.returncode == 0, done.stderr
    shown = done.stdout.splitlines()
    assert any("step 12/12" in line for line in shown)
    assert any("finished after step 12" in line for line in shown)
    assert f"weights sha256 {undisturbed.sha}" in shown
    url = tmp_path / "run"
    assert shown[-2:] == [f"results in {url}", f"look at it with: elastic report {url} --html report.html"]
    files = set(os.listdir(tmp_path / "run"))
    assert {"config.json", "status.json", "result.json", "metrics.jsonl", "events.jsonl", "claims"} <= files


@pytest.mark.processes
def test_a_live_run_goes_on_past_what_others_leave_in_its_folder(undisturbed_epoch, tmp_path):
    job, root = Everything(samples=LONG), tmp_path / "run"
    run = prepare(job, configure(tmp_path, "run", checkpoint__every="1st", checkpoint__keep_last=1))
    littered = []

    def litter(record):
        if record.get("kind") == "checkpoint_committed" and not littered:
            step = root / "checkpoints" / f"step-{record['step']:08d}"
            for place in (
                "claims",
                "control",
                "checkpoints",
                "checkpoints/pins",
                step,
                step / record["detail"]["attempt"],
            ):
                littered.append(root / place)
                _litter(root / place)

    with local_run(run, 1, on_record=litter) as local:
        assert local.wait(WAIT_S)["status"] == "finished"

    assert len(littered) == 6
    ran = Ran(run, None)
    assert ran.sha == undisturbed_epoch.sha
    assert not ran.events("checkpoint_failed")
    assert [c.step for c in newest_first(run.folder.storage)] == [ran.result["steps"]]
    (root / "status.json").write_text("{")
    assert train(job, configure(tmp_path, "run"), workers=1).result["steps"] == ran.result["steps"]
    assert cli.main(["runs", str(tmp_path)]) == 0
