"""`python -m elastic.tools.prober`: checks what training needs of a machine, in a process that may hang or die.

It reads requests from standard input, one line of JSON each, and answers each with one line, until the input is closed:

    {"do": "device"}                                     the devices that torch sees
    {"do": "matmul"}                                     a matrix product whose result is known
    {"do": "reduce", "rank": .., "size": .., "store": [host, port], "interface": .., "timeout_s": ..}
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from elastic.compat.torch_groups import count_groups_from_zero
from elastic.parallel.nccl import describe_settings

_CPU_SIZE, _GPU_SIZE = 1024, 8192
_ELEMENTS = 1 << 20
_TIMES = 5


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device() -> dict[str, Any]:
    """Return the type and names of the devices, and for each GPU its free and its total memory in bytes. With GPUs also
    NCCL's version and the variables that workers set for it."""
    count = torch.cuda.device_count()
    memory = [torch.cuda.mem_get_info(i) for i in range(count)]
    names = [torch.cuda.get_device_name(i) for i in range(count)]
    found = {"type": _device().type, "names": names or [torch.backends.cpu.get_cpu_capability()], "memory": memory}
    if count:
        found |= {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "settings": describe_settings()}
    return found


def matmul() -> dict[str, Any]:
    """Multiply two matrices of whole numbers that are so small that float32 holds every partial sum exactly.

    Raises:
        ArithmeticError: a number of the product is wrong.
    """
    place = _device()
    size = _GPU_SIZE if place.type == "cuda" else _CPU_SIZE
    torch.backends.cuda.matmul.allow_tf32 = False
    left = (torch.arange(size, device=place) % 7).float().repeat(size, 1)
    right = (torch.arange(size, device=place) % 5).float().repeat(size, 1).T.contiguous()
    expected = float(sum((i % 7) * (i % 5) for i in range(size)))
    best = float("inf")
    for _ in range(_TIMES):
        _wait(place)
        began = time.perf_counter()
        product = left @ right
        _wait(place)
        best = min(best, time.perf_counter() - began)
    wrong = int((product != expected).sum())
    if wrong:
        raise ArithmeticError(f"{wrong} of {size * size} numbers of a matrix product are wrong")
    return {"gflops": round(2e-9 * size**3 / best, 1)}


def reduce(request: dict[str, Any]) -> dict[str, Any]:
    """Connect to the other members as a world does, and sum over all.

    Raises:
        RuntimeError: not all came, or a connection broke.
        ArithmeticError: the sum is wrong.
    """
    rank, size, place = request["rank"], request["size"], _device()
    timeout = timedelta(seconds=request["timeout_s"])
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = request["interface"]
    began = time.perf_counter()
    backend = "nccl" if place.type == "cuda" else "gloo"
    with _group(backend, request["store"], rank, size, timeout):
        connected = time.perf_counter()
        for _ in range(_TIMES):
            values = torch.full((_ELEMENTS,), float(rank + 1), device=place)
            dist.all_reduce(values)
            _wait(place)
            if not bool((values == size * (size + 1) / 2).all()):
                raise ArithmeticError(f"the sum over {size} machines is wrong")
        seconds = (time.perf_counter() - connected) / _TIMES
    return {"backend": backend, "connect_s": round(connected - began, 3), "reduce_s": round(seconds, 5)}


@contextlib.contextmanager
def _group(backend: str, store: list[Any], rank: int, size: int, timeout: timedelta) -> Iterator[None]:
    host, port = store
    place = dist.TCPStore(host, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False)
    count_groups_from_zero()
    try:
        prefixed = dist.PrefixStore(f"{host}:{port}", place)
        dist.init_process_group(backend, store=prefixed, rank=rank, world_size=size, timeout=timeout)
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main() -> int:
    torch.set_num_threads(os.cpu_count() or 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "reduce":
                answer = reduce(request)
            else:
                answer = {"device": device, "matmul": matmul}[request["do"]]()
        except Exception as error:  # whatever is wrong with the machine: the examiner is told
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
