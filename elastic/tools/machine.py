"""Checks whether a machine has what training needs. They run without Ray; torch is imported in a process of its own."""

from __future__ import annotations

import json
import os
import queue
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from elastic.parallel.nccl import INTERFACE
from elastic.run.versions import versions

GIB = 1 << 30
START_S = 120.0  # long enough to import torch
REDUCE_S = 30.0
_SAME = ("python", "torch", "ray", "elastic-train")  # only these must have the same version on all machines


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Args:
        where: the machine, or "all" for a check between machines.
        state: only "fail" means that a run would not work.
        found: one line for people.
        do: how to correct it; empty if nothing has to be done.
    """

    check: str
    where: str
    state: Literal["ok", "warn", "fail"]
    found: str
    do: str = ""


class Unanswered(Exception):
    """A prober died, took too long, or found a fault; the message describes it."""


class Prober:
    """A `prober` process. Use as a context manager; ask from one thread at a time.

    Args:
        environment: variables that are added to those of this process.
    """

    def __init__(self, environment: Mapping[str, str] | None = None):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        paths = os.pathsep.join(p for p in sys.path if p)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "elastic.tools.prober"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": paths, **(environment or {})},
        )
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name="prober-reader", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(b"")

    def ask(self, within_s: float = START_S, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            Unanswered: the check failed, or took longer than `within_s` seconds; then the process is killed.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=within_s)
        except BrokenPipeError:
            line = b""
        except queue.Empty:
            self._process.kill()
            raise Unanswered(f"{request['do']} took longer than {within_s:g} s") from None
        if not line:
            raise Unanswered(
                f"{request['do']} ended its process with code {self._process.wait(10)}: {self._last_line()}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise Unanswered(answer["error"])
        return answer

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it printed nothing"

    def __enter__(self) -> Prober:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._reader.join(10)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()


# ---- one machine ---------------------------------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    """Return what can be found out about this machine without torch; `time` is unix seconds, sizes are bytes."""
    folder = tempfile.gettempdir()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "name": socket.gethostname(),
        "versions": versions(),
        "time": time.time(),
        "folder": folder,
        "disk_free": shutil.disk_usage(folder).free,
        "cpus": os.cpu_count(),
        "memory": memory,
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def judge_machine(where: str, seen: Mapping[str, Any]) -> list[Finding]:
    """Judge a machine's disk and limit of open files by its `facts`."""
    free, files = seen["disk_free"], seen["files"]
    text = f"{free / GIB:.1f} GiB free in {seen['folder']}"
    state: Literal["ok", "warn", "fail"] = "fail" if free < GIB else "warn" if free < 10 * GIB else "ok"
    do = "" if state == "ok" else "free some, or point TMPDIR at a larger disk: logs and staged exports go there"
    low = files != resource.RLIM_INFINITY and files < 4096
    return [
        Finding("disk", where, state, text, do),
        Finding(
            "open files",
            where,
            "warn" if low else "ok",
            "no limit" if files < 0 else f"limit {files}",
            "raise ulimit -n to 65536: large worlds and object storage need many sockets" if low else "",
        ),
    ]


def judge_versions(seen: Mapping[str, Mapping[str, str | None]]) -> list[Finding]:
    """Judge whether all machines have the same versions of the packages in `_SAME`."""
    found = []
    for name in _SAME:
        having: dict[str, list[str]] = {}
        for where, installed in seen.items():
            having.setdefault(str(installed.get(name)), []).append(where)
        if len(having) == 1:
            found.append(Finding("versions", "all", "ok", f"{name} {next(iter(having))}"))
            continue
        text = "; ".join(f"{version} on {', '.join(sorted(nodes))}" for version, nodes in sorted(having.items()))
        found.append(Finding("versions", "all", "fail", f"{name}: {text}", f"install one version of {name} everywhere"))
    return found


def judge_clock(where: str, offset_s: float, unsure_s: float) -> Finding:
    """Judge how far a machine's clock is from this machine's. `unsure_s` is half the time that the answer took."""
    off = max(0.0, abs(offset_s) - unsure_s)
    state: Literal["ok", "warn", "fail"] = "fail" if off > 30 else "warn" if off > 1 else "ok"
    do = "" if state == "ok" else "let chrony or systemd-timesyncd set the clock: heartbeats and signatures go by it"
    return Finding("clock", where, state, f"{offset_s:+.2f} s of this machine's, to {unsure_s:.2f} s", do)


def examine_computing(where: str, prober: Prober, gpus: int = 0) -> list[Finding]:
    """Check the device, its memory and a matrix product. `gpus` is the number of GPUs that the cluster reports."""
    try:
        seen = prober.ask(do="device")
    except Unanswered as why:
        return [Finding("device", where, "fail", str(why), "install torch so that `python -c 'import torch'` works")]
    found = [judge_device(where, seen, gpus), *judge_memory(where, seen), *judge_nccl(where, seen)]
    try:
        rate = prober.ask(do="matmul")["gflops"]
        return [*found, Finding("matmul", where, "ok", f"{rate:g} GFLOP/s")]
    except Unanswered as why:
        return [*found, Finding("matmul", where, "fail", str(why), "take this machine out: it computes wrongly or not")]


