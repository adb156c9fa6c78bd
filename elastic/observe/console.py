"""The console: one readable line every few seconds, every event, and an estimate of the time that is left."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from typing import Any, TextIO, cast

from elastic.observe.history import TONE_OF
from elastic.observe.ledger import COLUMNS
from elastic.observe.streams import Sturdy
from elastic.redact import printable, redact

LEAST_BAR, MOST_BAR = 10, 40  # columns
HISTORY_S = 15.0  # seconds between two lines of progress that stay above the one that is redrawn
_TOLD_ALWAYS = ("parked", "resumed", "run_finished")  # shown even if --quiet was given, beside what went wrong
#: Events of a death, which are shown in several lines.
DEATHS = ("process_ended", "last_words")
_UNTOLD = ("end", "restored")  # events that are not shown: the line of the world says enough


def seconds_text(seconds: float) -> str:
    """Return seconds as "1.2s", "3m10s" or "2h05m"."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{s:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m"


def row_text(
    row: dict[str, Any], total_steps: int, rate: float | None, samples_rate: float | None, width: int | None = None
) -> str:
    """Return a row as one line, with the job's own metrics.

    Args:
        rate: steps per second.
        samples_rate: samples per second, or tokens per second if rows have tokens.
        width: columns of the terminal; what matters less is left out if it does not fit.
    """
    turn = f"{row['phase']} " if "phase" in row else ""
    own = {k: v for k, v in row.items() if k not in COLUMNS and isinstance(v, (int, float))}
    parts = [(0, f"step {row['step']}/{total_steps}"), (1, f"{turn}loss {_number(row.get('loss'))}")]
    parts += [(6 if n else 4, f"{name} {_number(value)}") for n, (name, value) in enumerate(own.items())]
    parts.append((7, f"lr {row.get('lr', 0):.3g}"))
    if row.get("grad_norm") is not None:
        parts.append((8, f"norm {row['grad_norm']:.3g}"))
    parts.append((5, f"workers {row['world_size']}"))
    if rate:
        unit = "tok/s" if row.get("tokens") else "samples/s"
        parts.append((3, f"{samples_rate:,.0f} {unit}"))
        parts.append((2, f"ETA {seconds_text((total_steps - row['step']) / rate)}"))
    if width is None:
        return _joined(parts)
    shown = parts[:1]
    for part in sorted(parts[1:], key=lambda part: part[0]):
        wider = [p for p in parts if p in shown or p is part]
        shown = wider if len(_joined(wider)) <= width else shown
    return _joined(shown)


def _joined(parts: list[tuple[int, str]]) -> str:
    return "  ".join(text for _, text in parts)


def eval_text(row: dict[str, Any]) -> str:
    """Return the row of an evaluation as one line."""
    values = [f"{k.removeprefix('eval/')} {_number(v)}" for k, v in row.items() if k.startswith("eval/")]
    return f"step {row['step']}  eval: " + "  ".join(values)


def event_text(event: dict[str, Any], *, whole: bool = False) -> str:
    """Return an event as one line.

    Args:
        whole: with all lines of its detail.
    """
    words = [event["kind"].replace("_", " ")]
    if event["kind"] == "run_finished" and event.get("detail") != "finished":
        words = ["run paused"]
    if event.get("generation"):
        words.append(f"world {event['generation']}")
    if event.get("step") is not None:
        words.append(f"step {event['step']}")
    if event.get("member"):
        words.append(f"worker {event['member']}")
    if event.get("seconds") is not None:
        words.append(f"{event['seconds']:.2f}s")
    detail = event.get("detail")
    if event["kind"] == "sample" and isinstance(detail, dict):
        words += [f"{name}: {text.splitlines()[0] if text else ''}" for name, text in detail["texts"].items()]
        words += detail["pictures"].values()
    elif event["kind"] == "worker_warm":
        words.append(f"on {event['node'][:12]}, process {event['pid']}")
    elif isinstance(detail, dict):
        words += [f"{k}={v}" for k, v in detail.items() if v is not None]
    elif detail:
        words.append(str(detail) if whole else str(detail).splitlines()[0])
    return " ".join(words)


