"""Digits with steps that take as long as the environment says: time enough for replacements, the same bits."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import elastic
from elastic import BatchOptions, OptimOptions, TrainConfig
from jobs.digits import Digits

CONFIG = TrainConfig(batch=BatchOptions(global_size=32, microbatches=8), optim=OptimOptions(clip_norm=1.0))
PAUSE_S = float(os.environ.get("SLOW_JOB_PAUSE_S", "0"))


@dataclass
class Slow(Digits):
    """Digits, slowly."""

    def loss(self, model, batch):
        time.sleep(PAUSE_S)
        return super().loss(model, batch)


if __name__ == "__main__":
    elastic.main(Slow, CONFIG)
