"""Small jobs whose updates take turns; see tests/test_phases.py."""

from __future__ import annotations

from dataclasses import dataclass, field

import elastic
from tests.tiny_jobs import CLASSES, FEATURES, Samples


@dataclass
class Turns(elastic.Job):
    """Two steps of a critic, each with a batch of its own, then one of an actor, with dropout, norms and an EMA.

    The actor's loss goes through the critic, and both use a norm of the actor's.
    """

    lr: float = field(default=0.01, metadata={"help": "learning rate"})
    phases = ("critic", "critic", "actor")

    def model(self):
        from torch import nn

        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.actor = nn.Sequential(
                    nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, CLASSES)
                )
                self.critic = nn.Sequential(nn.Linear(CLASSES, 16), nn.Tanh(), nn.Linear(16, CLASSES))

            def forward(self, features):
                return self.critic(self.actor(features))

        return Both()

    def optimizer(self, model):
        import torch

        self.ema = model.actor[0].weight.detach().clone()
        return {
            "actor": torch.optim.AdamW(model.actor.parameters(), lr=self.lr),
            "critic": torch.optim.SGD(model.critic.parameters(), lr=10 * self.lr, momentum=0.9),
        }

    def train_data(self):
        return Samples(100)

    def eval_data(self):
        return Samples(40, 1000)

    def loss_critic(self, model, batch):
        from torch.nn import functional

        features, labels, _ = batch
        logits = model(features)
        return functional.cross_entropy(logits, labels, reduction="sum"), len(labels), {"sure": logits.amax(1).sum()}

    def loss_actor(self, model, batch):
        from torch.nn import functional

        features, labels, _ = batch
        logits = model(features)
        right = (logits.argmax(1) == labels).sum()
        return functional.cross_entropy(logits, labels, reduction="sum"), len(labels), {"accuracy": right}

    def evaluate(self, model, batch):
        return self.loss_actor(model, batch)

    def after_step(self, model, step):
        self.ema.lerp_(model.actor[0].weight.detach(), 0.25)

    def extra_state(self):
        return {"ema": self.ema}


class Streamed(Turns):
    """Its samples are a stream."""

    def train_data(self):
        return elastic.Lanes(opened)


def opened(lane: int, lanes: int):
    """The samples of one lane, which are computed."""
    data = Samples(100)
    return (data[(lane + i * lanes) % 100] for i in range(1000))
