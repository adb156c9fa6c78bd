"""Hosting a run: the membership server and the keeper in one process, behind one URL."""

from __future__ import annotations

import platform
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from elastic.checkpoint.retention import Policy
from elastic.config import TrainConfig
from elastic.membership.decisions import advance
from elastic.membership.events import Scaled
from elastic.membership.server import MembershipServer
from elastic.membership.state import Limits, Phase, State
from elastic.prices import read_prices
from elastic.run.folder import RunFolder, owner
from elastic.run.keeper import RunKeeper
from elastic.run.keeper_options import KeeperOptions
from elastic.run.prepare import PreparedRun, git_commit, new_config
from elastic.run.process import identity
from elastic.run.versions import versions
from elastic.storage import Storage
from elastic.units import parse_amount

#: A restarted host counts on from the newest world in the ledger, plus this: those that did not get into it.
UNKNOWN_WORLDS = 1000


@dataclass(frozen=True)
class HostSettings:
    """How a run is hosted.

    Args:
        host, port: where to listen; workers must reach it. 0 takes a free port.
        hang_s: fixed hang time-out, or None for one that goes by the steps seen.
        restarted: an earlier host of this claim died; workers may be in the midst of a world.
    """

    limits: Limits
    token: str = field(repr=False)
    host: str
    port: int = 0
    hang_s: float | None = None
    restarted: bool = False


class RunHost:
    """The one process that decides worlds and writes the ledger of a run."""

    def __init__(self, folder_url: str, options: KeeperOptions, settings: HostSettings):
        self.keeper = RunKeeper(RunFolder(Storage(folder_url)), options)
        state = State(options.epoch, settings.limits)
        if settings.restarted:
            record = self.keeper.recover()
            if record.max_workers is not None:
                state, _ = advance(state, Scaled(record.max_workers, time.monotonic()))
            state = replace(
                state,
                phase=Phase.ENDED if self.keeper.ended() else Phase.REBUILDING,
                n=record.worlds + UNKNOWN_WORLDS,
                gone=record.gone,
                broken_at=time.monotonic(),
            )
        self.server = MembershipServer(
            self.keeper,
            state,
            settings.token,
            host=settings.host,
            port=settings.port,
            hang_s=settings.hang_s,
            new_store=lambda: _new_store(settings.host),
        )
        self.keeper.attach(self.server)

    def start(self, detail: dict[str, Any]) -> str:
        """Start serving; returns the URL."""
        self.server.start()
        self.keeper.start(detail)
        return self.server.url

    def stop(self) -> None:
        """Write out everything and stop serving."""
        self.keeper.stop()
        self.server.stop()


def import_store() -> None:
    """torch takes seconds to import; the first world needs its store, so it is imported meanwhile."""
    import torch.distributed  # noqa: F401


def _new_store(host: str) -> tuple[int, Callable[[], None]]:
    """A rendezvous store for one world; dropping its server frees everyone who still waits in it."""
    import torch.distributed as dist

    listening = socket.create_server((host, 0))  # torch itself would listen on every address of the machine
    port = listening.getsockname()[1]
    stores = [dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())]
    return port, stores.clear


def new_token() -> str:
    """A bearer token for one run."""
    return secrets.token_urlsafe(24)


def host_settings(config: TrainConfig, token: str, host: str) -> HostSettings:
    """The settings that a run's options ask for."""
    recovery, scaling = config.recovery, config.scaling

    def seconds(name: str, text: str) -> float:
        return parse_amount(f"--recovery.{name}", text, clock=True).seconds

    limits = Limits(
        min_workers=scaling.min_workers,
        max_workers=scaling.max_workers,
        spares=scaling.spares,
        microbatches=config.batch.microbatches,
        lease_s=seconds("lease", recovery.lease),
        max_wait_s=None if recovery.max_wait is None else seconds("max-wait", recovery.max_wait),
        max_failures=config.run.max_failures,
        exact=config.run.exactness == "bitwise",
        cut=config.parallel.sharded,
    )
    hang_s = None if recovery.hang_timeout == "auto" else seconds("hang-timeout", recovery.hang_timeout)
    return HostSettings(limits, token, host, hang_s=hang_s)


def start_detail(run: PreparedRun) -> dict[str, Any]:
    """What the event of the start says of the run; the account needs to know how its batches are dealt."""
    prices = read_prices(run.config.observe.price).to_json()
    return {
        "changed_code": run.changed_code or None,
        "microbatches": run.plan.microbatches,
        "padded": run.config.parallel.sharded,
        **({"prices": prices} if prices else {}),
    }


def keeper_options(run: PreparedRun, epoch: int, **facts: Any) -> KeeperOptions:
    """What the keeper of this run needs to know."""
    keep = run.config.checkpoint
    return KeeperOptions(
        epoch=epoch,
        retention=Policy(keep.keep_last, run.plan.keep_every, keep.keep_best, keep.best_metric, keep.best_mode),
        save_every_s=run.plan.checkpoint_every_s,
        total_steps=run.plan.total_steps,
        tensorboard=run.config.observe.tensorboard,
        max_cost=run.config.run.max_cost,
        new_config=new_config(run),
        facts={
            "run": run.name,
            "owner": owner(),
            "owner_process": identity(),
            "host": platform.node(),
            "git_commit": git_commit(),
            "source_sha256": run.source,
            "versions": versions(),
            **facts,
        },
    )
