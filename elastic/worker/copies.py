"""Whether all workers hold equal copies: of the update that they are about to apply, and of the state itself.

Every worker of ddp, and every row of hsdp, applies an update that it computed by itself. If two differ, copies drift
apart and the weights of one of them are saved. So a fingerprint of each update rides on the fence of its step, and
digests of the state are compared after a join, after the second update of each command, before each checkpoint, and
every `--run.check-every` steps.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch.distributed.tensor import DTensor

from elastic.errors import CopiesDiffer, UpdatesDiffer
from elastic.parallel.replicated import dense
from elastic.parallel.wrapping import local
from elastic.worker.flags import NEUTRAL
from elastic.worker.group import Group
from elastic.worker.state import TrainState

_MULTIPLIER = -7046029254386353131  # odd, of 64 bits: 2**64 over the golden ratio
_ROW = 1024
_PLAIN = (int, float, bool, str, type(None))
Entry = tuple[str, str, str]  # what is compared, which part of it ("" for what all hold), and a digest


# ---- the update ----------------------------------------------------------------------------------------------------


def said(fingerprint: int) -> tuple[int, int]:
    """What a worker says at the fence, whose members hear the largest of each number."""
    return fingerprint, -fingerprint


def equal(largest: Sequence[int]) -> bool:
    """Whether all who applied anything said the same."""
    return largest[0] == -largest[1] or tuple(largest) == NEUTRAL


def update_fingerprint(numbers: Sequence[float], optimizer: torch.optim.Optimizer) -> int:
    """A non-negative number of 61 bits: of an update's norm and the like, each group's options, and which gradients
    there are."""
    found = xxhash.xxh3_64(struct.pack(f"<{len(numbers)}d", *numbers))
    for group in optimizer.param_groups:
        found.update(repr(_options(group)).encode())
        found.update(bytes(p.grad is not None for p in group["params"]))
    return found.intdigest() >> 3


def _options(group: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in sorted(group.items()) if key != "params" and _is_plain(value)]


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, (tuple, list)) and all(map(_is_plain, value)))


def update_entries(
    numbers: Mapping[str, float], optimizer: torch.optim.Optimizer, names: Mapping[int, str], part: str
) -> list[Entry]:
    """The update in detail, for the workers to find what differs.

    Args:
        names: of the parameters, by their identity.
        part: which part of what is cut this worker holds.
    """
    found: list[Entry] = []
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            value = tensor_digest(dense(local(p.grad))) if p.grad is not None else "none"
            name, which = names.get(id(p), "a parameter"), part if isinstance(p, DTensor) else ""
            found.append((f"the gradient of {name}", which, value))
        found += [(f"{key} of parameter group {index}", "", repr(value)) for key, value in _options(group)]
    return found + [(name, "", value.hex()) for name, value in numbers.items()]


def update_error(step: int, group: Group, worker_id: str, entries: list[Entry]) -> UpdatesDiffer:
    """What ends the run where the update of `step` differs. Everyone in the mesh asks at one time."""
    return UpdatesDiffer(
        _difference(f"the update of step {step}", group, worker_id, entries, "nothing of this step was applied")
    )


# ---- the state -----------------------------------------------------------------------------------------------------


def trained_error(group: Group, worker_id: str, trained: Mapping[str, bool]) -> CopiesDiffer:
    """What ends the run where workers do not train the same parameters. Everyone in the mesh asks at one time."""
    entries = [(f"whether {name} is trained", "", str(value)) for name, value in trained.items()]
    return CopiesDiffer(_difference("the model", group, worker_id, entries, "nothing more was applied"))


def check_state(state: TrainState, group: Group, worker_id: str, step: int, *, exact: bool) -> None:
    """Everyone in the mesh compares its copy of the state of `step`.

    Args:
        exact: what modules keep in `get_extra_state` must be equal too. Forward passes may change that, so in `fast` it
            depends on a worker's passes as buffers do, and the leading worker's is saved.

    Raises:
        CopiesDiffer: they are not equal. Which is right is not known, so none is to be saved.
    """
    entries = state_entries(state, exact=exact)
    rows = group.gather_rows_in_mesh([_digest(entries), _digest([e for e in entries if not e[1]])])
    copies = [{rows[place][0] for place in places} for places in group.layout.copies.values()]
    if any(len(copy) > 1 for copy in copies) or len({row[1] for row in rows}) > 1:
        what = f"the state of step {step}"
        raise CopiesDiffer(_difference(what, group, worker_id, entries, "nothing of this state was saved"))


def _digest(entries: list[Entry]) -> int:
    # a worker that has its optimizer's state from others may hold it in another order than they do
    return xxhash.xxh3_64_intdigest(repr(sorted(entries)).encode()) >> 1


def state_entries(state: TrainState, *, exact: bool = True) -> list[Entry]:
    """The state in detail."""
    part = str(state.part)
    tensors, values = state.collect()
    found = [
        (name, part if isinstance(tensor, DTensor) else "", tensor_digest(local(tensor)))
        for name, tensor in tensors.items()
        if exact or not name.startswith("modules/")
    ]
    modules = {f"get_extra_state() of {name or 'the model'}": v for name, v in values.pop("modules").items()}
    parts = {**{f"what is no tensor ({name})": v for name, v in values.items()}, **(modules if exact else {})}
    coded = {name: json.dumps(value, sort_keys=True).encode() for name, value in parts.items()}
    return [*found, *((name, "", xxhash.xxh3_64_hexdigest(data)) for name, data in coded.items())]


def tensor_digest(tensor: torch.Tensor) -> str:
    """Of a tensor's dtype, shape and bytes; of a device's tensors it is computed there."""
    head = f"{tensor.dtype} {list(tensor.shape)} "
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.device.type == "cpu":
        return head + xxhash.xxh3_64_hexdigest(memoryview(flat.numpy()))  # type: ignore[arg-type]
    return head + f"{weighted_sums(flat):x}"


def weighted_sums(data: torch.Tensor) -> int:
    """Sums over the rows and columns of some bytes, each with a weight of its own, modulo 2**64.

    The order in which a device adds integers does not matter, so the result is the same on all.

    Args:
        data: 1-d, uint8, on any device.
    """
    words = torch.nn.functional.pad(data, (0, -data.numel() % (4 * _ROW))).view(torch.int32).view(-1, _ROW)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for sums in (words.sum(0, dtype=torch.int64), words.sum(1, dtype=torch.int64)):
        weights = torch.arange(1, sums.numel() + 1, device=data.device) * _MULTIPLIER
        total = total * 31 + (sums * weights).sum()
    return int(total.item()) & ((1 << 64) - 1)


# ---- what differs --------------------------------------------------------------------------------------------------


def _difference(what: str, group: Group, worker_id: str, entries: list[Entry], then: str) -> str:
    found = first_difference([(worker, theirs) for worker, theirs in group.gather_json_in_mesh([worker_id, entries])])
    where = f"{found[0]} differs on {', '.join(found[1])}" if found else "they cannot say in what"
    return (
        f"{what} is not the same on all workers: {where}; {then}. Something in the job depends on the worker (its "
        "rank, the time, random numbers of its own, its data), or a device computes wrong values"
    )


def first_difference(everyone: Sequence[tuple[str, Sequence[Sequence[str]]]]) -> tuple[str, list[str]] | None:
    """The first entry that not all workers who hold it agree on, and who differs from most.

    Args:
        everyone: each worker's id and entries.
    """
    held = [(worker, {(name, part): digest for name, part, digest in theirs}) for worker, theirs in everyone]
    for key in dict.fromkeys(key for _, mine in held for key in mine):
        name, part = key
        found = [(worker, mine.get(key)) for worker, mine in held if key in mine or not part]
        usual, _ = Counter(digest for _, digest in found).most_common(1)[0]
        different = [worker for worker, digest in found if digest != usual]
        if different:
            return name, different
    return None
