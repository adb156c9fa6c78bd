"""Amounts of training with a unit: "10ep", "500st", "2000000tok", "30min", "2h"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from elastic.errors import ConfigError
from elastic.phases import NO_PHASES, Cycle

PROGRESS_UNITS = ("ep", "st", "tok")
CLOCK_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
ENDLESS = 1 << 62  # samples of data that have no end
MOST = 10**15  # of epochs, steps and tokens: more must be a mistake, and floats do not count so far
MOST_S = 10 * 365 * 24 * 3600.0  # ten years
_PATTERN = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([a-z]+)\s*$")


@dataclass(frozen=True)
class Amount:
    """An amount of progress (epochs, steps, tokens) or of wall-clock time."""

    value: float
    unit: str

    @property
    def is_clock(self) -> bool:
        return self.unit in CLOCK_UNITS

    @property
    def seconds(self) -> float:
        """Seconds of a wall-clock amount."""
        return self.value * CLOCK_UNITS[self.unit]

    def steps(
        self, name: str, global_size: int, dataset_size: int, tokens_per_sample: int | None, cycle: Cycle = NO_PHASES
    ) -> int:
        """Steps of an amount of progress, rounded up so that they cover it.

        Args:
            name: the option with that amount, for errors.
            cycle: of phases, each of which goes through all data.

        Raises:
            ConfigError: the amount is in tokens, and the job does not set how many a sample has.
        """
        if self.unit == "st":
            return max(1, _ceil(self.value))
        if self.unit == "ep" and dataset_size >= ENDLESS:
            raise ConfigError(
                f"{name} is '{self}', but train_data() is a stream, which has no epochs; give steps (st) or tokens "
                "(tok)"
            )
        if self.unit == "ep":
            return cycle.steps(max(1, _ceil(self.value * dataset_size / global_size)))
        if tokens_per_sample is None:
            raise ConfigError(
                f"{name} is '{self}', which counts tokens, but the job does not set tokens_per_sample; "
                "set it, or give steps (st) or epochs (ep)"
            )
        return cycle.steps(max(1, _ceil(self.value / (global_size * tokens_per_sample))))

    def __str__(self) -> str:
        return f"{self.value:g}{self.unit}" if self.value < 1e15 else f"{self.value}{self.unit}"


def _ceil(x: float) -> int:
    return -int(-x // 1)


def parse_amount(name: str, text: str, *, clock: bool) -> Amount:
    """Parse `text` as an amount; `name` is the option with that text.

    Args:
        clock: whether wall-clock units are allowed besides ep, st and tok.

    Raises:
        ConfigError: the text has no number above zero that is finite, or a unit that is not allowed.
    """
    allowed = (*PROGRESS_UNITS, *CLOCK_UNITS) if clock else PROGRESS_UNITS
    match = _PATTERN.match(text)
    if not match or match[2] not in allowed:
        raise ConfigError(f"{name} is {text!r}; give a number and a unit of {', '.join(allowed)}, for example 500st")
    value = float(match[1].replace("_", ""))
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} is {text!r}; give a finite amount above 0")
    if match[2] == "st" and value != int(value):
        raise ConfigError(f"{name} is {text!r}; a number of steps is whole")
    amount = Amount(value, match[2])
    if amount.is_clock and amount.seconds > MOST_S:
        raise ConfigError(f"{name} is {text!r}; give at most {MOST_S / 3600:g}h")
    if value > MOST:
        raise ConfigError(f"{name} is {text!r}; give at most {MOST:g}{match[2]}")
    return amount
