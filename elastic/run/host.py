"""Hosting a run: the membership server and the keeper in one process, behind one URL."""

from __future__ import annotations

import platform
import secrets
from collections.abc import Callable
from typing import Any

from elastic.membership.server import MembershipServer
from elastic.membership.state import State
from elastic.run.folder import RunFolder, owner
from elastic.run.keeper import KeeperOptions, RunKeeper
from elastic.run.prepare import PreparedRun, git_commit
from elastic.run.versions import versions
from elastic.storage import Storage


class RunHost:
    """The one process that decides worlds and writes the ledger of a run.

    Args:
        host: address that workers can reach.
    """

    def __init__(self, folder_url: str, options: KeeperOptions, *, min_workers: int, token: str, host: str):
        self.token = token
        self.keeper = RunKeeper(RunFolder(Storage(folder_url)), options)
        state = State(epoch=options.epoch, min_workers=min_workers)
        self.server = MembershipServer(self.keeper, state, token, host=host, new_store=lambda: _new_store(host))
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


def _new_store(host: str) -> tuple[int, Callable[[], None]]:
    """A rendezvous store for one world; dropping its server frees everyone who still waits in it."""
    import torch.distributed as dist

    stores = [dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)]
    return stores[0].port, stores.clear


def new_token() -> str:
    """A bearer token for one run."""
    return secrets.token_urlsafe(24)


def keeper_options(run: PreparedRun, epoch: int, **facts: Any) -> KeeperOptions:
    """What the keeper of this run needs to know."""
    return KeeperOptions(
        epoch=epoch,
        keep_last=run.config.checkpoint.keep_last,
        total_steps=run.plan.total_steps,
        tensorboard=run.config.observe.tensorboard,
        price=run.config.observe.price,
        facts={
            "run": run.name, "owner": owner(), "host": platform.node(), "git_commit": git_commit(),
            "source_sha256": run.source, "versions": versions(), **facts,
        },
    )  # fmt: skip
