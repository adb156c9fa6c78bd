"""Carries out commands: messages to workers, a rendezvous store for each world, events for the keeper."""

from __future__ import annotations

from collections.abc import Callable

from elastic import fault
from elastic.membership import protocol as wire
from elastic.membership.commands import (
    Break,
    Command,
    Dropped,
    Fail,
    Failed,
    Form,
    GiveUp,
    HandOver,
    Leave,
    LeftBehind,
    LeftOut,
    Park,
    Rebuilt,
    Refuse,
    SaveAlone,
    SaveNow,
    Welcome,
)
from elastic.membership.connections import Connections
from elastic.membership.keeper import Keeper


class Executor:
    """Executes commands; decides nothing.

    Args:
        host: address at which workers reach a world's rendezvous store.
        new_store: makes the rendezvous store of a new world; returns its port and a function that ends it.
    """

    def __init__(
        self,
        keeper: Keeper,
        connections: Connections,
        host: str,
        new_store: Callable[[], tuple[int, Callable[[], None]]],
    ):
        self._keeper, self._connections, self._host, self._new_store = keeper, connections, host, new_store
        self._end_store: Callable[[], None] | None = None
        self._wish: wire.Wished | None = None
        self._wished_at = wire.RestorePoint()
        self._parked = False
        self._allowed = 0
        self.given_up: set[str] = set()  # members whose processes the controller is to end

    def execute(self, command: Command) -> None:
        """Carry out one command."""
        keeper, connections = self._keeper, self._connections
        if isinstance(command, Form):
            self._form(command)
        elif isinstance(command, Rebuilt):
            keeper.world_resumed(command.world)
            connections.send_to_world(command.world, wire.Resume(command.world.generation))
        elif isinstance(command, Welcome):
            connections.send(command.member_id, wire.Resume(command.generation))
            if command.broken:
                connections.send(command.member_id, wire.Broken(command.generation))
        elif isinstance(command, Break):
            fault.point("world.breaking", -1, command.world.generation.n)
            self.drop_store()
            if command.planned:
                keeper.event("notice", generation=str(command.world.generation), detail=f"re-forming: {command.reason}")
            else:
                keeper.world_broken(command.world, command.lost, command.reason)
            connections.send_to_world(command.world, wire.Broken(command.world.generation))
        elif isinstance(command, Failed):
            member, failure = command.member, command.failure
            left = {"generation": str(command.world.generation)} if command.world is not None else {}
            keeper.event(
                "worker_failed",
                **left,
                member=member.id,
                node=member.node,
                pid=member.pid,
                step=failure.step + 1,
                detail=failure.message,
            )
        elif isinstance(command, Leave):
            keeper.event("notice", generation=str(command.world.generation), detail=f"re-forming: {command.why}")
            connections.send_to_world(command.world, wire.Wished("leave", command.why))
        elif isinstance(command, SaveNow):
            connections.send_to_world(command.world, wire.Wished("save", "a node goes away"))
        elif isinstance(command, LeftBehind):
            member, detail = command.member, "it does not answer yet; the others go on, and take it in when it does"
            keeper.event("member_late", member=member.id, node=member.node, pid=member.pid, detail=detail)
        elif isinstance(command, Dropped):
            member = command.member
            keeper.event("member_lost", member=member.id, node=member.node, pid=member.pid, detail=command.reason)
        elif isinstance(command, Refuse):
            self.refuse(command.member_id, command.reason)
        elif isinstance(command, LeftOut):
            keeper.event("notice", member=command.member.id, detail=f"left out: {command.reason}")
        elif isinstance(command, HandOver):
            keeper.event("handed_over", member=command.member.id, node=command.member.node)
            connections.send(command.member.id, wire.Over("handed over"))
        elif isinstance(command, Park):
            self._parked = True
            keeper.set_status("parked")
            there = f"{command.have} {command.what}"
            keeper.event("parked", detail=f"{there}, waiting for at least {command.need}: add nodes, or stop the run")
        elif isinstance(command, SaveAlone):
            connections.send(command.saver.id, wire.SaveAlone())
        elif isinstance(command, GiveUp):
            self._give_up(command)
        elif isinstance(command, Fail):
            keeper.close_run("failed", command.message)

    def wish(self, wish: wire.Wished) -> None:
        """Send a wish to all workers now, and to the members of later worlds until it is granted."""
        self._wish, self._wished_at = wish, self._keeper.restore_point()
        self._connections.broadcast(wish)

    def allow(self, step: int) -> None:
        """Let a run that pauses after evaluations go up to this step. The limit never becomes lower."""
        self._allowed = max(self._allowed, step)
        self._connections.broadcast(wire.Allowed(self._allowed))

    def welcome(self, member_id: str) -> None:
        """A worker has connected, perhaps again: send what it may have missed."""
        self._connections.send(member_id, wire.Allowed(self._allowed))

    def refuse(self, member_id: str, reason: str) -> None:
        """Tell a worker that it does not belong to the run any more; the controller is to end its process."""
        self.given_up.add(member_id)
        self._connections.send(member_id, wire.Out(reason))

    def drop_store(self) -> None:
        """End the rendezvous store's server, which frees every worker that still waits in it."""
        if self._end_store:
            self._end_store()
            self._end_store = None

    def _give_up(self, command: GiveUp) -> None:
        if command.saver is None:
            self._keeper.close_run(command.status, command.message)
        else:
            self._keeper.giving_up(command.status, command.message)
            self._connections.send(command.saver.id, wire.SaveAlone())

    def _form(self, command: Form) -> None:
        keeper, world = self._keeper, command.world
        self.drop_store()
        port, self._end_store = self._new_store()
        if self._parked:
            self._parked = False
            keeper.set_status("running")
            keeper.event("resumed", generation=str(world.generation))
        keeper.world_formed(world)
        restore, claim_step = keeper.restore_point(), keeper.claim_step()
        fault.point("world.forming", -1, world.generation.n)
        for rank, member in enumerate(world.members):
            assignment = wire.Assignment(
                world.generation,
                rank,
                world.size,
                (self._host, port),
                restore,
                claim_step,
                command.failing,
                command.parting,
                self._allowed,
            )
            self._connections.send(member.id, assignment)
        if self._wish and self._wish.wish == "save" and keeper.restore_point() != self._wished_at:
            self._wish = None  # it was granted: a checkpoint was committed since
        if self._wish:
            self._connections.broadcast(self._wish)
