"""The net of digits with steps that take as long as the environment says: time enough for replacements, the same bits.

Its images are noise: each worker would import scikit-learn for real ones, which takes longer than all else it does.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

import elastic
from elastic import BatchOptions, OptimOptions, TrainConfig
from jobs.digits import Digits, Images

CONFIG = TrainConfig(batch=BatchOptions(global_size=32, microbatches=8), optim=OptimOptions(clip_norm=1.0))


@dataclass
class Slow(Digits):
    """Learns noise, slowly."""

    def train_data(self):
        if sick := os.environ.get("SLOW_JOB_SICK_NODE"):
            import ray

            if ray.get_runtime_context().get_node_id() == sick:
                raise OSError("/data is not mounted on this node")
        return Noise(1437)

    def eval_data(self):
        return Noise(360)

    def tensor_plan(self):
        return {"9": "colwise_gather_output"}

    def stages(self, model):
        return [*model]

    def loss(self, model, batch):
        time.sleep(float(os.environ.get("SLOW_JOB_PAUSE_S", "0")))
        return super().loss(model, batch)


class Noise(Images):
    """Random images and labels, always the same."""

    def __init__(self, count: int):
        generator = torch.Generator().manual_seed(count)
        self.images = torch.rand(count, 1, 8, 8, generator=generator)
        self.labels = torch.randint(10, (count,), generator=generator)


if __name__ == "__main__":
    elastic.main(Slow, CONFIG)