def result_text(values: dict[str, Any], folder: str) -> str:
    """Return how a run ended, for people: figures, hash, sample, and where everything lies."""
    metrics = "  ".join(f"{k.removeprefix('eval/')} {_number(v)}" for k, v in values.get("metrics", {}).items())
    lines = [f"{values['status']} after step {values['steps']}" + (f"; held-out: {metrics}" if metrics else "")]
    if values.get("sample"):
        lines += ["sample:", *(f"  | {line}" for line in str(values["sample"]).splitlines())]
    if values.get("weights_sha256"):
        lines.append(f"weights sha256 {values['weights_sha256']}")
    place = redact(folder)
    lines += [f"results in {place}", f"look at it with: elastic report {place} --html report.html"]
    return printable("\n".join(lines))


def _number(value: Any) -> str:
    return "nan" if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"


class Console:
    """Prints the records of a run. On a terminal the newest line is redrawn at the bottom, and some stay above it.

    If writing fails, the console turns itself off; the run goes on.

    Args:
        every_s: the least seconds between two lines of progress.
        live: redraw the newest line if `out` is a terminal; False if others write to it too.
        quiet: show only what went wrong, and how the run ended.
    """

    def __init__(
        self, total_steps: int, every_s: float, out: TextIO | None = None, *, live: bool = True, quiet: bool = False
    ):
        self._total, self._every_s, self._quiet = total_steps, every_s, quiet
        out = out or sys.stdout
        self._out = out if isinstance(out, Sturdy) else Sturdy(out)
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=50)
        self._last_line = 0.0
        self._live: Any = None
        self._newest = ""  # the line of progress that was drawn and is not kept yet
        if live and not quiet and self._out.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
            from rich.console import Console as RichConsole
            from rich.live import Live

            self._live = Live(console=RichConsole(file=cast(TextIO, self._out)), refresh_per_second=4, transient=True)
            self._live.start()

    def print(self, text: str) -> None:
        """Print a line, with secrets replaced."""
        text = printable(redact(text))
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=self._out, flush=True)

    def record(self, record: dict[str, Any]) -> None:
        """Show a row or an event."""
        if "kind" in record:
            if record["kind"] not in _UNTOLD and (not self._quiet or self._tells_always(record["kind"])):
                self.print(f"[{time.strftime('%H:%M:%S', time.localtime(record['time']))}] {event_text(record)}")
        elif self._quiet:
            return
        elif "loss" in record:
            self._progress(record)
        else:
            self.print(eval_text(record))

    @staticmethod
    def _tells_always(kind: str) -> bool:
        return TONE_OF.get(kind) == "bad" or kind in _TOLD_ALWAYS

    def _progress(self, row: dict[str, Any]) -> None:
        amount = row.get("tokens") or row.get("samples") or 0
        self._recent.append((row["time"], row["step"], amount))
        first, last = self._recent[0], self._recent[-1]
        elapsed = last[0] - first[0]
        rate = (last[1] - first[1]) / elapsed if elapsed > 0 else None
        amount_rate = (last[2] - first[2]) / elapsed if elapsed > 0 else None
        now = time.monotonic()
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):  # rich asks the standard streams, which may be closed
                self._live.console.width = os.get_terminal_size(self._out.fileno()).columns
            width = self._live.console.width
            text = row_text(row, self._total, rate, amount_rate, width)
            self._live.update(_bar(row, self._total, text, width))
            self._newest = text
            self._last_line = self._last_line or now
            if now - self._last_line >= max(self._every_s, HISTORY_S):
                self._last_line = now
                self._keep()
            return
        if now - self._last_line >= self._every_s or row["step"] == self._total:
            self._last_line = now
            self.print(row_text(row, self._total, rate, amount_rate))

    def _keep(self) -> None:
        """Keep the newest line of progress above the one that is redrawn."""
        text, self._newest = self._newest, ""
        if text:
            self.print(text)

    def close(self) -> None:
        """Restore the terminal, with the newest line of progress in its history."""
        if self._live is not None:
            self._keep()
            self._live.stop()
            self._live = None


def _bar(row: dict[str, Any], total: int, text: str, width: int) -> Any:
    """Make one line of the text and, if it fits beside it, a bar."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    line = Table.grid(padding=(0, 2, 0, 0))
    room = width - len(text) - 3
    bars = [ProgressBar(total=total, completed=row["step"], width=min(room, MOST_BAR))] if room >= LEAST_BAR else []
    line.add_row(Text(text, no_wrap=True, overflow="crop"), *bars)
    return line
