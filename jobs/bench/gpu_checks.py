"""The checks of `jobs.bench.gpu`, each in a process of its own: `python -m jobs.bench.gpu_checks NAME FOLDER [--cpu]`.

A check returns its figures, which go to FOLDER/result.json, and raises AssertionError where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elastic.config import RunOptions, ScalingOptions, TrainConfig
from elastic.observe.ledger import EVENTS, METRICS, gaps_and_doubles, read_records
from elastic.parallel.canonical import sums_by_halves
from elastic.parallel.device import describe
from elastic.run.prepare import prepare
from elastic.storage import Storage
from elastic.worker.local import LocalRun
from jobs.bench.gpu_job import CONFIG, Alternating, Numbers
from jobs.bench.gpu_raw import Ranks

Figures = dict[str, Any]
STEPS = 8
WAIT_S = 110.0


class Place:
    """Where checks run.

    Args:
        folder: an empty one.
        cpu: gloo instead of NCCL.
    """

    def __init__(self, folder: Path, cpu: bool):
        self.folder, self.cpu = folder, cpu
        self.device = torch.device("cpu" if cpu else "cuda:0")

    def config(self, name: str, workers: int, **options: Any) -> TrainConfig:
        run = RunOptions(storage=str(self.folder), name=name, duration=f"{STEPS}st", **options.pop("run", {}))
        return replace(CONFIG, run=run, scaling=ScalingOptions(max_workers=workers), **options)

    def train(self, job: Numbers, config: TrainConfig, workers: int, *faults: dict[str, Any]) -> Ended:
        """A run to its end, in plain processes that share the device."""
        prepared = prepare(job, config)
        environment = {"ELASTIC_FAULTS": json.dumps(faults)}
        accelerator = "cpu" if self.cpu else "gpu"
        with LocalRun(prepared, workers, environment=environment, accelerator=accelerator) as local:
            result = local.wait(WAIT_S)
        return Ended(result, prepared.folder.storage)


class Ended:
    """What a run left."""

    def __init__(self, result: dict[str, Any], storage: Storage):
        self.sha: str = result["weights_sha256"]
        self.rows = [row for row in read_records(storage, METRICS) if "sample_hash" in row]
        self._events = read_records(storage, EVENTS)

    def worlds(self) -> list[list[int]]:
        """Process ids of the members of each world."""
        return [event["detail"]["pids"] for event in self._events if event["kind"] == "world_formed"]

    def formed_again_s(self) -> float:
        """Seconds between the first world of three and the next."""
        formed = [event for event in self._events if event["kind"] == "world_formed"]
        first = next(i for i, event in enumerate(formed) if event["detail"]["size"] == 3)
        return round(formed[first + 1]["time"] - formed[first]["time"], 3)

    def stall_s(self) -> float:
        """The longest time between two steps, of which one is the first of a world."""
        pairs = zip(self.rows, self.rows[1:])
        return max((b["time"] - a["time"] for a, b in pairs if a["generation"] != b["generation"]), default=0.0)

    def step_s(self) -> float:
        return statistics.median(row["step_s"] for row in self.rows)

    def check_samples(self) -> None:
        wrong = gaps_and_doubles(self.rows, CONFIG.batch.global_size)
        assert not wrong, f"samples are missing or counted twice: {wrong}"


BITWISE = {"exactness": "bitwise"}


def versions(place: Place) -> Figures:
    found = {"python": platform.python_version(), **describe(place.device)}
    if not place.cpu:
        free, total = torch.cuda.mem_get_info()
        found |= {"cuda": torch.version.cuda, "free_gib": round(free / 2**30, 1), "total_gib": round(total / 2**30, 1)}
    return found


def one_worker(place: Place) -> Figures:
    """The device's path: scaler, rows, memory; in bitwise twice the same bits."""
    autocast = {"precision": replace(CONFIG.precision, autocast="bf16")}
    fast = place.train(Numbers(), place.config("fast", 1, **autocast), 1)
    first, second = (place.train(Numbers(), place.config(f"exact-{i}", 1, run=BITWISE), 1) for i in range(2))
    assert first.sha == second.sha, "two runs of one worker in bitwise have other bits"
    if not place.cpu:
        assert fast.rows[-1]["device_memory"] > 0
    return {"sha": first.sha[:12], "step_s": first.step_s()}


def bits(place: Place) -> Figures:
    """Worlds of one, two and three, with the real exchange."""
    runs = [place.train(Numbers(), place.config(f"of-{n}", n, run=BITWISE), n) for n in (1, 2, 3)]
    assert len({run.sha for run in runs}) == 1, f"other bits: {[run.sha[:12] for run in runs]}"
    fast = place.train(Numbers(), place.config("fast", 3), 3)
    fast.check_samples()
    return {"sha": runs[0].sha[:12], "bitwise_step_s": [run.step_s() for run in runs], "fast_step_s": fast.step_s()}


