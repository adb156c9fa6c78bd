"""Which checkpoints to keep, and removing the others without ever listing a torn one."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from elastic import fault
from elastic.checkpoint.format import ATTEMPT, FOLDER, MANIFEST, parse_step, step_folder
from elastic.checkpoint.patience import patiently
from elastic.checkpoint.reader import (
    Committed,
    attempts,
    marked,
    newest_first,
    read_manifest,
    steps_with_attempts,
    unmark,
)
from elastic.checkpoint.uploads import sweep_uploads
from elastic.errors import CheckpointError, DamagedCheckpoint
from elastic.storage import Storage

PINS = f"{FOLDER}/pins"


@dataclass(frozen=True)
class Policy:
    """The checkpoints to keep: the newest `last`, those at multiples of `every` steps, the `best` by a metric, and
    pins."""

    last: int = 3
    every: int | None = None
    best: int = 0
    metric: str = "eval/loss"
    mode: Literal["min", "max"] = "min"


@dataclass(frozen=True)
class Known:
    """What a manifest says that matters here: its metrics, the objects of other checkpoints that it reads, and the
    least size of each object that it reads. `damage` says why nobody can read it."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    elsewhere: frozenset[str] = frozenset()
    objects: Mapping[str, int] = field(default_factory=dict)
    damage: str | None = None


def to_keep(
    committed: Sequence[Committed],
    metrics: Mapping[Committed, Mapping[str, float]],
    pins: Collection[int],
    policy: Policy,
) -> set[Committed]:
    """Which of the committed checkpoints, given newest first, are kept. Of a step, only its newest attempt can be."""
    newest: dict[int, Committed] = {}
    for checkpoint in committed:
        newest.setdefault(checkpoint.step, checkpoint)
    steps = sorted(newest, reverse=True)
    kept = set(steps[: max(1, policy.last)]) | (set(pins) & set(steps))
    if policy.every:
        kept |= {s for s in steps if s % policy.every == 0}
    scored = [(metrics.get(newest[s], {}).get(policy.metric), s) for s in steps]
    sign = 1 if policy.mode == "min" else -1
    ranked = sorted((sign * value, -s) for value, s in scored if value is not None and value == value)
    kept |= {-s for _, s in ranked[: policy.best]}
    return {newest[s] for s in kept}


def to_remove(newest: Committed | None, kept: Collection[Committed], found: Collection[Committed]) -> list[Committed]:
    """The attempts to remove, of those `found`, committed or not: nothing that the newest may be followed by."""
    if newest is None:
        return []
    return sorted((a for a in found if a not in kept and _order(a) < _order(newest)), key=_order)


def _order(attempt: Committed) -> tuple[int, int, int, str]:
    match = ATTEMPT.match(attempt.attempt)
    assert match is not None
    return attempt.step, int(match[1]), int(match[2]), attempt.attempt


@dataclass(frozen=True)
class Removal:
    """An attempt to remove, with the bytes of its objects that nobody needs."""

    step: int
    attempt: str
    committed: bool
    bytes: int


def removals(
    storage: Storage, attempts: Collection[Committed], committed: Collection[Committed], needed: Collection[str]
) -> list[Removal]:
    """Return what can be removed with these attempts: everything but the objects in them that other checkpoints
    need."""
    found = []
    for attempt in sorted(attempts, key=lambda a: (a.step, a.attempt)):
        paths = [f"{attempt.folder}/{name}" for name in storage.names(attempt.folder)]
        sizes = [patiently(storage.size, path) for path in paths if path not in needed]
        if sizes or not paths:
            found.append(Removal(attempt.step, attempt.attempt, attempt in committed, sum(sizes)))
    return found


