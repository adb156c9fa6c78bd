"""Jobs with the mistakes that people make in loss(), evaluate() and sample()."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.tiny_jobs import Plain


@dataclass
class Mistaken(Plain):
    """`how` goes wrong in the microbatch of the sample `fault_at`, or in the whole of step `at_step`."""

    how: str = field(default="", metadata={"help": "the mistake"})
    at_step: int = field(default=0, metadata={"help": "a step (from 1), all of which has it"})

    def __post_init__(self):
        self.step = 1

    def after_step(self, model, step):
        self.step = step + 1

    def loss(self, model, batch):
        import torch

        total, weight, metrics = super().loss(model, batch)
        if not model.training or not ((batch[2] == self.fault_at).any() or self.step == self.at_step):
            return total, weight, metrics
        found = {
            "detached": lambda: (total.detach(), weight, metrics),
            "vector": lambda: (total, weight, {"accuracy": torch.ones(3)}),
            "other-names": lambda: (total, weight, {"precision": 1}),
            "more-names": lambda: (total, weight, {**metrics, "precision": weight}),
            "no-weight": lambda: (total * 0, 0, {"accuracy": 0}),
        }
        return found[self.how]()


@dataclass
class Evaluated(Plain):
    """Goes wrong in evaluate() or sample()."""

    how: str = field(default="", metadata={"help": "the mistake"})

    def evaluate(self, model, batch):
        total, weight, metrics = self.loss(model, batch)
        found = {
            "no-weight": lambda: (total, 0, metrics),
            "loss": lambda: (total, weight, {"loss": total}),
        }
        return found.get(self.how, lambda: (total, weight, metrics))()

    def sample(self, model):
        if self.how == "sample":
            raise ValueError("no text today")
        return {"a": 1} if self.how == "sample-dict" else None
