"""Compares the copies of all workers: of the update that they are about to apply, and of the state itself.

Every worker with ddp, and every row with hsdp, applies an update that it computed by itself. If two differ, their
states drift apart, and the weights of one of them are saved. So a fingerprint of each update is part of the fence of
its step, or of the record of the next step where steps have no fence, and digests of the state are compared after a
join, after the second update of each command, before each checkpoint, and every `--run.check-every` steps.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import xxhash

from elastic.errors import CopiesDiffer, UpdatesDiffer
from elastic.parallel.layout import ROWS, TENSOR
from elastic.parallel.replicated import dense
from elastic.parallel.wrapping import cut_of, local
from elastic.placement import Cut, Part
from elastic.worker.flags import NEUTRAL
from elastic.worker.group import Group
from elastic.worker.state import TrainState

_MULTIPLIER = -7046029254386353131  # odd, of 64 bits: 2**64 over the golden ratio
_ROW = 1024
_PLAIN = (int, float, bool, str, type(None))
_ALL = Part()
Entry = tuple[str, str, str]  # what is compared, which part of it ("" if all workers hold it), and its digest


# ---- the update ----------------------------------------------------------------------------------------------------


def for_all(fingerprint: int) -> tuple[int, int]:
    """A fingerprint for the fence or a record, from which the members get the largest of each number."""
    return fingerprint, -fingerprint


def equal(largest: Sequence[int]) -> bool:
    """Whether all members that applied an update had equal fingerprints."""
    return largest[0] == -largest[1] or tuple(largest) == NEUTRAL


def update_fingerprint(numbers: Sequence[float], optimizer: torch.optim.Optimizer) -> int:
    """A non-negative number of 61 bits: a hash of an update's norm and other numbers, of each group's options, and of
    which parameters have gradients."""
    found = xxhash.xxh3_64(struct.pack(f"<{len(numbers)}d", *numbers))
    for group in optimizer.param_groups:
        found.update(repr(_options(group)).encode())
        found.update(bytes([p.grad is not None for p in group["params"]]))
    return found.intdigest() >> 3


def _options(group: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in sorted(group.items()) if key != "params" and _is_plain(value)]


def _is_plain(value: Any) -> bool:
    if type(value) in _PLAIN or isinstance(value, _PLAIN):  # the first is quicker
        return True
    return isinstance(value, (tuple, list)) and all(map(_is_plain, value))


def update_entries(
    numbers: Mapping[str, float],
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str] | None = None,
    part: Part = _ALL,
) -> list[Entry]:
    """The update in detail, so that workers can find what differs.

    Args:
        names: of the parameters, by their id; without names there are no entries for gradients, which are gone.
        part: what this worker holds of the state.
    """
    found: list[Entry] = []
    for index, group in enumerate(optimizer.param_groups):
        for p in group["params"] if names is not None else ():
            value = tensor_digest(dense(local(p.grad))) if p.grad is not None else "none"
            name = (names or {}).get(id(p), "a parameter")
            found.append((f"the gradient of {name}", _which(part, cut_of(name, p)), value))
        found += [(f"{key} of parameter group {index}", "", repr(value)) for key, value in _options(group)]
    return found + [(name, "", value.hex()) for name, value in numbers.items()]


def update_error(step: int, group: Group, worker_id: str, entries: list[Entry]) -> UpdatesDiffer:
    """The error that ends the run if the update of `step` differs. All workers in the mesh call this at the same
    time."""
    return UpdatesDiffer(
        _difference(f"the update of step {step}", group, worker_id, entries, "nothing of this step was applied")
    )


def applied_error(step: int, group: Group, worker_id: str, entries: list[Entry]) -> CopiesDiffer:
    """Make the error that ends the run if a difference is seen one step later. All members of the mesh call this at one
    time."""
    what = f"the update of step {step}"
    return CopiesDiffer(_difference(what, group, worker_id, entries, "it was applied, so this state was not saved"))


# ---- the state -----------------------------------------------------------------------------------------------------


def trained_error(group: Group, worker_id: str, trained: Mapping[str, bool]) -> CopiesDiffer:
    """The error that ends the run if workers train different parameters. All workers in the mesh call this together."""
    entries = [(f"whether {name} is trained", "", str(value)) for name, value in trained.items()]
    return CopiesDiffer(_difference("the model", group, worker_id, entries, "nothing more was applied"))


def change_of_trained(trained: Mapping[str, bool], before: Iterable[bool]) -> str:
    """Describe which parameters are trained now that were not `before`, "+", and the other way round, "-"."""
    found: dict[str, list[str]] = {"+": [], "-": []}
    for (name, now), was in zip(trained.items(), before):
        if now != was:
            found["+" if now else "-"].append(name)
    return ", ".join(
        f"{sign} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
        for sign, names in found.items()
        if names
    )


def check_state(state: TrainState, group: Group, worker_id: str, step: int, *, exact: bool) -> None:
    """Compare the copies of the state of `step` of all workers in the mesh.

    Args:
        exact: results of modules' `get_extra_state` must be equal too. Forward passes may change them, so in `fast`
            they depend on a worker's passes, as buffers do, and those of the leading worker are saved.

    Raises:
        CopiesDiffer: they differ. None is saved, since nobody knows which one is right.
    """
    entries = state_entries(state, exact=exact)
    labels = _labels(state.part)
    digests = group.gather_rows_in_mesh([_digest([e for e in entries if e[1] == label]) for label in labels])
    held: dict[tuple[int, str], set[int]] = {}
    for place, row in enumerate(digests):
        for kind, (label, digest) in enumerate(zip(_labels(group.layout.part(place)), row, strict=True)):
            held.setdefault((kind, label), set()).add(digest)
    if any(len(found) > 1 for found in held.values()):
        what = f"the state of step {step}"
        raise CopiesDiffer(_difference(what, group, worker_id, entries, "nothing of this state was saved"))


#: How tensors may be cut: a worker's copies of a tensor are on all that have the same part along these axes.
_CUTS: tuple[Cut, ...] = ((), ROWS, ((TENSOR, 0),), ((TENSOR, 0), *ROWS))


def _which(part: Part, cut: Cut) -> str:
    """Which part of a tensor with this cut a worker holds, as a text; empty if it is all of it."""
    along = part.along(cut)
    return str(along) if along.axes else ""


def _labels(part: Part) -> list[str]:
    """Which parts of tensors a worker holds, each once, and as many for each worker of a mesh."""
    return list(dict.fromkeys(_which(part, cut) for cut in _CUTS))


def _digest(entries: list[Entry]) -> int:
    # workers may hold the entries of the optimizer's state in different orders, if they got it from others
    return xxhash.xxh3_64_intdigest(repr(sorted(entries)).encode()) >> 1


def state_entries(state: TrainState, *, exact: bool = True) -> list[Entry]:
    """The state in detail."""
    tensors, values = state.collect()
    found = [
        (name, _which(state.part, cut_of(name, tensor)), tensor_digest(local(tensor)))
        for name, tensor in tensors.items()
        if exact or not name.startswith("modules/")
    ]
    values.pop("attributes", None)  # such as the time of an update
    modules = {f"get_extra_state() of {name or 'the model'}": v for name, v in values.pop("modules").items()}
    parts = {**{f"what is no tensor ({name})": v for name, v in values.items()}, **(modules if exact else {})}
    coded = {name: json.dumps(value, sort_keys=True).encode() for name, value in parts.items()}
    return [*found, *((name, "", xxhash.xxh3_64_hexdigest(data)) for name, data in coded.items())]


def tensor_digest(tensor: torch.Tensor) -> str:
    """A digest of a tensor's dtype, shape and bytes; for a device's tensors it is computed there."""
    head = f"{tensor.dtype} {list(tensor.shape)} "
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.device.type == "cpu":
        return head + xxhash.xxh3_64_hexdigest(memoryview(flat.numpy()))  # type: ignore[arg-type]
    return head + f"{weighted_sums(flat):x}"


def weighted_sums(data: torch.Tensor) -> int:
    """The sums over rows and columns of some bytes, each with a weight of its own, modulo 2**64.

    The order in which a device adds integers does not matter, so all devices get the same result.

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
    """The first entry on which workers that hold it differ, and the workers that differ from the majority.

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
