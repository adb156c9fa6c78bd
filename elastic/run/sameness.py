"""Checks, before any worker starts, whether a run that is resumed has the same data as before.

Workers compare it again, among themselves too. If the samples cannot be read here, it is left to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elastic.checkpoint.reader import newest_first, read_manifest
from elastic.config import TrainConfig
from elastic.errors import CheckpointError, ConfigError
from elastic.likeness import DATA, data_change, refusal
from elastic.run.folder import RunFolder


class Sameness:
    """The data that the newest checkpoint of a run was trained with.

    Args:
        folder: of a run that was started before; None for a new run, which has no earlier data.
    """

    def __init__(self, folder: RunFolder | None, config: TrainConfig):
        self._seed, self._name = config.run.seed, config.run.name
        self._allowed = DATA in config.run.allow_change
        self._before: dict[str, Any] | None = None
        self._step = 0
        self.longer = False  # the data is longer or shorter than before, as was allowed
        if folder is None or self._allowed:
            return
        for checkpoint in newest_first(folder.storage):
            try:
                manifest = read_manifest(folder.storage, checkpoint)
            except CheckpointError:  # a worker will report it, and load the one before
                continue
            found = manifest.world.get("data")
            self._before, self._step = found if isinstance(found, dict) else None, manifest.step
            return

    def load(self, make: Callable[[], Any]) -> Any:
        """Make the data; under the run's seed, as workers do, if it is to be compared."""
        if self._before is not None:
            from elastic.seeds import derive, seed_all

            seed_all(derive("data", self._seed))
        return make()

    def check_length(self, samples: int, before: dict[str, Any] | None) -> None:
        """Compare the number of samples. `before`: the data in the stored configuration, if its version stored that.

        Raises:
            ConfigError: the number changed, and may not.
        """
        self.longer = before is not None and before["samples"] != samples
        if before is not None and self.longer and not self._allowed:
            change = f"train_data() has {samples} samples, run {self._name} was started with {before['samples']}"
            raise ConfigError(refusal(change))

    def check(self, data: Any) -> None:
        """Compare a few samples with those of the newest checkpoint.

        Raises:
            ConfigError: a sample changed, and may not.
        """
        if self._before is None:
            return
        from elastic.data.identity import identify  # imports torch

        change = data_change(identify(data), self._before, f"when step {self._step} of run {self._name} was saved")
        if change:
            raise ConfigError(refusal(change))
