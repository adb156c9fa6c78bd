"""Writes TensorBoard event files of a run, from its rows."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from elastic.observe.callbacks import figure_name
from elastic.storage import Storage

_SKIP = {"step", "time", "format", "generation", "first_position", "count", "sample_hash", "gradient_bytes"}


class TensorBoard:
    """Writes scalars to `<run>/tensorboard/`; in object storage by way of a temporary folder that is uploaded."""

    def __init__(self, storage: Storage, epoch: int):
        from tensorboardX import SummaryWriter

        self._storage = storage
        self._temporary = None if storage.local else tempfile.mkdtemp(prefix="elastic-tensorboard-")
        self._folder = self._temporary or storage.path("tensorboard")
        self._writer = SummaryWriter(self._folder, filename_suffix=f".{epoch}", flush_secs=10)

    def row(self, row: dict[str, Any]) -> None:
        """Add every number of a row."""
        for name, value in row.items():
            if name not in _SKIP and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(figure_name(name, row), value, row["step"], walltime=row["time"])

    def flush(self) -> None:
        """Write and, if need be, upload what was added."""
        self._writer.flush()
        if self._temporary:
            for file in Path(self._temporary).iterdir():
                self._storage.upload(f"tensorboard/{file.name}", str(file))

    def close(self) -> None:
        """Write what was added and remove the temporary folder."""
        self.flush()
        self._writer.close()
        if self._temporary:
            shutil.rmtree(self._temporary)