def kills(place: Place) -> Figures:
    """One of three is killed in each part of a step: the others go on, in the same processes, to the same bits."""
    undisturbed = place.train(Numbers(), place.config("none", 1, run=BITWISE), 1).sha
    stalls: dict[str, float] = {}
    for point, step in (
        ("step.forward", 3),
        ("step.reduce", 3),
        ("step.before_fence", 3),
        ("step.after_fence", 3),
        ("eval.begin", 4),
    ):
        fault = {"point": point, "step": step, "rank": 2, "do": "kill"}
        ended = place.train(Numbers(), place.config(point.replace(".", "-"), 3, run=BITWISE), 3, fault)
        *earlier, after = ended.worlds()  # on a slow machine one worker may have begun before the others came
        before = next((world for world in earlier if len(world) == 3), [])
        assert after == before[:2], f"{point}: {before} became {after}, the survivors' processes are not the same"
        assert ended.sha == undisturbed, f"{point}: other bits"
        ended.check_samples()
        stalls[point] = round(ended.stall_s(), 3)
    return {"stall_s": stalls}


def error_on_one(place: Place) -> Figures:
    """An error of the job's code on one worker is tried again, and nobody is lost."""
    flag = place.folder / "fails-once"
    flag.touch()
    config = place.config("error", 2, run=BITWISE)
    ended = place.train(Numbers(fails_once=str(flag)), config, 2)
    assert not flag.exists()
    first, *_, last = [*ended.worlds(), ended.worlds()[-1]]
    assert first == last, f"{first} became {last}"
    ended.check_samples()
    return {"stall_s": round(ended.stall_s(), 3)}


def fsdp(place: Place) -> Figures:
    """Two workers that share the model, in bitwise, and one with all of it."""
    whole = place.train(Numbers(), place.config("ddp", 1, run=BITWISE), 1)
    sharded = {"parallel": replace(CONFIG.parallel, strategy="fsdp")}
    cut = place.train(Numbers(), place.config("fsdp", 2, run=BITWISE, **sharded), 2)
    assert whole.sha == cut.sha, "fsdp of two has other bits than ddp of one"
    return {"sha": whole.sha[:12], "step_s": cut.step_s()}


def cells(place: Place) -> Figures:
    """Two workers that share each layer, and two such cells, in bitwise; then a kill in the second."""
    tensor = {"parallel": replace(CONFIG.parallel, tensor=2)}
    one = place.train(Numbers(size="5M"), place.config("one", 2, run=BITWISE, **tensor), 2)
    sharded = {"parallel": replace(CONFIG.parallel, tensor=2, strategy="fsdp")}
    fault = {"point": "step.reduce", "step": 3, "rank": 3, "do": "kill"}
    two = place.train(Numbers(size="5M"), place.config("two", 4, run=BITWISE, **sharded), 4, fault)
    assert one.sha == two.sha, "two cells, of which one is lost, have other bits than one"
    two.check_samples()
    return {"sha": one.sha[:12], "step_s": one.step_s(), "stall_s": round(two.stall_s(), 3)}


def pipelines(place: Place) -> Figures:
    """Three workers that run the layers one after another, in bitwise; one is killed, and two go on."""
    whole = place.train(Numbers(tied=False), place.config("whole", 1, run=BITWISE), 1)
    stages = {"parallel": replace(CONFIG.parallel, pipeline=2)}
    two = place.train(Numbers(tied=False), place.config("two", 2, run=BITWISE, **stages), 2)
    fault = {"point": "step.reduce", "step": 3, "rank": 2, "do": "kill"}
    three = place.train(Numbers(tied=False), place.config("three", 3, run=BITWISE, **stages), 3, fault)
    assert len({whole.sha, two.sha, three.sha}) == 1, f"other bits: {whole.sha[:12]} {two.sha[:12]} {three.sha[:12]}"
    three.check_samples()
    return {"sha": whole.sha[:12], "step_s": two.step_s(), "stall_s": round(three.stall_s(), 3)}


def snapshots(place: Place) -> Figures:
    """State in the memory of other nodes: a worker of fsdp is lost with its shard, and no step is done again."""
    options = {
        "parallel": replace(CONFIG.parallel, strategy="fsdp"),
        "recovery": replace(CONFIG.recovery, snapshot_every="1st"),
    }
    scaling = ScalingOptions(max_workers=3, workers_per_node=1)
    undisturbed = place.train(Numbers(), place.config("none", 1, run=BITWISE), 1)
    fault = {"point": "step.forward", "step": 5, "rank": 1, "do": "kill"}
    config = replace(place.config("snapshots", 3, run=BITWISE, **options), scaling=scaling)
    ended = place.train(Numbers(), config, 3, fault)
    assert ended.sha == undisturbed.sha, "other bits"
    ended.check_samples()
    return {"sha": ended.sha[:12], "stall_s": round(ended.stall_s(), 3), "worlds": [len(w) for w in ended.worlds()]}


