"""Option fields with their help, and checks of values that fail with one sentence."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

from elastic.errors import ConfigError


def option(default: Any, help: str, *, common: bool = False, result: bool = False, once: bool = False) -> Any:
    """A dataclass field with the metadata that help pages and the config digest read.

    Args:
        once: the option counts for one command only: a run that is resumed without it has the default, not what the
            run had before.
    """
    return field(default=default, metadata={"help": help, "common": common, "result": result, "once": once})


def require(ok: Any, name: str, value: object, fix: str) -> None:
    """Refuse a value that is not `ok`.

    Raises:
        ConfigError: with the option's name, its value and the fix. The other checks raise the same.
    """
    if not ok:
        raise ConfigError(f"{name} is {value!r}; {fix}")


def whole(name: str, value: Any, least: int, most: int = 10**9) -> None:
    """Refuse a value that is no whole number from `least` to `most`."""
    number = isinstance(value, int) and not isinstance(value, bool)
    require(number and value >= least, name, value, f"give a whole number of at least {least}")
    require(value <= most, name, value, f"give at most {most}")


def finite(name: str, value: Any, least: float, *, above: bool = False) -> None:
    """Refuse a value that is no finite number of at least `least`, or with `above`, greater than `least`."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    ok = good and (value > least if above else value >= least)
    require(ok, name, value, f"give a finite number {'above' if above else 'of at least'} {least:g}")


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices."""
    require(value in choices, name, value, f"choose one of {', '.join(choices)}")
