"""What a job has told to others while it trains: callbacks in the driver, and JSON lines as the simplest of them.

Trackers of other projects are in `trackers`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from elastic.errors import ConfigError
from elastic.observe.ledger import to_line

#: What a step's row has beside figures.
NO_FIGURES = frozenset(("step", "time", "format", "generation", "first_position", "count", "sample_hash"))


class Callback:
    """Hears of a run in the driver: never in workers, each record once, on a thread of its own.

    Nothing that it does ends or slows the training: an error is told once by a warning, and it is called again with the
    next record; if it is slow, records wait for it. At the end of the run it is waited for, for a minute.

    A step is told when it is first done. One that is done again, since the state after the newest checkpoint was lost,
    is not told again, by no later command of the run either: its row in the ledger counts, which in `bitwise` says the
    same, and in `fast` differs by rounding. `on_event` hears that it happened (`restored`, with the step).
    """

    def on_start(self, run: dict[str, Any]) -> None:
        """The run begins or goes on: `run` (its name), `folder`, `total_steps`, `options`, all as JSON has them."""

    def on_row(self, row: dict[str, Any]) -> None:
        """A row of `metrics.jsonl`: a step's `step`, `loss`, `lr`, `grad_norm`, the job's metrics, and more."""

    def on_eval(self, row: dict[str, Any]) -> None:
        """An evaluation: `step`, `time`, and `eval/...` for each figure."""

    def on_checkpoint(self, event: dict[str, Any]) -> None:
        """A checkpoint was committed: an event with `step`, `seconds`, and `detail`."""

    def on_event(self, event: dict[str, Any]) -> None:
        """Any other event of the ledger: `kind`, `time`, `generation`, and more."""

    def on_sample(self, step: int, sample: dict[str, str | bytes]) -> None:
        """What `Job.sample` made at a step, by name: texts, and pictures as PNG."""

    def on_end(self, end: dict[str, Any]) -> None:
        """How this command ended: `status`, `message`, and `result`, what `result.json` has."""


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by what trackers call them: `train/loss`, `eval/...`."""
    return {
        name if "/" in name else f"train/{name}": value
        for name, value in row.items()
        if name not in NO_FIGURES and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def need(package: str, who: str) -> None:
    """
    Raises:
        ConfigError: the package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{who} needs the package {package}, which is not installed; install it: pip install {package}"
        )


class JSONLines(Callback):
    """Appends all that it hears to a file: a line of JSON each, with what it is (`row`, `eval`, ...) as `is`.

    Args:
        path: on the driver's machine; its folder is made.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._file: TextIO | None = None

    def on_start(self, run: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a")
        self._write("start", run)

    def on_row(self, row: dict[str, Any]) -> None:
        self._write("row", row)

    def on_eval(self, row: dict[str, Any]) -> None:
        self._write("eval", row)

    def on_checkpoint(self, event: dict[str, Any]) -> None:
        self._write("checkpoint", event)

    def on_event(self, event: dict[str, Any]) -> None:
        self._write("event", event)

    def on_sample(self, step: int, sample: dict[str, str | bytes]) -> None:
        shown = {name: f"{len(one)} bytes of PNG" if isinstance(one, bytes) else one for name, one in sample.items()}
        self._write("sample", {"step": step, "sample": shown})

    def on_end(self, end: dict[str, Any]) -> None:
        self._write("end", end)
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, what: str, values: dict[str, Any]) -> None:
        if self._file is None:
            raise RuntimeError(f"{self._path} is not open")
        self._file.write(to_line({"is": what, **json.loads(json.dumps(values, default=str))}))
        self._file.flush()
