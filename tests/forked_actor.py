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
import select
import signal
import struct
import sys
import threading
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

SERVER = "FORKED_ACTOR_SERVER"  # environment variables of a node: the address of that server
FOLDER = "FORKED_ACTOR_FOLDER"  # and a folder in which each worker leaves the process id of its raylet, by its own
_CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language="
_READ = "_ZGVZN9RayConfig8instanceEvE6config"  # whether RayConfig::instance() has made its object
_POOLS = "_ZN4absl12lts_2023080215random_internal12_GLOBAL__N_1L9pool_onceE"  # whether what seeds each thread is made
_GENERATOR = "_ZGVZ10FillRandomISsEvPT_E9generator"  # whether a thread has its generator


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
    seed_again()
    end_with(int(environment["RAY_RAYLET_PID"]))
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def end_with(raylet: int) -> None:
    """End this process at the moment its raylet ends, as the kernel does to the raylet's own children. Ray would end
    the workers of a node one after another, up to a second later: a world could form with one that is about to go."""
    try:
        descriptor = os.pidfd_open(raylet)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)

    def wait() -> None:
        select.select([descriptor], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="raylet", daemon=True).start()


def read_environment_again() -> None:
    """Have Ray's C++ read its settings from the environment when it next asks for one, as it did when it was loaded."""
    if (loaded := _loaded()) is not None:
        ctypes.c_uint8.from_address(loaded[0] + _address(_READ)).value = 0


def seed_again() -> None:
    """Have Ray's C++ draw other random numbers than all other forks of the server: in each of its threads, they would
    go on where the server was: two placement groups of one job would get the same id, and so would the objects with
    which drivers that connect at the same moment try the object store, where one of them then dies."""
    if (loaded := _loaded()) is None:
        return
    library, of_this_thread = loaded
    ctypes.c_uint32.from_address(library + _address(_POOLS)).value = 0
    ctypes.c_uint8.from_address(of_this_thread + _address(_GENERATOR)).value = 0


def _loaded() -> tuple[int, int] | None:
    """Where Ray's library is in memory, and where its variables of this thread are: by `dl_iterate_phdr(3)`. None in
    forks of a server that has not imported Ray: they import it themselves."""
    found = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Loaded), ctypes.c_size_t, ctypes.c_void_p)
    def look(loaded: Any, size: int, data: Any) -> int:
        if (loaded.contents.name or b"").endswith(b"/_raylet.so"):
            found.append((loaded.contents.address, loaded.contents.of_thread))
        return 0

    ctypes.CDLL(None).dl_iterate_phdr(look, None)
    return found[0] if found else None


class _Loaded(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("headers", ctypes.c_void_p),
        ("header_count", ctypes.c_uint16),
        ("adds", ctypes.c_ulonglong),
        ("subs", ctypes.c_ulonglong),
        ("module_of_thread", ctypes.c_size_t),
        ("of_thread", ctypes.c_void_p),
    )


def _address(symbol: str) -> int:
    """Where that library (64-bit ELF) has a symbol, also a local one, which the dynamic linker does not find."""
    import ray._raylet

    library = ray._raylet.__file__
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
