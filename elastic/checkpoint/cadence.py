"""How often to save, if the run is to find out: the interval that loses least to saving and to faults."""

from __future__ import annotations

import math
from collections.abc import Sequence

FIRST_COST_S = 1.0  # of a save, before any was seen
PRIOR_S = 4 * 3600.0  # as if so much time had passed with one fault, before the run began
SHORTEST_S, LONGEST_S = 10.0, 3600.0
SLOWED = 0.02  # share of an upload's time that training is slower by


def young_daly(cost_s: float, between_faults_s: float) -> float:
    """The best interval between saves, to first order: sqrt(2 C M) (Young 1974; Daly 2006)."""
    return math.sqrt(2 * cost_s * between_faults_s)


def save_cost(stall_s: float, upload_s: float) -> float:
    """What a save costs the training, in seconds."""
    return stall_s + SLOWED * upload_s


def save_interval(every_s: float | None, costs_s: Sequence[float], elapsed_s: float, faults: int) -> float:
    """Seconds from one save to the next.

    Args:
        every_s: what was asked for; 0 for the best interval, None where the clock does not say (infinity).
        costs_s, elapsed_s, faults: as for `auto_interval`.
    """
    if every_s is None:
        return math.inf
    return every_s or auto_interval(costs_s, elapsed_s, faults)


def auto_interval(costs_s: Sequence[float], elapsed_s: float, faults: int) -> float:
    """Seconds between saves, from the costs of the saves and the number of faults so far.

    The median of the last costs counts, so that one slow save does not. A save is never due more often than every
    20 times its cost: saving takes at most 5 % of the time, whatever the faults.
    """
    recent = sorted(costs_s[-9:])
    cost = recent[len(recent) // 2] if recent else FIRST_COST_S
    between = (elapsed_s + PRIOR_S) / (faults + 1)
    return max(SHORTEST_S, 20 * cost, min(LONGEST_S, young_daly(cost, between)))