def formats(place: Place) -> Figures:
    """A scaled loss in fp16, compiled blocks: two workers have the bits of one; and parameters in bf16, and on the
    host, in fast."""
    variants: dict[str, dict[str, Any]] = {
        "fp16": {"run": BITWISE, "precision": replace(CONFIG.precision, autocast="fp16")},
        "compile": {"run": BITWISE, "parallel": replace(CONFIG.parallel, compile=True, blocks=("Block",))},
        "bf16": {"precision": replace(CONFIG.precision, param_dtype="bf16")},
    }
    if not place.cpu:
        offload = replace(CONFIG.parallel, strategy="fsdp", offload=True)
        variants["offload"] = {"parallel": offload}
    found: Figures = {}
    failed = []
    for name, options in variants.items():
        try:
            one, two = (place.train(Numbers(), place.config(f"{name}-{n}", n, **options), n) for n in (1, 2))
        except Exception as error:  # the others are to be known all the same
            failed.append(f"{name}: {type(error).__name__}: {error}"[-700:])
            continue
        found[name] = {"loss": two.rows[-1]["loss"], "step_s": two.step_s()}
        if "run" in options and one.sha != two.sha:
            failed.append(f"{name}: other bits")
    assert not failed, f"{failed}; {found}"
    return found


def row_sums(place: Place) -> Figures:
    """Rows cut over workers: torch's own sum, and ours by halves."""
    differ = {"torch": 0, "halves": 0}
    tried = 0
    generator = torch.Generator().manual_seed(0)
    for rows in (*range(2, 20), 33, 64, 1000):
        for width in (27, 129, 1024, 1025, 4096, 11008, 16384):
            whole = torch.randn(rows, width, generator=generator).to(place.device)
            for parts in (2, 3, 8, 64):
                if parts > rows:
                    continue
                cut = [part.clone() for part in whole.tensor_split(parts)]
                tried += 1
                differ["torch"] += not torch.equal((whole**2).sum(1), torch.cat([(p**2).sum(1) for p in cut]))
                apart = torch.cat([sums_by_halves([part], 1 << 24)[0] for part in cut])
                differ["halves"] += not torch.equal(sums_by_halves([whole], 1 << 24)[0], apart)
    assert not differ["halves"], differ
    return {"cuts": tried, "differ": differ}


def repeatable(place: Place) -> Figures:
    """Gradients of usual layers, in two fresh processes each, with and without TF32."""
    found: dict[str, list[str]] = {}
    for setting in ("ieee", "tf32"):
        for _ in range(2):
            command = [sys.executable, "-m", "jobs.bench.gpu_raw", "gradients", str(place.device), setting]
            answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=40)
            found.setdefault(setting, []).append(answer.stdout.strip())
    assert all(len(set(hashes)) == 1 for hashes in found.values()), found
    return {setting: hashes[0] for setting, hashes in found.items()}


def worlds(place: Place) -> Figures:
    """Twelve worlds one after another: what the last ten leave in memory, threads and descriptors."""
    with Ranks(place, 2) as ranks:
        seen = ranks.ask("worlds", 12)
    first, last = seen[0][2], seen[0][-1]
    for what, slack in (("memory_mib", 64), ("threads", 4), ("descriptors", 8)):
        assert last[what] - first[what] <= slack, f"{what}: {first[what]} after 3 worlds, {last[what]} after 12"
    return {"first": first, "last": last, "world_s": statistics.median(s["seconds"] for s in seen[0])}


def abort(place: Place) -> Figures:
    """A peer stands still in a collective: an abort from another thread frees the kernel and the host."""
    with Ranks(place, 2) as ranks:
        return ranks.ask("abort_from_thread", only=0, stopping=1)[0]