class Retention:
    """Prunes a run's checkpoints by a policy; remembers manifests, which never change. One at a time, one process.

    Those that make up the `last` to be kept must be there whole, as far as names and sizes tell: what is newer and is
    not is in `damaged` then, with the reason, and does not count. So the last one that can be loaded is never removed.

    Of a live run only its keeper may call this, between commits.

    Args:
        unloadable: further ones that do not count; may grow.
    """

    def __init__(self, storage: Storage, policy: Policy, unloadable: Collection[Committed] = ()):
        self._storage, self._policy, self._unloadable = storage, policy, unloadable
        self._known: dict[Committed, Known] = {}
        self.damaged: dict[Committed, str] = {}

    def plan(self) -> tuple[list[Committed], set[str]]:
        """The attempts to remove, and the objects in them that must stay because kept checkpoints read them."""
        storage = self._storage
        committed = self._that_count()
        if not committed:
            return [], set()
        if self._policy.best:
            for checkpoint in committed:
                self._know(checkpoint)
        metrics, pinned = {c: k.metrics for c, k in self._known.items()}, pins(storage)
        kept = to_keep(committed, metrics, pinned, self._policy)
        found = {Committed(s, a) for s in steps_with_attempts(storage) for a in attempts(storage, s)}
        bad = {c for c in marked(storage) | self.damaged.keys() if c.step in pinned}  # somebody may still mend those
        gone = to_remove(committed[0], kept | bad, found | set(committed))
        # Removed manifests stop counting, so what only they refer to may go too.
        staying = [c for c in committed if c not in gone]
        return gone, set().union(*(self._know(c).elsewhere for c in staying))

    def prune(self) -> list[Committed]:
        """Remove what `plan` says, and unfinished uploads of attempts that are over; returns what was removed.

        The manifest goes first, so that whatever interrupts this, no checkpoint is listed that lacks a pack.
        """
        storage = self._storage
        gone, needed = self.plan()
        marks = marked(storage) if gone else set()
        for attempt in gone:
            storage.remove(f"{attempt.folder}/{MANIFEST}")
            self._known.pop(attempt, None)
            fault.point("prune.after_manifest", -1, attempt.step)
        removed = []
        for attempt in gone:
            names = storage.names(attempt.folder)
            staying = [n for n in names if f"{attempt.folder}/{n}" in needed]
            if not staying:
                storage.remove(attempt.folder)
            for name in set(names) - set(staying) if staying else ():
                storage.remove(f"{attempt.folder}/{name}")
            if attempt in marks:
                unmark(storage, attempt)
            if len(staying) < len(names):
                removed.append(attempt)
        for step in {a.step for a in gone}:
            if not storage.names(step_folder(step)):
                storage.remove(step_folder(step))
        newest = next((c for c in newest_first(storage) if c not in self.damaged), None)
        if newest is not None:
            sweep_uploads(storage, FOLDER, keep=lambda name: not _is_over(name, newest))
        return removed

    def _that_count(self) -> list[Committed]:
        """Newest first."""
        found: list[Committed] = []
        self.damaged, steps, sizes = {}, set[int](), dict[str, dict[str, int]]()
        for checkpoint in newest_first(self._storage):
            if checkpoint in self._unloadable:
                continue
            if len(steps) < max(1, self._policy.last) and checkpoint.step not in steps:
                problem = self._damage(checkpoint, sizes)
                if problem is not None:
                    self.damaged[checkpoint] = problem
                    continue
            steps.add(checkpoint.step)
            found.append(checkpoint)
        return found

    def _damage(self, checkpoint: Committed, sizes: dict[str, dict[str, int]]) -> str | None:
        """Return why a checkpoint is damaged, as far as names and sizes show it; None if it is not.

        Args:
            sizes: of the objects in each folder that was listed, in bytes.
        """
        known = self._know(checkpoint)
        for path, least in known.objects.items():
            folder, _, name = path.rpartition("/")
            if folder not in sizes:
                sizes[folder] = patiently(self._storage.sizes, folder)
            if name not in sizes[folder]:
                if not patiently(self._storage.exists, path):
                    return f"{path} is missing"
            elif sizes[folder][name] < least:
                return f"{path} has {sizes[folder][name]} bytes of at least {least}"
        return known.damage

    def _know(self, checkpoint: Committed) -> Known:
        if checkpoint not in self._known:
            known = Known()
            try:
                manifest = read_manifest(self._storage, checkpoint)
                packs, own = manifest.objects(checkpoint.folder), f"{checkpoint.folder}/"
                elsewhere = frozenset(p for p in packs if not p.startswith(own))
                known = Known(manifest.metrics, elsewhere, packs)
            except DamagedCheckpoint as error:
                known = Known(damage=str(error))
            except CheckpointError:  # of a newer format: it has no metrics here and needs nothing
                pass
            self._known[checkpoint] = known
        return self._known[checkpoint]


def _is_over(name: str, newest: Committed) -> bool:
    """Whether an object belongs to an attempt that is older than the newest committed one."""
    parts = name.split("/")
    step = parse_step(parts[1]) if len(parts) == 4 else None
    if step is None or not ATTEMPT.match(parts[2]):
        return False
    return _order(Committed(step, parts[2])) < _order(newest)


# ---- pins ----------------------------------------------------------------------------------------------------------


def pins(storage: Storage) -> set[int]:
    """Steps that nobody may remove."""
    return {s for s in map(parse_step, storage.names(PINS)) if s is not None}


def pin(storage: Storage, step: int) -> None:
    """Keep the checkpoint of this step until it is unpinned.

    Raises:
        CheckpointError: there is none.
    """
    if not any(checkpoint.step == step for checkpoint in newest_first(storage)):
        raise CheckpointError(f"step {step} has no committed checkpoint in {storage.url}; see which there are with ls")
    with contextlib.suppress(FileExistsError):
        storage.create(f"{PINS}/{step_folder(step).rpartition('/')[2]}", b"{}")


def unpin(storage: Storage, step: int) -> None:
    """Let the checkpoint of this step go when its time comes."""
    storage.remove(f"{PINS}/{step_folder(step).rpartition('/')[2]}")
