"""What can be shown of the GPU path with one GPU, in 12 minutes, each check with a limit of its own.

    python -m jobs.bench.gpu [--cpu] [--only NAME ...] [--limit 900] [--json FILE]

Several workers share the GPU: NCCL takes them for machines of their own by NCCL_HOSTID, and connects them by sockets
over loopback. So communicators, kernels that wait, aborts and errors of peers are real; speed, NVLink, NVLS and
InfiniBand are not tried. Needs torch 2.11 or newer, aiohttp, cloudpickle, fsspec, numpy, orjson, pyyaml, rich and
xxhash; no Ray. With `--cpu` the same goes through gloo, without what only NCCL has. Prints a line of JSON for each
check, as it ends; the exit code is 1 where one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: Seconds for each check, in the order of what is to be known first; those that only NCCL has.
LIMITS = {
    "versions": 30,
    "one_worker": 60,
    "kills": 120,
    "bits": 70,
    "error_on_one": 40,
    "abort": 45,
    "creation": 60,
    "connecting": 70,
    "watchdog": 60,
    "row_sums": 30,
    "repeatable": 60,
    "fsdp": 60,
    "cells": 60,
    "pipelines": 70,
    "snapshots": 60,
    "formats": 120,
    "worlds": 60,
    "staging": 30,
    "overhead": 60,
    "late_devices": 20,
}
OF_PROCESSORS = 6  # times longer may a check take on processors that others use too
NCCL_ONLY = ("abort", "creation", "watchdog", "staging", "late_devices")
#: For several workers on one GPU: no transport that needs memory of a neighbour, no library of a network.
SHARED = {
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_MAX_CTAS": "2",
    "OMP_NUM_THREADS": "1",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--cpu", action="store_true", help="gloo on this machine's processors")
    parser.add_argument("--only", nargs="+", choices=LIMITS, default=[], metavar="NAME", help=f"of {', '.join(LIMITS)}")
    parser.add_argument("--limit", type=float, help="seconds for everything; the default is 900, with --cpu 3000")
    parser.add_argument("--json", type=Path, help="file for a list of all results")
    given = parser.parse_args()
    until, found = time.monotonic() + (given.limit or (3000 if given.cpu else 900)), []
    for name in given.only or LIMITS:
        found.append(run(name, cpu=given.cpu, until=until))
        print(json.dumps(found[-1]), flush=True)
        if given.json:
            given.json.write_text(json.dumps(found, indent=1))
    return 1 if any(result["ok"] is False for result in found) else 0


def run(name: str, *, cpu: bool, until: float) -> dict[str, Any]:
    """Make one check in a process group of its own, which is ended with it.

    Returns:
        its figures, `check`, `seconds`, and `ok`: None where it was not made.
    """
    if cpu and name in NCCL_ONLY:
        return {"check": name, "ok": None, "why": "only NCCL has it"}
    began = time.monotonic()
    limit = min(LIMITS[name] * (OF_PROCESSORS if cpu else 1), until - began)
    if limit < 5:
        return {"check": name, "ok": None, "why": "no time was left"}
    with tempfile.TemporaryDirectory(prefix="elastic-gpu-") as folder:
        output = Path(folder) / "output"
        arguments = [sys.executable, "-m", "jobs.bench.gpu_checks", name, folder, *(["--cpu"] if cpu else [])]
        with output.open("wb") as file:
            process = subprocess.Popen(
                arguments, stdout=file, stderr=file, env={**os.environ, **SHARED}, start_new_session=True
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                end(process)
        result = Path(folder) / "result.json"
        figures = json.loads(result.read_text()) if result.exists() else {}
        ok = code == 0
        if not ok:
            figures["why"] = f"not within {limit:.0f} s" if code is None else f"exit code {code}"
            figures["output"] = output.read_text(errors="replace")[-3000:]
    return {"check": name, "ok": ok, "seconds": round(time.monotonic() - began, 1), **figures}


def end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a check, with the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    raise SystemExit(main())
