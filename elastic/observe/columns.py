"""Columns of numbers out of many records. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_AT_A_TIME = 1000  # records: few enough for the processor's cache, through which all of their columns are read at once


def columns(
    records: Sequence[dict[str, Any]], defaults: Mapping[str, float], number: Callable[[Any], float]
) -> list[array[float]]:
    """Return for each name in `defaults` the values of all records, float64 [records].

    Args:
        defaults: the value of a record that lacks a name.
        number: makes a float of what is no number; anybody may have written the file.
    """
    names, missing = list(defaults), list(defaults.values())
    flat = array("d")
    for first in range(0, len(records), _AT_A_TIME):
        part = records[first : first + _AT_A_TIME]
        flat.extend(floats([value for record in part for value in map(record.get, names, missing)], number))
    return [flat[place :: len(names)] for place in range(len(names))]


def floats(values: list[Any], number: Callable[[Any], float]) -> array[float]:
    """Return the values as float64; `number` is asked only if some are no numbers."""
    try:
        return array("d", values)
    except (TypeError, OverflowError):
        return array("d", map(number, values))
