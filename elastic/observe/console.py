"""What a person sees: one readable line every few seconds, every event, an ETA."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any, TextIO, cast

from elastic.observe.streams import Sturdy
from elastic.redact import redact

_UNTOLD = ("end", "restored")  # in the ledger; on the console the world's line tells enough


def seconds_text(seconds: float) -> str:
    """1.2s, 3m10s, 2h05m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{s:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m"


def row_text(row: dict[str, Any], total_steps: int, rate: float | None, samples_rate: float | None) -> str:
    """A row as one line. `rate` is steps/s, `samples_rate` samples/s (or tokens/s where rows have tokens)."""
    parts = [f"step {row['step']}/{total_steps}", f"loss {_number(row.get('loss'))}", f"lr {row.get('lr', 0):.3g}"]
    if row.get("grad_norm") is not None:
        parts.append(f"norm {row['grad_norm']:.3g}")
    parts.append(f"workers {row['world_size']}")
    if rate:
        unit = "tok/s" if row.get("tokens") else "samples/s"
        parts += [f"{samples_rate:,.0f} {unit}", f"ETA {seconds_text((total_steps - row['step']) / rate)}"]
    return "  ".join(parts)


def eval_text(row: dict[str, Any]) -> str:
    """An evaluation row as one line."""
    values = [f"{k.removeprefix('eval/')} {_number(v)}" for k, v in row.items() if k.startswith("eval/")]
    return f"step {row['step']}  eval: " + "  ".join(values)


def event_text(event: dict[str, Any]) -> str:
    """An event as one line."""
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
    if event["kind"] == "worker_warm":
        words.append(f"on {event['node'][:12]}, process {event['pid']}")
    elif isinstance(detail, dict):
        words += [f"{k}={v}" for k, v in detail.items() if v is not None]
    elif detail:
        words.append(str(detail).splitlines()[0])
    return " ".join(words)


def result_text(values: dict[str, Any], folder: str) -> str:
    """How a run ended, for a person: figures, hash, sample, and where everything lies."""
    metrics = "  ".join(f"{k.removeprefix('eval/')} {_number(v)}" for k, v in values.get("metrics", {}).items())
    lines = [f"{values['status']} after step {values['steps']}" + (f"; held-out: {metrics}" if metrics else "")]
    if values.get("sample"):
        lines += ["sample:", *(f"  | {line}" for line in str(values["sample"]).splitlines())]
    if values.get("weights_sha256"):
        lines.append(f"weights sha256 {values['weights_sha256']}")
    lines.append(f"results in {redact(folder)}")
    return "\n".join(lines)


def _number(value: Any) -> str:
    return "nan" if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"


class Console:
    """Prints records of a run; on a terminal the newest line stays at the bottom and is redrawn.

    Output that breaks turns it off, and nothing else.

    Args:
        every_s: least time between two progress lines.
    """

    def __init__(self, total_steps: int, every_s: float, out: TextIO | None = None):
        self._total, self._every_s = total_steps, every_s
        out = out or sys.stdout
        self._out = out if isinstance(out, Sturdy) else Sturdy(out)
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=50)
        self._last_line = 0.0
        self._live: Any = None
        if self._out.isatty():
            from rich.console import Console as RichConsole
            from rich.live import Live

            self._live = Live(console=RichConsole(file=cast(TextIO, self._out)), refresh_per_second=4, transient=True)
            self._live.start()

    def say(self, text: str) -> None:
        """Print a line, but for the secrets in it."""
        text = redact(text)
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=self._out, flush=True)

    def record(self, record: dict[str, Any]) -> None:
        """Show a row or an event as it arrives."""
        if "kind" in record:
            if record["kind"] not in _UNTOLD:
                self.say(f"[{time.strftime('%H:%M:%S', time.localtime(record['time']))}] {event_text(record)}")
        elif "loss" in record:
            self._progress(record)
        else:
            self.say(eval_text(record))

    def _progress(self, row: dict[str, Any]) -> None:
        amount = row.get("tokens") or row.get("samples") or 0
        self._recent.append((row["time"], row["step"], amount))
        first, last = self._recent[0], self._recent[-1]
        elapsed = last[0] - first[0]
        rate = (last[1] - first[1]) / elapsed if elapsed > 0 else None
        amount_rate = (last[2] - first[2]) / elapsed if elapsed > 0 else None
        text = row_text(row, self._total, rate, amount_rate)
        if self._live is not None:
            self._live.update(_bar(row["step"], self._total, text))
            return
        now = time.monotonic()
        if now - self._last_line >= self._every_s or row["step"] == self._total:
            self._last_line = now
            self.say(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _bar(step: int, total: int, text: str) -> Any:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    return Group(ProgressBar(total=total, completed=step), Text(text))