def creation(place: Place) -> Figures:
    """A peer never comes while communicators are made, or stops before the first message to it, or before the first
    exchange: what an abort does, with communicators that block, with others, and with those that are made before they
    are used."""
    modes = {"blocking": ("0", False), "not_blocking": ("1", False), "eager": ("1", True)}
    cases: list[tuple[str, str | int]] = [(mode, rank) for mode in modes for rank in (0, 1)]
    cases += [(mode, what) for mode in ("blocking", "not_blocking") for what in ("send", "exchange")]
    found: Figures = {}

    def left_alone(mode: str, what: str | int) -> None:
        value, eager = modes[mode]
        with Ranks(place, 2, environment={"TORCH_NCCL_USE_COMM_NONBLOCKING": value}) as ranks:
            if isinstance(what, int):
                answer = ranks.ask("create_alone", eager, only=what, wait_s=30)
            else:
                answer = ranks.ask(f"{what}_alone", only=0, stopping=1, wait_s=30)
            found[f"{mode}_{what}"] = answer[0]

    threads = [threading.Thread(target=left_alone, args=case) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in (0, 1):
        seen = found.get(f"blocking_{rank}") or {}
        assert seen.get("abort_s") is not None, f"an abort waits for a communicator: {found}"
        assert seen.get("next_world_s") is not None, f"the worker would not go on: {found}"
    return found


def connecting(place: Place) -> Figures:
    """One of three is killed before it connects: the others go on, in the same processes, to the same bits."""
    undisturbed = place.train(Numbers(), place.config("none", 1, run=BITWISE), 1).sha
    happened = place.folder / "happened"
    fault = {"point": "world.assigned", "rank": 2, "do": "kill", "only": str(happened)}
    ended = place.train(Numbers(), place.config("killed", 3, run=BITWISE), 3, fault)
    assert happened.exists(), "no world of three began"
    *earlier, after = ended.worlds()
    before = next((world for world in earlier if len(world) == 3), [])
    assert after == before[:2], f"{before} became {after}, the survivors' processes are not the same"
    assert ended.sha == undisturbed, "other bits"
    ended.check_samples()
    return {"world_to_world_s": ended.formed_again_s()}


def watchdog(place: Place) -> Figures:
    """A peer is killed, the abort comes a second later: how long the group takes to be dropped."""
    found: Figures = {}
    for name, settings in (("settings", {}), ("torch_defaults", {"TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "15000"})):
        with Ranks(place, 2, environment=settings) as ranks:
            found[f"{name}_s"] = ranks.ask("drop_after_kill", only=0, killing=1, wait_s=25)[0]
    assert (found["settings_s"] or 99) < 5, found
    return found


def staging(place: Place) -> Figures:
    """Pinned memory for a copy of the state: a gigabyte reserved, and copied beside products of matrices."""
    size = 1 << 30
    began = time.perf_counter()
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    reserved = time.perf_counter() - began
    source = torch.ones(size, dtype=torch.uint8, device=place.device)
    left = torch.randn(4096, 4096, device=place.device)

    def products(copying: bool) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        stream = torch.cuda.Stream()
        if copying:
            with torch.cuda.stream(stream):
                pinned.copy_(source, non_blocking=True)
        for _ in range(40):
            left @ left
        torch.cuda.current_stream().synchronize()
        return time.perf_counter() - began

    products(False)
    alone, beside = (statistics.median(products(copying) for _ in range(5)) for copying in (False, True))
    return {"pin_s_per_gib": round(reserved, 3), "slower": round(beside / alone - 1, 4)}


def overhead(place: Place) -> Figures:
    """Steps with and without the machinery, in turns; see `jobs.bench.overhead`."""
    from jobs.bench import overhead as bench

    job = Alternating(size="10M" if not place.cpu else "0.5M")
    found = bench.measure(job, CONFIG, 1, bench.Enough(most=12), accelerator="cpu" if place.cpu else "gpu")
    ratios = [w / b for w, b in zip(found["whole_s"], found["bare_s"])]
    return {"bare_s": statistics.median(found["bare_s"]), "ratio": round(statistics.median(ratios), 4)}


def late_devices(place: Place) -> Figures:
    """CUDA_VISIBLE_DEVICES that is set after a module has asked for devices is not heard."""
    program = (
        "import os, torch; os.environ['CUDA_VISIBLE_DEVICES'] = '0'; torch.cuda.is_available(); torch.cuda.init()\n"
        "os.environ['CUDA_VISIBLE_DEVICES'] = ''; print(torch.cuda.device_count())"
    )
    answer = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=15)
    return {"devices_after": int(answer.stdout)}


CHECKS: dict[str, Callable[[Place], Figures]] = {
    check.__name__: check
    for check in (
        versions,
        one_worker,
        bits,
        kills,
        error_on_one,
        fsdp,
        cells,
        pipelines,
        snapshots,
        formats,
        row_sums,
        repeatable,
        worlds,
        abort,
        creation,
        connecting,
        watchdog,
        staging,
        overhead,
        late_devices,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=CHECKS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    figures = CHECKS[given.name](Place(given.folder, given.cpu))
    (given.folder / "result.json").write_text(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
