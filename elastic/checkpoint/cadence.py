"""The interval between saves, if the user leaves it to the run: the one that loses the least time to saving and to
faults."""

from __future__ import annotations

import math
from collections.abc import Sequence

FIRST_COST_S = 1.0  # the assumed cost of a save before the first one
PRIOR_S = 4 * 3600.0  # the estimate starts as if so much time with one fault had preceded the run
SHORTEST_S, LONGEST_S = 10.0, 3600.0
SLOWED = 0.02  # an upload slows training down by this share of its duration


def young_daly(cost_s: float, between_faults_s: float) -> float:
    """Return the best interval between saves in seconds, to first order: sqrt(2 C M), with the cost C of a save and the
    mean time M between faults (Young 1974; Daly 2006)."""
    return math.sqrt(2 * cost_s * between_faults_s)


def save_cost(stall_s: float, upload_s: float) -> float:
    """Return the seconds that a save costs the training."""
    return stall_s + SLOWED * upload_s


def save_interval(every_s: float | None, costs_s: Sequence[float], elapsed_s: float, faults: int) -> float:
    """Return the seconds from one save to the next.

    Args:
        every_s: the interval that the user gave; 0 for the best interval, None if saves do not go by the clock (then
            the result is infinity).
        costs_s, elapsed_s, faults: as for `auto_interval`.
    """
    if every_s is None:
        return math.inf
    return every_s or auto_interval(costs_s, elapsed_s, faults)


def auto_interval(costs_s: Sequence[float], elapsed_s: float, faults: int) -> float:
    """Return the seconds between saves, from the costs of the saves and the number of faults so far.

    The cost is the median of the last nine, so that one slow save does not matter. The interval is at least 20 times
    the cost, so that saving takes at most 5 % of the time, however many faults there are.
    """
    recent = sorted(costs_s[-9:])
    cost = recent[len(recent) // 2] if recent else FIRST_COST_S
    between = (elapsed_s + PRIOR_S) / (faults + 1)
    return max(SHORTEST_S, 20 * cost, min(LONGEST_S, young_daly(cost, between)))
