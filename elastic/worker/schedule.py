"""Learning-rate factors as pure functions of the step."""

from __future__ import annotations

import math


def factor(step: int, total_steps: int, *, schedule: str, warmup_steps: int, final: float) -> float:
    """Return the factor on the learning rate at `step` (from 0): a linear warm-up, then constant, or a half cosine down
    to `final` at the last step."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    share = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
