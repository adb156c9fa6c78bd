"""Restoring a sharded state from the vaults: which snapshot to take, and how its bytes are read. All members of a world
take part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from elastic import fault
from elastic.checkpoint.tensors import DTYPES
from elastic.errors import CheckpointError, SnapshotError
from elastic.placement import Part, TensorSpec
from elastic.snapshot.client import VaultClient
from elastic.snapshot.holdings import Complete, Holding, SnapshotId, complete, lost_parts
from elastic.worker.group import Group
from elastic.worker.snapshot_layout import pieces
from elastic.worker.state import TrainState

SURVEY_S = 2.0
READ_S = 30.0
ASKED_AT_ONCE = 32


def survey(urls: Iterable[str], token: str) -> dict[str, list[Holding]]:
    """Return what each vault holds, by its URL. Vaults that do not answer are left out: their nodes may be gone."""

    def ask(url: str) -> list[Holding] | None:
        vault = VaultClient(url, token, SURVEY_S)
        try:
            return vault.holdings()
        except SnapshotError:
            return None
        finally:
            vault.close()

    return {url: found for url, found in _ask_all(ask, sorted(set(urls))) if found is not None}


def forget(urls: Iterable[str], token: str, after: int, before: SnapshotId) -> None:
    """Make the vaults drop the snapshots of undone steps: those after step `after` that worlds older than `before`
    took. A vault that does not answer can be ignored, because no snapshot is complete without the vaults that do
    answer."""

    def send(url: str) -> None:
        vault = VaultClient(url, token, SURVEY_S)
        try:
            vault.forget(after, before)
        except SnapshotError:
            pass
        finally:
            vault.close()

    _ask_all(send, sorted(set(urls)))


def _ask_all(call: Callable[[str], Any], urls: list[str]) -> list[tuple[str, Any]]:
    if not urls:
        return []
    with ThreadPoolExecutor(min(len(urls), ASKED_AT_ONCE), thread_name_prefix="vaults") as pool:
        return list(zip(urls, pool.map(call, urls), strict=True))


def choose(near: Sequence[str], far: Sequence[str], token: str) -> tuple[list[Complete], str]:
    """Return the complete snapshots, newest first, and the reason why there is none or why a newer one is not complete
    (empty if the newest one is complete).

    Args:
        near: the vaults on the nodes of the members, which answer at once.
        far: further vaults, which are asked only if the newest snapshot is not complete without them.
    """
    holdings = [h for held in survey(near, token).values() for h in held]
    found = complete(holdings)
    if not found or found[0].id != max(h.id for h in holdings):
        holdings += [h for held in survey(set(far) - set(near), token).values() for h in held]
        found = complete(holdings)
    whole = found and found[0].id == max(h.id for h in holdings)
    return found, "" if whole else lost_parts(holdings)


def load(
    group: Group, make: Callable[[bool], TrainState] | None, found: Complete, own: str, token: str
) -> tuple[TrainState | None, int]:
    """Load this worker's part of the new mesh from a complete snapshot. All members of the world call this together,
    spares too.

    Args:
        make: builds the state that the values are loaded into; None for a worker whose part other workers read.
        own: the URL of the vault on this worker's node, which is read first.

    Returns:
        the state (None without `make`), and the number of bytes that were read.

    Raises:
        SnapshotError: on all workers, if any of them could not read its part.
    """
    head, problem = None, None
    if group.rank == 0:
        try:
            head = _head(found, token)
        except SnapshotError as error:
            problem = str(error)
    head, problem = group.send_json([head, problem], 0)
    if problem is not None:
        raise SnapshotError(problem)
    specs = [TensorSpec.of(raw) for raw in head["tensors"]]
    state, read = None, 0
    try:
        if make is not None:
            state = make(False)
            fault.point("snapshot.reading", group.rank, found.id.step)
            tensors, read = _read(found, specs, state.part, own, group.rank, token)
            state.load(tensors, head["values"], specs)
    except (SnapshotError, CheckpointError) as error:
        problem = str(error)
    problems = [p for p in group.gather_json(problem) if p]
    if problems:
        raise SnapshotError(problems[0])
    return state, read


def _head(found: Complete, token: str) -> dict[str, Any]:
    error: SnapshotError | None = None
    first, urls = next(iter(found.urls.items()))
    for url in urls:
        vault = VaultClient(url, token, READ_S)
        try:
            return vault.head(found.id, first)
        except SnapshotError as failed:
            error = failed
        finally:
            vault.close()
    assert error is not None, "a complete snapshot has a first part"
    raise error


def _read(
    found: Complete, specs: list[TensorSpec], mine: Part, own: str, rank: int, token: str
) -> tuple[dict[str, torch.Tensor], int]:
    """Return the boxes of this worker's part in the new mesh, by tensor name, and the number of bytes that were
    read."""
    tensors = [torch.empty(spec.box(mine).sizes, dtype=DTYPES[spec.dtype]) for spec in specs]
    flat = [memoryview(t.reshape(-1).view(torch.uint8).numpy().data) for t in tensors]

    def fetch(old: Part) -> int:
        plan = pieces(specs, old, mine)
        wanted = [(start, flat[tensor][target : target + length]) for tensor, start, target, length in plan]
        if wanted:
            _fetch(found.id, old, found.urls[old], wanted, own, rank, token)
        return sum(len(into) for _, into in wanted)

    with ThreadPoolExecutor(min(len(found.urls), 8), thread_name_prefix="vaults") as pool:
        count = sum(pool.map(fetch, found.urls))
    return {spec.name: tensor for spec, tensor in zip(specs, tensors)}, count


def _fetch(
    id: SnapshotId,
    part: Part,
    urls: Sequence[str],
    wanted: list[tuple[int, memoryview]],
    own: str,
    rank: int,
    token: str,
) -> None:
    """Read from the vault on this node if it has the part, otherwise from the others in turn. Workers begin with
    different vaults, according to their rank, so that no vault serves all of them."""
    turn = rank % len(urls)
    order = sorted([*urls[turn:], *urls[:turn]], key=lambda url: url != own)
    for i, url in enumerate(order):
        vault = VaultClient(url, token, READ_S)
        try:
            return vault.read_into(id, part, wanted)
        except SnapshotError:
            if i == len(order) - 1:
                raise
        finally:
            vault.close()
