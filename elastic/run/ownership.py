"""Checks that a run still belongs to this claim, and restores its folder if it was removed."""

from __future__ import annotations

import time
from collections.abc import Callable

from elastic.run.folder import RunFolder
from elastic.run.keeper_options import KeeperOptions
from elastic.run.ledger_writer import LedgerWriter
from elastic.run.outcome import Outcome


class Ownership:
    """A claim's hold on its run. All methods are for the keeper's thread.

    Args:
        give_up: called with the reason if the run belongs to another claim.
        on_removed: called after the folder was removed and the claim was written again.
    """

    def __init__(
        self,
        folder: RunFolder,
        options: KeeperOptions,
        outcome: Outcome,
        ledger: LedgerWriter,
        give_up: Callable[[str], None],
        on_removed: Callable[[], None],
    ):
        self._folder, self._options, self._outcome, self._ledger = folder, options, outcome, ledger
        self._give_up, self._on_removed = give_up, on_removed
        self._claimed_at = folder.claimed_at(options.epoch)
        self._config, self._new_config = folder.config(), options.new_config

    def lasts(self) -> bool:
        """Ask storage whether the run still belongs to this claim; if not, give the run up."""
        if self._outcome.closed:
            return False
        newest, epoch = self._ledger.patiently(self._folder.newest_epoch), self._options.epoch
        if newest > epoch:
            self._give_up(f"claim {newest} took the run over from claim {epoch}")
        elif self._claimed_at is not None:
            at = self._ledger.patiently(self._folder.claimed_at, epoch)
            if at is None and newest < epoch:
                self._write_anew()
            elif at is not None and at != self._claimed_at:
                self._give_up_removed()
        return not self._outcome.closed

    def trained(self) -> None:
        """The run has trained with its new configuration: store that in its folder."""
        if self._new_config is not None:
            self._ledger.patiently(self._folder.write_config, self._new_config)
            self._config, self._new_config = self._new_config, None

    def _give_up_removed(self) -> None:
        url = self._folder.storage.url
        self._give_up(f"{url} was removed while this run was live, and claimed by another command")

    def _write_anew(self) -> None:
        """The folder of this run was removed: write everything again that is still known."""
        facts, at = self._options.facts, time.time()
        claim = {"owner": facts.get("owner"), "process": facts.get("owner_process"), "time": at}
        try:
            self._ledger.patiently(self._folder.write_anew, self._options.epoch, self._config, claim)
        except FileExistsError:
            return self._give_up_removed()
        self._claimed_at = at
        self._on_removed()
