"""A worker's share in the snapshots of a run: when a snapshot is due, when every member's part is in the vaults, and
how the state is restored. No snapshots are taken where a second failure domain holds the state anyway.

A snapshot begins at a step boundary. It is complete when, at some later fence, every member reports that its part is in
the vault of its node and in the vault of the node's partner. Only then may vaults reuse the memory of the snapshot
before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from elastic import fault
from elastic.errors import ConfigError, SnapshotError
from elastic.membership.client import WorkerLink
from elastic.membership.world import Generation
from elastic.parallel.probe import state_share
from elastic.placement import Part
from elastic.snapshot.adopted import a_byte
from elastic.snapshot.cadence import Meter
from elastic.snapshot.client import VaultClient
from elastic.snapshot.holdings import Complete, SnapshotId
from elastic.snapshot.partners import Vault, domains, memory, needs_copies, partners, short_of_memory
from elastic.worker import snapshot_restore
from elastic.worker.group import Group
from elastic.worker.snapshot_upload import CALLED_OFF, SEND_S, Sender, Upload
from elastic.worker.state import TrainState

IN_VAULTS, UNDER_WAY, FAILED = 0, 1, 2  # what a member reports of its part; the highest value counts for all
GRACE_S = 2.0  # for an upload that is under way when its world breaks


class Snapshots:
    """One worker's parts of all snapshots of a run. All methods are called on the training thread.

    Args:
        every: steps between snapshots; 0 measures what suits the run, None takes no snapshots.
        own: the URL of the vault on this node.
    """

    def __init__(self, every: int | None, own: str, token: str, link: WorkerLink, device: torch.device):
        self._every, self._own, self._token, self._link = every, own, token, link
        self._sender = Sender(own, token, device, self._on_end) if every is not None else None
        self._meter = Meter()
        self._newest: SnapshotId | None = None  # the newest complete one
        self._near: set[str] = set()  # the URLs of the vaults of this world
        self._known: set[str] = set()  # the same, with those of the world before
        self._undone: int | None = None  # steps after this one are computed again
        self._entered = self._active = self._writes = False
        self._state: TrainState | None = None
        self._attempt: SnapshotId | None = None  # the snapshot that is not complete yet
        self._part: Upload | None = None  # this worker's part of it
        self._free = True  # no member has an upload under way
        self._agreed_every, self._begun = 0, 0
        self._troubled = False  # a skipped snapshot is in the ledger already

    @property
    def on(self) -> bool:
        return self._every is not None

    def close(self) -> None:
        """Call off the upload under way and free the memory."""
        if self._sender is not None:
            self._sender.close()

    # ---- worlds ----------------------------------------------------------------------------------------------------

    def enter(self, group: Group, state: TrainState | None, step: int) -> None:
        """Enter a world, all of whose members are at `step`. All members call this together, spares too.

        Raises:
            ConfigError: before the first step of the run: snapshots do not fit into memory.
        """
        if self._sender is None:
            return
        self._sender.cancel()
        self._part = self._attempt = None
        self._group, self._state, self._generation = group, state, group.assignment.generation
        self._free, self._begun, self._agreed_every, self._troubled = True, step, 0, False
        rows = group.gather_json(self._introduction(state))
        self._newest = max((SnapshotId.parse(r["newest"]) for r in rows if r["newest"]), default=None)
        vaults = sorted({Vault(*r["vault"]) for r in rows})
        self._known, self._near = self._near | {v.url for v in vaults}, {v.url for v in vaults}
        if self._undone is not None and group.rank == 0:
            before = SnapshotId(self._generation.epoch, self._generation.n, 0)
            snapshot_restore.forget(self._near, self._token, self._undone, before)
        self._undone = None
        partner, domain = partners(vaults), domains(vaults)
        layout, nodes = group.layout, [r["vault"][0] for r in rows]
        columns = [[layout.ranks[place] for place in places] for places in layout.copies.values()]
        self._active = needs_copies([[domain[nodes[r]] for r in ranks] for ranks in columns])
        if self._active:
            parts = [(nodes[r], int(rows[r]["bytes"])) for r, *_ in columns]
            copied = {nodes[r] for r, row in enumerate(rows) if not row["maps"]}
            self._check_vaults(memory(parts, partner, copied), rows, partner)
        self._entered = True
        self._writes = self._active and group.place is not None and layout.is_first(group.place)
        mine = partner.get(self._link.member.node)
        self._urls = (self._own,) if mine is None else (self._own, mine.url)
        if self._active and step > 0:  # so that parts whose copy was lost have two copies again
            self._begin(step)

    def _introduction(self, state: TrainState | None) -> dict[str, Any]:
        member, answers = self._link.member, True
        vault = VaultClient(self._own, self._token, SEND_S)
        try:
            with a_byte() as memory:
                seen = vault.memory(memory)
        except SnapshotError:
            answers, seen = False, {"held": 0, "available": 0, "maps": 1}
        finally:
            vault.close()
        assert self._sender is not None
        self._sender.maps = bool(seen["maps"])
        return {
            "vault": [member.node, member.host, self._own],
            "there": answers,
            **seen,
            "bytes": 0 if state is None else _bytes_of(state),
            "entered": self._entered,
            "newest": None if self._newest is None else str(self._newest),
        }

    def _check_vaults(self, need: dict[str, int], rows: list[dict[str, Any]], partner: dict[str, Vault]) -> None:
        """Record how much memory snapshots need on each node. If it is too much, refuse them before the first step of
        the run, and later do without them."""
        leads, running = self._group.leads, any(r["entered"] for r in rows)
        vaults = {Vault(*r["vault"]): r for r in rows}
        available = {v.host: max(int(r["available"]) for o, r in vaults.items() if o.host == v.host) for v in vaults}
        for vault, row in vaults.items():
            available[vault.host] += row["held"]
        away = sorted(r["vault"][0] for r in rows if not r["there"])
        short = short_of_memory(need, [*vaults], available)
        if away:  # the vault is restarted; until then nothing is sent to it, and no snapshot is complete
            if leads:
                self._post("snapshot_skipped", self._begun, f"the vault of node {away[0]} does not answer")
        elif short is not None:
            if not running:
                raise ConfigError(
                    f"--recovery.snapshot-every is on, but {short}; leave it off, or use nodes with more memory"
                )
            self._active = False
            if leads:
                self._post("snapshot_skipped", self._begun, f"none in this world: {short}")
        elif leads and not running:
            detail: dict[str, Any] = {"bytes": need, "available": available}
            detail["partners"] = {node: vault.node for node, vault in sorted(partner.items())}
            if not partner:
                detail["warning"] = "one failure domain only: when a node is lost, all copies are lost"
            self._post("snapshots_planned", self._begun, detail)

    def leave(self) -> None:
        """Leave the world. An upload under way may go on and arrive."""
        self._state = None

    def undone(self, step: int) -> None:
        """Note that the steps after this one are computed again. Their snapshots are void from the next `enter` on."""
        if self._newest is not None and self._newest.step > step:
            self._newest = None
        self._undone = step

    # ---- restoring -------------------------------------------------------------------------------------------------

    def find(self, group: Group) -> tuple[list[Complete], str]:
        """Return the complete snapshots, newest first, and the reason why there is none or why a newer one is not
        complete. All members call this together."""
        if self._sender is None:
            return [], ""
        self._sender.wait(GRACE_S)
        known_by_all = group.gather_json([self._own, sorted(self._known)])
        answer = None
        if group.rank == 0:
            near, far = {own for own, _ in known_by_all}, {url for _, known in known_by_all for url in known}
            found, reason = snapshot_restore.choose(sorted(near), sorted(far), self._token)
            answer = [[str(c.id), [[part.key, urls] for part, urls in c.urls.items()]] for c in found], reason
        found, reason = group.send_json(answer, 0)
        return [
            Complete(SnapshotId.parse(id), {Part.parse(part): tuple(urls) for part, urls in parts})
            for id, parts in found
        ], reason

    def load(
        self, group: Group, make: Callable[[bool], TrainState] | None, found: Complete
    ) -> tuple[TrainState | None, int]:
        """Load this worker's part of a complete snapshot. All members call this together.

        Args:
            make: builds the state that the values are loaded into; None for a worker whose part other workers read.

        Returns:
            the state (None without `make`), and the number of bytes that were read.

        Raises:
            SnapshotError: on all workers, if any of them could not read its part.
        """
        state, read = snapshot_restore.load(group, make, found, self._own, self._token)
        self._newest = found.id
        return state, read

    # ---- in the step loop ------------------------------------------------------------------------------------------

    def for_fence(self) -> tuple[int, ...]:
        """Return the values for the fence: how far the upload of this worker's part is, and how many steps this worker
        proposes between snapshots. Empty if the run takes no snapshots."""
        if self._every is None:
            return ()
        stage, part = IN_VAULTS, self._part
        if part is not None and not part.ended.is_set():
            stage = UNDER_WAY
        elif part is not None and self._attempt is not None and part.error is not None:
            stage = FAILED
        return (stage, self._every or self._meter.every())

    def agreed(self, values: tuple[int, ...]) -> None:
        """Take over the result of a fence: the element-wise maximum of all members' `for_fence`."""
        if not values:
            return
        stage, self._agreed_every = values
        self._free = stage != UNDER_WAY
        if self._attempt is None or stage == UNDER_WAY:
            return
        if stage == IN_VAULTS:
            fault.point("snapshot.complete", self._group.rank, self._attempt.step)
            self._newest, self._troubled = self._attempt, False
            if self._part is not None and self._sender is not None:
                self._sender.complete(self._newest)
        self._attempt = None

    def settle(self) -> float:
        """Wait until the state is copied; call this before the state is written to. Returns the seconds that it
        waited."""
        return self._sender.settle() if self._sender is not None else 0.0

    def after(self, step: int, seconds: float) -> float:
        """Take a snapshot if one is due after a step that took `seconds`. Returns the seconds that this call took."""
        began = time.perf_counter()
        if self._active:
            self._take_if_due(step, seconds)
        return time.perf_counter() - began

    def _take_if_due(self, step: int, seconds: float) -> None:
        self._meter.step(seconds, under_way=self._attempt is not None)
        if not self._agreed_every or step - self._begun < self._agreed_every:
            return
        if self._free:
            self._meter.began()
            self._begin(step)
        elif self._attempt is not None and self._group.leads:
            self._skip(step, self._generation, f"the snapshot of step {self._attempt.step} is still under way")

    def columns(self) -> dict[str, int]:
        """Return the column for the row of a step: the step of the newest complete snapshot."""
        return {"snapshot": self._newest.step} if self._active and self._newest is not None else {}

    # ---- parts -----------------------------------------------------------------------------------------------------

    def _begin(self, step: int) -> None:
        self._attempt = SnapshotId(self._generation.epoch, self._generation.n, step)
        self._begun, self._part = step, None
        if not self._writes:
            return
        state = self._state
        assert state is not None
        assert self._sender is not None
        tensors, values = state.collect()
        self._part = part = Upload(
            self._attempt,
            state.part,
            self._group.rank,
            self._urls,
            self._newest,
            values if state.part.first(()) == state.part else {},
            state.specs(tensors),
            state.shards(0, 1, tensors),
        )
        self._sender.start(part)

    def _on_end(self, part: Upload) -> None:
        """Record why an upload failed. Called on the sender's thread."""
        if part.error is not None and part.error != CALLED_OFF:
            self._skip(part.id.step, Generation(part.id.epoch, part.id.n), part.error)

    def _skip(self, step: int, generation: Generation, why: str) -> None:
        """Record that a snapshot was skipped; once only until a snapshot is complete again."""
        if not self._troubled:
            self._troubled = True
            self._link.event("snapshot_skipped", step, why, generation=generation)

    def _post(self, event: str, step: int, detail: Any) -> None:
        self._link.event(event, step, detail)


def _bytes_of(state: TrainState) -> int:
    """Return the bytes of this worker's part, with those of the state that the optimizer adds at the first step."""
    size = sum(shard.tensor.numel() * shard.tensor.element_size() for shard in state.shards(0, 1))
    if state.optimizer.state:
        return size
    for group, share in zip(state.optimizer.param_groups, state_share(state.optimizer), strict=True):
        own = [p.to_local() if hasattr(p, "to_local") else p for p in group["params"]]
        size += int(share * sum(p.numel() * p.element_size() for p in own if p.requires_grad))
    return size
