"""What a Ray node starts for each of its workers in tests, instead of Ray's `setup_worker.py` and `default_worker.py`.

Those import Ray three times for each worker, and the actors import torch: seconds of CPU time each. This forks the
same worker from the server of `tests.forked`, which has imported everything, and ends. It imports as little as it can.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import multiprocessing
import os
import runpy
import struct
import sys
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

SERVER = "FORKED_ACTOR_SERVER"  # environment variables of a node: the address of that server
FOLDER = "FORKED_ACTOR_FOLDER"  # and a folder in which each worker leaves the process id of its raylet, by its own
_IDS = 500  # random ones that a worker may need
_CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language="
_READ = "_ZGVZN9RayConfig8instanceEvE6config"  # whether RayConfig::instance() has made its object


def work(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """Be the worker process: Ray's script with these arguments."""
    from elastic import fault

    new = Path(folder, f"{os.getpid()}.new")
    new.write_text(environment["RAY_RAYLET_PID"])
    new.rename(new.with_suffix(""))
    os.environ.clear()
    os.environ.update(environment)
    fault.read_plan()
    read_environment_again()
    draw_other_ids(Path(folder))
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def read_environment_again() -> None:
    """Have Ray's C++ read its settings from the environment when it next asks for one, as it did when it was loaded."""
    import ray._raylet

    with open("/proc/self/maps") as maps:
        base = min(int(line.split("-")[0], 16) for line in maps if line.rstrip().endswith("/_raylet.so"))
    ctypes.c_uint8.from_address(base + _address(ray._raylet.__file__, _READ)).value = 0


def draw_other_ids(folder: Path) -> None:
    """Go on to a part of Ray's random numbers that no other fork has: they all continue where the server was, and two
    placement groups of one job would get the same id."""
    from ray._raylet import JobID, PlacementGroupID

    place, made = 0, None
    while made is None:
        place += 1
        with suppress(FileExistsError):
            made = os.open(folder / f"place-{place}", os.O_CREAT | os.O_EXCL)
    os.close(made)
    for _ in range(place * _IDS):
        PlacementGroupID.of(JobID.from_int(1))


def _address(library: str, symbol: str) -> int:
    """Where a library (64-bit ELF) has a symbol, also a local one, which the dynamic linker does not find."""
    with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        (sections,), (size, count) = struct.unpack_from("<Q", data, 40), struct.unpack_from("<HH", data, 58)
        headers = [struct.unpack_from("<IIQQQQIIQQ", data, sections + i * size) for i in range(count)]
        (_, _, _, _, start, length, link, *_) = next(header for header in headers if header[1] == 2)  # .symtab
        name = data.find(b"\0" + symbol.encode() + b"\0", headers[link][4]) + 1 - headers[link][4]
        assert name > 0, f"{library} has no symbol {symbol}: another Ray than these tests know"
        entry = data.find(struct.pack("<I", name), start, start + length)
        while (entry - start) % 24:
            entry = data.find(struct.pack("<I", name), entry + 1, start + length)
        return int(struct.unpack_from("<Q", data, entry + 8)[0])


def _request() -> None:
    environment, arguments = dict(os.environ), []
    for argument in sys.argv[1:]:
        if argument.startswith(_CONTEXT):
            environment.update(json.loads(argument.removeprefix(_CONTEXT)).get("env_vars") or {})
        elif not argument.startswith(_LANGUAGE):
            arguments.append(argument)
    from tests import forked_actor  # the function is to be found by its name there

    known = forkserver._forkserver
    known._forkserver_address, known.ensure_running = environment[SERVER], lambda: None
    known._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)
    resource_tracker._resource_tracker.getfd = lambda: known._forkserver_alive_fd
    process = multiprocessing.get_context("forkserver").Process(
        target=forked_actor.work, args=(arguments, environment.pop(FOLDER), environment)
    )
    process.start()
    os._exit(0)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parent.parent)
    _request()
