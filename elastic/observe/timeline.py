"""Who worked when in a run, and what each worker's time is charged to: the ledger read from first event to last."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from elastic.observe.account import Account, Interruption
from elastic.observe.causes import CAUSES
from elastic.observe.charges import Book, Charge, Tag
from elastic.observe.claims import Claim, Rows, Worker, World, by_claim, seen_alive, workers_by_node
from elastic.observe.segments import Deal, number, world_segments
from elastic.prices import Prices

_LOST = ("member_lost", "world_broken")
_ENDED = ("run_finished", "run_failed")
_RE_FORMING, _LEFT_OUT = "re-forming:", "left out:"
_PHASES = ("import", "data", "model", "rehearsal")


class Timeline:
    """Reads a ledger: call `take` once, then `account`."""

    def __init__(self, prices: Prices, microbatches: int | None = None):
        self._prices, self._microbatches, self._book = prices, microbatches, Book(prices)
        self._interruptions: list[Interruption] = []
        self._led_to: dict[str, int | None] = {}  # the interruption that led to a world, by the world's generation
        self._until: float | None = None
        self._live = False

    def take(
        self, rows: Iterable[dict[str, Any]], events: Sequence[dict[str, Any]], until: float | None, *, live: bool
    ) -> None:
        """Read the whole ledger.

        Args:
            rows, events: of all claims, each with a finite `time`.
            until: the end of the newest claim, if it recorded none, unix seconds.
            live: the run goes on.
        """
        self._until, self._live = until, live
        self._rows = Rows(rows)
        claims = by_claim(events)
        self._sharing = {epoch: workers_by_node(found) for epoch, found in claims}
        self._seen_alive = {a: seen_alive(found) for (a, _), (_, found) in itertools.pairwise(claims)}
        for place, (epoch, found) in enumerate(claims):
            self._read(epoch, found, first=place == 0, newest=place == len(claims) - 1)

    # ---- one claim -------------------------------------------------------------------------------------------------

    def _read(self, epoch: int, events: list[dict[str, Any]], *, first: bool, newest: bool) -> None:
        claim = Claim(epoch, self._deal(events))
        if not first:
            claim.pending = self._interruption("restarted", events[0]["time"], events[0].get("step"), "")
        for event in events:
            claim.now = max(claim.now, event["time"])
            if not claim.ended:
                self._take(claim, event)
        if not claim.ended:
            self._leave_over(claim, events, newest=newest)

    def _deal(self, events: Sequence[dict[str, Any]]) -> Deal:
        started = next((e for e in events if e["kind"] == "run_started"), {})
        detail = started.get("detail")
        detail = detail if isinstance(detail, dict) else {}
        microbatches, cell_size = detail.get("microbatches"), detail.get("cell_size")
        complete = isinstance(microbatches, int)
        cell_size = cell_size if type(cell_size) is int and cell_size > 0 else 1
        known = microbatches if complete else self._microbatches
        stages = detail.get("stages")
        stages = stages if type(stages) is int and stages > 0 else 1
        return Deal(known, bool(detail.get("padded")), complete, cell_size, stages)

    def _take(self, claim: Claim, event: dict[str, Any]) -> None:
        kind, detail = event["kind"], event.get("detail")
        if kind == "worker_warm":
            self._warm(claim, event)
        elif kind == "world_formed":
            self._form(claim, event)
        elif kind in _LOST:
            self._lose(claim, event)
        elif kind == "member_late":
            self._fall_silent(claim, event)
        elif kind == "notice" and isinstance(detail, str) and detail.startswith(_RE_FORMING):
            if claim.world is not None and claim.pending is None:
                reason = _first_line(detail.removeprefix(_RE_FORMING).strip())
                self._wait(claim, claim.workers.values(), frozenset())
                claim.pending = self._interruption("regrouped", claim.now, event.get("step"), reason)
        elif kind == "notice" and not str(detail).startswith(_LEFT_OUT):
            for worker in claim.workers.values():
                if worker.id == event.get("member") or (
                    "member" not in event and worker.node == event.get("node", worker)
                ):
                    worker.going = True
        elif kind == "handed_over":
            self._hand_over(claim, event)
        elif kind == "parked":
            if claim.world is not None:
                self._end_world(claim, "form")
            self._wait(claim, claim.workers.values(), frozenset())
            claim.parked = True
        elif kind in _ENDED:
            self._end(claim)

    def _warm(self, claim: Claim, event: dict[str, Any]) -> None:
        member, seconds = event.get("member"), number(event.get("seconds"))
        if not isinstance(member, str) or (member in claim.workers and claim.workers[member].alive):
            return
        detail = event.get("detail")
        detail = detail if isinstance(detail, dict) else {}
        worker = self._new(claim, member, str(event.get("node", "")), detail, claim.now - seconds)
        tag = claim.pending if not claim.worlds else claim.vacant.popleft() if claim.vacant else None
        shares, left = {}, seconds
        for phase in _PHASES:
            shares[f"startup/{phase}"] = part = min(left, number(detail.get(f"{phase}_s")))
            left -= part
        shares["startup/other"] = left
        if seconds > 0:
            shares = {cause: part / seconds for cause, part in shares.items()}
            self._book.add(
                {worker.kind: 1}, worker.since, claim.now, [(cause, share, tag) for cause, share in shares.items()]
            )
        worker.since = claim.now

    def _new(self, claim: Claim, member: str, node: str, detail: Any, born: float) -> Worker:
        kind = (
            str(detail.get("node_type") or ""),
            str(detail.get("market") or ""),
            self._sharing[claim.epoch].get(node, 1),
        )
        worker = claim.workers[member] = Worker(member, node, kind, born, born)
        return worker

    def _form(self, claim: Claim, event: dict[str, Any]) -> None:
        detail = event.get("detail")
        ids = [i for i in (detail.get("ids") or () if isinstance(detail, dict) else ()) if isinstance(i, str)]
        if claim.world is not None:
            self._end_world(claim, "form")
        for member in ids:
            worker = claim.workers.get(member)
            if worker is None:
                self._new(claim, member, "", {}, claim.now)
            elif not worker.alive:  # it was only silent, and answers again
                worker.alive = worker.silent = True
        self._wait(claim, claim.workers.values(), frozenset(ids))
        for member in ids:
            claim.workers[member].silent = False
        generation = str(event.get("generation"))
        found = self._rows.steps.get(generation, {})
        rows = [found[step] for step in sorted(found)]
        spares = rows[0].get("idle", ()) if rows else ()
        idle = frozenset(ids[rank] for rank in spares if isinstance(rank, int) and 0 <= rank < len(ids))
        claim.world = World(
            generation, ids, claim.now, rows, self._rows.evaluations.get(generation, {}), claim.pending, idle
        )
        self._led_to[generation] = claim.pending
        if claim.pending is not None:
            self._interruptions[claim.pending].generation = generation
        claim.pending, claim.parked, claim.last_ids = None, False, frozenset(ids)
        claim.worlds += 1

    def _lose(self, claim: Claim, event: dict[str, Any]) -> None:
        lost = claim.workers.get(str(event.get("member")))
        world = claim.world
        stands = world is not None and event.get("generation", world.generation) == world.generation
        within = stands or (world is not None and lost is not None and lost.id in world.ids)
        if within:
            kind = "lost" if event["kind"] == "member_lost" else "broken"
            if claim.pending is not None:  # a worker was lost while the members were about to leave as planned
                planned = self._interruptions[claim.pending]
                planned.kind, planned.reason = kind, _first_line(event.get("detail"))
            else:
                reason = _first_line(event.get("detail"))
                claim.pending = self._interruption(kind, claim.now, event.get("step"), reason)
            self._wait(claim, claim.workers.values(), frozenset())
            self._end_world(claim, "detect")
        if lost is None or not lost.alive:
            return
        self._wait(claim, [lost], frozenset())
        self._die(claim, lost)
        if claim.pending is not None:
            found = self._interruptions[claim.pending]
            found.members.append(lost.id)
            if found.kind == "broken":  # others noticed the break before the cause was known
                found.kind, found.reason = "lost", found.reason or _first_line(event.get("detail"))
            claim.vacant.append(claim.pending)

    def _fall_silent(self, claim: Claim, event: dict[str, Any]) -> None:
        worker = claim.workers.get(str(event.get("member")))
        if worker is not None and worker.alive and (claim.world is None or worker.id not in claim.world.ids):
            self._wait(claim, [worker], frozenset())
            worker.silent = True

    def _hand_over(self, claim: Claim, event: dict[str, Any]) -> None:
        worker = claim.workers.get(str(event.get("member")))
        if worker is None or not worker.alive:
            return
        worker.going = True
        if claim.world is not None and worker.id in claim.world.ids:
            self._charge_world(claim, claim.world, [worker], "draining")
            claim.world.ids.remove(worker.id)
        self._wait(claim, [worker], frozenset())
        self._die(claim, worker)

    def _end(self, claim: Claim) -> None:
        if claim.world is not None:
            self._end_world(claim, "ending", standing=True)
        self._wait(claim, claim.workers.values(), frozenset())
        for worker in claim.workers.values():
            self._die(claim, worker)
        claim.world, claim.ended = None, True

    def _leave_over(self, claim: Claim, events: list[dict[str, Any]], *, newest: bool) -> None:
        """End a claim that has no end in the ledger: its driver was killed, or it is live."""
        last = max(claim.now, self._rows.last.get(claim.epoch, -math.inf))
        until = self._until if newest else self._seen_alive.get(claim.epoch)
        until = last if until is None else max(last, until)
        live = newest and self._live
        if claim.world is not None:
            claim.now = until
            self._end_world(claim, "under_way" if live else "left_over", standing=True)
        claim.now = until if live else last
        self._wait(claim, claim.workers.values(), frozenset())
        claim.now = until
        for worker in claim.workers.values():
            if worker.alive:
                self._book.add({worker.kind: 1}, worker.since, until, [("left_over", 1.0, None)])
                self._die(claim, worker)

    # ---- charges ---------------------------------------------------------------------------------------------------

    def _interruption(self, kind: str, at: float, step: Any, reason: str) -> int:
        self._interruptions.append(Interruption(kind, at, step if isinstance(step, int) else None, reason))
        return len(self._interruptions) - 1

    def _die(self, claim: Claim, worker: Worker) -> None:
        if worker.alive:
            worker.alive = False
            worker.since = max(worker.since, claim.now)
            self._book.lived(worker.kind, worker.born, worker.since)
            worker.born = worker.since

    def _end_world(self, claim: Claim, tail: str, *, standing: bool = False) -> None:
        """Charge all members' time in the world, up to now."""
        world = claim.world
        assert world is not None
        members = [claim.workers[i] for i in world.ids if claim.workers[i].alive]
        self._charge_world(claim, world, members, tail)
        if not standing:
            claim.world = None

    def _charge_world(self, claim: Claim, world: World, members: list[Worker], tail: str) -> None:
        idle = [w for w in members if w.id in world.idle]
        training = [w for w in members if w.id not in world.idle]
        size = len(claim.last_ids) - len(world.idle)
        kinds, spare = Counter(w.kind for w in training), Counter(w.kind for w in idle)
        together = self._book.constant(kinds)
        for segment in world_segments(
            world.formed,
            claim.now,
            world.rows,
            world.evaluations,
            self._rows.redone(world.generation),
            tail,
            size,
            claim.deal,
            together=together,
        ):
            parts: list[Charge] = []
            for cause, share in segment.shares.items():
                tag: Tag = segment.redone
                if segment.first and cause in ("form", "restore") and world.rows:
                    tag = world.because
                elif segment.last and cause == tail:
                    tag = claim.pending
                parts.append((cause, share, tag))
            self._book.add(kinds, segment.begin, segment.end, parts)
        self._book.add(spare, world.formed, claim.now, [("spare", 1.0, None)])
        for worker in members:
            worker.since = max(worker.since, claim.now)

    def _wait(self, claim: Claim, workers: Iterable[Worker], joined: frozenset[str]) -> None:
        """Charge what workers outside of a world have waited for, up to now."""
        for worker in workers:
            if not worker.alive or (claim.world is not None and worker.id in claim.world.ids):
                continue
            cause, tag = self._waited_for(claim, worker, joined)
            self._book.add({worker.kind: 1}, worker.since, claim.now, [(cause, 1.0, tag)])
            worker.since = max(worker.since, claim.now)

    def _waited_for(self, claim: Claim, worker: Worker, joined: frozenset[str]) -> tuple[str, Tag]:
        if worker.silent:
            return "silent", None
        if worker.going:
            return "draining", None
        if claim.parked:
            return "parked", claim.pending
        wanted = worker.id in joined or (claim.world is None and (worker.id in claim.last_ids or not claim.worlds))
        return ("form", claim.pending) if wanted else ("spare", None)

    # ---- what it comes to ------------------------------------------------------------------------------------------

    def account(self) -> Account:
        """Return the account of what was read."""
        book = self._book
        seconds, costs = dict.fromkeys(CAUSES, 0.0), dict.fromkeys(CAUSES, 0.0)
        for (cause, tag), (spent, money) in book.charges.items():
            seconds[cause] += spent
            costs[cause] += money
            place = self._led_to.get(tag) if isinstance(tag, str) else tag
            if place is not None:
                found = self._interruptions[place]
                found.seconds[cause] = found.seconds.get(cause, 0.0) + spent
                found.costs[cause] = found.costs.get(cause, 0.0) + money
        some = book.whole_s > 0
        return Account(
            begin=book.begin if some else None,
            end=book.end if some else None,
            whole_s=book.whole_s,
            seconds=seconds,
            costs=costs if self._prices else None,
            on_demand_cost=book.on_demand if book.on_demand_known else None,
            unpriced_s=book.unpriced_s if self._prices else 0.0,
            interruptions=tuple(self._interruptions),
        )


def _first_line(detail: Any) -> str:
    lines = str(detail or "").splitlines()
    return lines[0] if lines else ""
