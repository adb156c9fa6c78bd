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
from elastic.garbage import importing
from elastic.membership.decisions import advance
from elastic.membership.events import Scaled
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

#: A restarted host numbers worlds from the newest one in the ledger plus this, because later worlds may be missing
#: there.
UNKNOWN_WORLDS = 1000


@dataclass(frozen=True)
class HostSettings:
    """How a run is hosted.

    Args:
        limits: the limits of the run's worlds.
        token: the bearer token of the run.
        host, port: the address on which to listen; workers must reach it. Port 0 takes a free port.
        hang_s: a fixed time-out for hung workers in seconds, or None for one that follows the duration of the steps.
        restarted: whether an earlier host of this claim died; workers may then be in a world.
    """

    limits: Limits
    token: str = field(repr=False)
    host: str
    port: int = 0
    hang_s: float | None = None
    restarted: bool = False

    @property
    def url(self) -> str:
        """Where a host with a fixed port serves."""
        return f"http://{self.host}:{self.port}"


class RunHost:
    """The membership server and the keeper of a run, which decide its worlds and write its ledger."""

    def __init__(self, folder_url: str, options: KeeperOptions, settings: HostSettings):
        from elastic.membership.server import MembershipServer  # and aiohttp, which a driver does without

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
        """Start serving; returns the server's URL. `detail` goes into the event of the start."""
        self.server.start()
        self.keeper.start(detail)
        return self.server.url

    def stop(self) -> None:
        """Write everything that is queued and stop serving."""
        self.keeper.stop()
        self.server.stop()


def import_store() -> None:
    """Import torch.distributed, for the store of the first world. It takes seconds, so it is done in advance."""
    with importing():
        import torch.distributed  # noqa: F401


def _new_store(host: str) -> tuple[int, Callable[[], None]]:
    """Start a rendezvous store for one world.

    Returns:
        its port, and a function that drops its server, which frees all members that wait in it.
    """
    import torch.distributed as dist

    listening = socket.create_server((host, 0))  # torch itself would listen on every address of the machine
    port = listening.getsockname()[1]
    stores = [dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())]
    return port, stores.clear


def new_token() -> str:
    """Make a bearer token for one run."""
    return secrets.token_urlsafe(24)


def host_settings(config: TrainConfig, token: str, host: str) -> HostSettings:
    """Make the settings of a host from a run's options."""
    recovery, scaling = config.recovery, config.scaling

    def seconds(name: str, text: str) -> float:
        return parse_amount(f"--recovery.{name}", text, clock=True).seconds

    limits = Limits(
        min_workers=config.least_workers,
        max_workers=scaling.max_workers,
        spares=scaling.spares,
        microbatches=config.batch.microbatches,
        cell_size=config.parallel.tensor,
        stages=config.parallel.stages,
        lease_s=seconds("lease", recovery.lease),
        max_wait_s=None if recovery.max_wait is None else seconds("max-wait", recovery.max_wait),
        max_failures=config.run.max_failures,
        exact=config.run.exactness == "bitwise",
        cut=config.parallel.sharded,
    )
    hang_s = None if recovery.hang_timeout == "auto" else seconds("hang-timeout", recovery.hang_timeout)
    return HostSettings(limits, token, host, hang_s=hang_s)


def start_detail(run: PreparedRun) -> dict[str, Any]:
    """Return the detail of the event of the start. The account of worker-seconds reads from it how batches are
    dealt."""
    prices = read_prices(run.config.observe.price).to_json()
    return {
        "changed_code": run.changed_code or None,
        "microbatches": run.plan.microbatches,
        "padded": run.config.parallel.sharded,
        **({"cell_size": run.config.parallel.tensor} if run.config.parallel.tensor > 1 else {}),
        **({"stages": run.config.parallel.stages} if run.config.parallel.stages > 1 else {}),
        **({"prices": prices} if prices else {}),
    }


def keeper_options(run: PreparedRun, epoch: int, **facts: Any) -> KeeperOptions:
    """Make the keeper's options for this run. `facts` are added to those in its status."""
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
