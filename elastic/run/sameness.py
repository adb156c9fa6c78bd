"""Whether a run that is resumed has the data it had: what can be told before any worker starts.

Workers compare again, and among themselves. Here the samples may be out of reach; then it is left to them.
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
    """The data that the newest checkpoint of a run was trained on.

    Args:
        folder: of a run that was started before; None for a new one, of which nothing is known.
    """

    def __init__(self, folder: RunFolder | None, config: TrainConfig):
        self._seed, self._name = config.run.seed, config.run.name
        self._allowed = DATA in config.run.allow_change
        self._before: dict[str, Any] | None = None
        self._step = 0
        self.longer = False  # or shorter than it was, as was allowed
        if folder is None or self._allowed:
            return
        for checkpoint in newest_first(folder.storage):
            try:
                manifest = read_manifest(folder.storage, checkpoint)
            except CheckpointError:  # a worker says so, and takes the one before
                continue
            found = manifest.world.get("data")
            self._before, self._step = found if isinstance(found, dict) else None, manifest.step
            return

    def load(self, make: Callable[[], Any]) -> Any:
        """Make the data as workers do: under the run's seed, if they are to be compared."""
        if self._before is not None:
            from elastic.seeds import derive, seed_all

            seed_all(derive("data", self._seed))
        return make()

    def check_length(self, samples: int, before: dict[str, Any] | None) -> None:
        """`before` is what the run's configuration says of its data, if it was stored by a version that did.

        Raises:
            ConfigError: it is another one, and may not be.
        """
        self.longer = before is not None and before["samples"] != samples
        if before is not None and self.longer and not self._allowed:
            change = f"train_data() has {samples} samples, run {self._name} was started with {before['samples']}"
            raise ConfigError(refusal(change))

    def check(self, data: Any) -> None:
        """Compare a few samples.

        Raises:
            ConfigError: one is not what it was, and may not change.
        """
        if self._before is None:
            return
        from elastic.data.identity import identify  # imports torch

        change = data_change(identify(data), self._before, f"when step {self._step} of run {self._name} was saved")
        if change:
            raise ConfigError(refusal(change))
