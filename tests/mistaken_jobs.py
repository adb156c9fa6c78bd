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
class Averaged(Plain):
    """Means where sums belong, and weights that count nothing."""

    how: str = field(default="mean", metadata={"help": "what loss() returns"})

    def eval_data(self):
        return None if self.how == "train-only" else super().eval_data()

    def loss(self, model, batch):
        total, weight, metrics = super().loss(model, batch)
        mean = total / weight
        found = {
            "mean": lambda: (mean, weight, metrics),
            "sum-for-1": lambda: (total, 1, {}),
            "mean-for-1": lambda: (mean, 1, {}),
            "metric": lambda: (total, weight, {**metrics, "perplexity": mean.exp()}),
            "train-only": lambda: (total, weight, {} if model.training else model.no_such_thing),
        }
        return found[self.how]()


@dataclass
class Evaluated(Plain):
    """Goes wrong in evaluate() or sample()."""

    how: str = field(default="", metadata={"help": "the mistake"})

    def eval_data(self):
        sets = super().eval_data()
        return {"": sets["near"], "far": sets["far"]} if self.how == "names" else sets

    def evaluate(self, model, batch):
        total, weight, metrics = self.loss(model, batch)
        found = {
            "raises": lambda: model.no_such_method(),
            "no-weight": lambda: (total, 0, metrics),
            "loss": lambda: (total, weight, {"loss": total}),
            "mean": lambda: (total / weight, weight, metrics),
            "names": lambda: (total, weight, {"far/loss": total}),
        }
        return found.get(self.how, lambda: (total, weight, metrics))()

    def sample(self, model):
        if self.how == "sample":
            raise ValueError("no text today")
        return {"a": 1} if self.how == "sample-dict" else None
