"""The view of `torch.distributed` that a job's code has in a worker: one process, without a process group.

torch and this package use the real functions, also in the middle of the job's calls: DDP and FSDP2 communicate in
forward passes. So the caller decides which one runs. Read in torch 2.13.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

#: The answers that the job's code gets.
ANSWERS: dict[str, Any] = {"is_initialized": False, "get_rank": 0, "get_world_size": 1}

#: Functions that the job's code may not call, since no result would be right.
REFUSED = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_gather_single",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "destroy_process_group",
    "gather",
    "gather_object",
    "get_backend",
    "init_process_group",
    "irecv",
    "isend",
    "monitored_barrier",
    "new_group",
    "new_subgroups",
    "new_subgroups_by_enumeration",
    "recv",
    "recv_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
    "send_object_list",
    "split_group",
)

_REAL = ("elastic.", "torch.distributed.", "torch.nn.parallel.")
_OF_JOBS = ("torch.distributed.nn.",)  # functions that losses call
_BETWEEN = ("torch.utils._device", "torch.overrides")  # frames of function modes, such as torch.set_default_device()
#: The modules that have these functions.
HOMES: dict[types.ModuleType, tuple[str, ...]] = {
    dist: (*ANSWERS, *REFUSED),
    dist.distributed_c10d: (*ANSWERS, *REFUSED),
    functional: tuple(
        name
        for name, value in vars(functional).items()
        if isinstance(value, types.FunctionType)
        and value.__module__ == functional.__name__
        and "group" in inspect.signature(value).parameters
    ),
}


def hide_world(refuse: Callable[[str], Exception], job: object = None) -> Callable[[], None]:
    """From now on, in this process, the job's code and its libraries get the answers of a single process.

    Args:
        refuse: makes the exception for a function that the job may not call, from its name and the place.
        job: names that its functions imported before are replaced too, as in all modules.

    Returns:
        a function that undoes it.
    """
    replaced: dict[int, Callable[..., Any]] = {}
    undo: list[Callable[[], None]] = []

    def replace(names: dict[str, Any], name: str, shown: Callable[..., Any]) -> None:
        undo.append(functools.partial(names.__setitem__, name, names[name]))
        names[name] = shown

    for home, names in HOMES.items():
        for name in names:
            real = vars(home).get(name)  # some versions of torch do not have all of them
            if real is None or hasattr(real, "hides_world"):
                continue
            if id(real) not in replaced:
                replaced[id(real)] = _answering(real, ANSWERS[name]) if name in ANSWERS else _refusing(real, refuse)
            replace(vars(home), name, replaced[id(real)])
    for namespace in _namespaces(job) if replaced else ():
        if replaced.keys().isdisjoint(map(id, list(namespace.values()))):
            continue
        for name, value in list(namespace.items()):
            if id(value) in replaced:
                replace(namespace, name, replaced[id(value)])

    def back() -> None:
        while undo:
            undo.pop()()

    return back


def _answering(real: Callable[..., Any], shown: Any) -> Callable[..., Any]:
    @functools.wraps(real)
    def answer(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # it traces the job's code only, and cannot inspect frames
            return shown
        return real(*args, **kwargs) if _is_real(_caller(sys._getframe(1))) else shown

    answer.hides_world = True  # type: ignore[attr-defined]
    return answer


def _refusing(real: Callable[..., Any], refuse: Callable[[str], Exception]) -> Callable[..., Any]:
    @functools.wraps(real)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _is_real(frame := _caller(sys._getframe(1))):
            module = real.__module__.removesuffix(".distributed_c10d")
            raise refuse(f"{module}.{real.__name__}() ({frame.f_code.co_filename}, line {frame.f_lineno})")
        return real(*args, **kwargs)

    call.hides_world = True  # type: ignore[attr-defined]
    return call


def _caller(frame: types.FrameType) -> types.FrameType:
    while frame.f_globals.get("__name__") in _BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _is_real(frame: types.FrameType) -> bool:
    caller = f"{frame.f_globals.get('__name__', '')}."
    return caller.startswith(_REAL) and not caller.startswith(_OF_JOBS)


def _namespaces(job: object) -> Iterator[dict[str, Any]]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("torch", "elastic") and isinstance(module, types.ModuleType):
            yield vars(module)
    for owner in type(job).__mro__:
        yield from (f.__globals__ for f in vars(owner).values() if isinstance(f, types.FunctionType))


def hide_loader_process() -> None:
    """From now on `torch.utils.data.get_worker_info()` says that this is no loader process: a stream that is cut by it
    would be cut twice."""
    from torch.utils.data._utils import worker

    worker._worker_info = None
