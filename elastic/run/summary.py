"""The contents of a run's status.json and result.json. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic.membership.world import World
from elastic.observe.account import Account
from elastic.run.record import Record


def status_values(
    status: str,
    message: str,
    now: float,
    *,
    epoch: int,
    step: int,
    total_steps: int,
    world: World | None,
    server: str | None,
    checkpoint: int | None,
    checkpoint_failed: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the contents of status.json.

    Args:
        now: the time of this heartbeat, unix seconds.
        server: the URL of the server; None once the run has ended.
        checkpoint: the step of the newest checkpoint.
    """
    return {
        "status": status,
        "message": message,
        "heartbeat": now,
        "epoch": epoch,
        "step": step,
        "total_steps": total_steps,
        "world": None if world is None else {"generation": str(world.generation), "size": world.size},
        "members": [{"id": m.id, "node": m.node, "pid": m.pid} for m in (world.members if world else ())],
        "server": server,
        "checkpoint": checkpoint,
        "checkpoint_failed": checkpoint_failed,
        **facts,
    }


def result_values(
    status: str,
    message: str,
    record: Record,
    account: Account,
    *,
    step: int,
    last: Mapping[str, Any],
    seconds: float,
    result: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the contents of result.json.

    Args:
        account: the account of the whole run, with all claims.
        last: the row of the newest step, in whichever claim it was done.
        seconds: the duration of this claim.
        result: the values that the workers reported at the end; empty if they did not get there.
    """
    return {
        "status": status,
        "message": message,
        "steps": step,
        "samples_seen": last.get("samples"),
        "loss": last.get("loss"),
        "metrics": record.last_eval,
        **result,
        "stalls": record.stalls,
        "worker_hours": round(account.whole_s / 3600, 6),
        "cost": None if account.cost is None else round(account.cost, 6),
        "seconds": seconds,
        **facts,
    }