def judge_device(where: str, seen: Mapping[str, Any], gpus: int) -> Finding:
    """Judge whether torch sees as many GPUs as the cluster reports."""
    names = ", ".join(sorted(set(seen["names"])))
    have = len(seen["memory"])
    if have < gpus:
        do = "install a torch with CUDA and a driver that fits it; `python -m torch.utils.collect_env` tells"
        return Finding("device", where, "fail", f"torch sees {have} of {gpus} GPUs", do)
    return Finding("device", where, "ok", f"{have} x {names}" if have else f"CPU ({names})")


def judge_memory(where: str, seen: Mapping[str, Any]) -> list[Finding]:
    """Judge whether the memory of the GPUs is free."""
    found = []
    for i, (free, total) in enumerate(seen["memory"]):
        used = free < 0.9 * total
        do = "end what holds it (nvidia-smi tells), or leave this machine out" if used else ""
        text = f"GPU {i}: {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        found.append(Finding("GPU memory", where, "warn" if used else "ok", text, do))
    return found


def judge_nccl(where: str, seen: Mapping[str, Any]) -> list[Finding]:
    """Judge NCCL's version, and whether the user set variables of NCCL that workers would set otherwise. Empty without
    GPUs."""
    if "nccl" not in seen:
        return []
    version = str(seen["nccl"])
    do = "take a torch with NCCL 2.30.7 or newer: exchanges of all with all over InfiniBand may hang in 2.29"
    hangs = version.startswith("2.29.")
    found = [Finding("NCCL", where, "warn" if hangs else "ok", version, do if hangs else "")]
    for name, value, why in seen["settings"]:
        other = value.endswith("(yours)") and name != INTERFACE
        do = f"unset {name}, if you had no reason to set it: {why}" if other else ""
        found.append(Finding("NCCL", where, "warn" if other else "ok", f"{name}={value}", do))
    return found


def examine_reduce(where: str, probers: Sequence[Prober], store: tuple[str, int], interfaces: Sequence[str]) -> Finding:
    """Check an all-reduce between several probers of this machine."""
    failed: list[str] = []
    answers: list[dict[str, Any]] = []

    def ask(rank: int) -> None:
        try:
            answers.append(
                probers[rank].ask(
                    START_S + REDUCE_S,
                    do="reduce",
                    rank=rank,
                    size=len(probers),
                    store=store,
                    interface=interfaces[rank],
                    timeout_s=REDUCE_S,
                )
            )
        except Unanswered as why:
            failed.append(str(why))

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(len(probers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return judge_reduce(where, answers, failed)


def judge_reduce(where: str, answers: Sequence[Mapping[str, Any]], failed: Sequence[str]) -> Finding:
    """Judge an all-reduce by the answers of the probers, and by the messages of those that failed."""
    if failed:
        do = "let these reach each other on every TCP port (security group, firewall, GLOO_SOCKET_IFNAME)"
        return Finding("all-reduce", where, "fail", failed[0], do)
    slowest = max(answers, key=lambda a: a["reduce_s"])
    rate = 4 * (1 << 20) / slowest["reduce_s"] / 1e6
    text = f"{slowest['backend']}: connected in {slowest['connect_s']:g} s, 4 MiB at {rate:.0f} MB/s"
    return Finding("all-reduce", where, "ok", text)


def free_port(host: str) -> int:
    """Return a port of this address that is free now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def examine_machine() -> list[Finding]:
    """Check this machine alone, for runs in plain processes or on a Ray cluster within this machine."""
    seen = facts()
    where, gpus = seen["name"], _driver_gpus()
    found = [*judge_versions({where: seen["versions"]}), *judge_machine(where, seen)]
    host = "127.0.0.1"
    try:
        store = (host, free_port(host))
        found.append(Finding("ports", where, "ok", f"listens on {host}"))
    except OSError as error:
        return [*found, Finding("ports", where, "fail", f"cannot listen on {host}: {error}", "allow loopback")]
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    with ExitStack() as stack:
        first = stack.enter_context(Prober())
        second = stack.enter_context(Prober({"CUDA_VISIBLE_DEVICES": "1"} if gpus > 1 else hidden))
        found += examine_computing(where, first, gpus)
        if gpus == 1:  # two processes cannot share it in one all-reduce
            first = stack.enter_context(Prober(hidden))
        found.append(examine_reduce(where, (first, second), store, ("lo", "lo")))
    return found


def _driver_gpus() -> int:
    """Return the number of GPUs that the driver lists and this process may use."""
    folder = "/proc/driver/nvidia/gpus"
    count = len(os.listdir(folder)) if os.path.isdir(folder) else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, len([v for v in visible.split(",") if v.strip()]))
