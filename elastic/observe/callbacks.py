"""Callbacks: what a job has the driver tell to others while it trains. JSON lines are the simplest of them.

Trackers of other projects are in `trackers`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from elastic.errors import ConfigError
from elastic.observe.ledger import COLUMNS, to_line

#: The columns of a step's row that are no figures.
NO_FIGURES = frozenset(("step", "time", "format", "generation", "first_position", "count", "sample_hash"))


class Callback:
    """Receives the records of a run: in the driver, never in workers; each record once, on a thread of its own.

    A callback can neither end nor slow the training. If it raises, a warning tells the first error, and it is called
    again with the next record. If it is slow, records wait for it; at the end of the run the driver waits for it for up
    to a minute.

    A step is reported when it is done first. A step that is done again, because the state after the newest checkpoint
    was lost, is not reported again, not even by a later command of the run. In the ledger the row that was written last
    counts: in `bitwise` it says the same, in `fast` it differs by rounding. `on_event` is told that steps were done
    again (`restored`, with the step).
    """

    def on_start(self, run: dict[str, Any]) -> None:
        """The run begins or goes on.

        Args:
            run: `run` (its name), `folder`, `total_steps` and `options`, as JSON values.
        """

    def on_row(self, row: dict[str, Any]) -> None:
        """A step was taken.

        Args:
            row: a row of `metrics.jsonl`: `step`, `loss`, `lr`, `grad_norm`, the job's metrics, and more.
        """

    def on_eval(self, row: dict[str, Any]) -> None:
        """The state was evaluated.

        Args:
            row: `step`, `time`, and `eval/...` for each figure.
        """

    def on_checkpoint(self, event: dict[str, Any]) -> None:
        """A checkpoint was committed.

        Args:
            event: with `step`, `seconds` and `detail`.
        """

    def on_event(self, event: dict[str, Any]) -> None:
        """Something else happened.

        Args:
            event: an event of the ledger: `kind`, `time`, `generation`, and more.
        """

    def on_sample(self, step: int, sample: dict[str, str | bytes]) -> None:
        """`Job.sample` made something.

        Args:
            sample: by name: texts, and pictures as PNG.
        """

    def on_end(self, end: dict[str, Any]) -> None:
        """This command ends.

        Args:
            end: `status`, `message`, and `result`, which is what `result.json` has.
        """


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row by the names that trackers use: `train/loss`, `eval/...`."""
    return {
        figure_name(name, row): value
        for name, value in row.items()
        if name not in NO_FIGURES and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def figure_name(column: str, row: Mapping[str, Any]) -> str:
    """The name that trackers use for a column of a row; what is of a phase alone has the phase in it."""
    own = column in ("loss", "lr", "grad_norm") or column not in COLUMNS
    turn = f"{row['phase']}/" if "phase" in row and own else ""
    return column if "/" in column else f"train/{turn}{column}"


def need(package: str, who: str) -> None:
    """Check that a package is installed.

    Args:
        who: needs it, for the message.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{who} needs the package {package}, which is not installed; install it: pip install {package}"
        )


class JSONLines(Callback):
    """Appends what it receives to a file: one line of JSON per record, with the kind (`row`, `eval`, ...) as `is`.

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
