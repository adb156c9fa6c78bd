"""Jobs with the mistakes that people make in loss(), evaluate() and sample()."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

from tests.tiny_jobs import CLASSES, Plain


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
            "backward": lambda: ((total * 0.1).backward(retain_graph=True), (total, weight, metrics))[1],
            "zero-grad": lambda: (model.zero_grad(), (total, weight, metrics))[1],
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
            "grows": lambda: (total * weight, weight, {}),
            "metric": lambda: (total, weight, {**metrics, "perplexity": mean.exp()}),
            "train-only": lambda: (total, weight, {} if model.training else model.no_such_thing),
        }
        return found[self.how]()


@dataclass
class Crowded(Plain):
    """Batches with the sample `fault_at` have a loss that is not the sum of those of their parts."""

    def loss(self, model, batch):
        total, weight, metrics = super().loss(model, batch)
        return total / (1 + (batch[2] == self.fault_at).any()), weight, metrics


def train(model):
    import torch

    with torch.enable_grad():
        loss = sum(p.square().sum() for p in model.parameters())
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    return loss.detach()


def large_unless_compiled():
    """As attention is that is compiled so that scores are never whole in memory."""
    import torch

    torch.compiler.is_dynamo_compiling()
    if torch._dynamo.eval_frame._stance.stance == "force_eager":
        raise torch.OutOfMemoryError("no memory left")
    return torch.tensor(2.0)


_PASSES = [0]  # of this process


@dataclass
class Carrying(Plain):
    """Its passes leave something to those after them, or to whoever gets their samples the next time."""

    how: str = field(default="counts", metadata={"help": "what"})

    def __post_init__(self):
        self.passes, self.average = 0, []

    def model(self):
        import torch

        model = super().model()
        if self.how in ("follows", "rebinds"):  # a teacher, which is what it follows at first
            model[1].teacher = copy.deepcopy(model[0]).requires_grad_(False)
        if self.how == "begins":
            model[1].register_buffer("begun", torch.tensor(False))
        if self.how in ("queue", "passes"):
            model[1].register_buffer("next", torch.tensor(6))
        if self.how in ("adds", "decays", "averages"):
            model[1].register_buffer("seen", torch.zeros(CLASSES))
        if self.how == "remembers":
            model[1].register_buffer("seen", torch.zeros(self.samples))
        return model

    def train_data(self):
        data = super().train_data()
        return [data[i] for i in range(len(data))] if self.how == "in place" else data

    def collate_fn(self, samples):
        import torch

        if self.how != "in place":
            return super().collate_fn(samples)
        features, labels, ids = zip(*samples)
        return list(features), torch.tensor(labels), torch.tensor(ids)

    def logits(self, model, features, ids):
        import numpy as np
        import torch
        from torch.nn import functional

        if self.how == "in place":
            features = torch.stack([f.mul_(0.5) for f in features])
        if model.training and self.how == "global":
            _PASSES[0] += 1
            return model(features) / _PASSES[0]
        if model.training and self.how == "counts":
            self.passes += 1
            return model(features) / self.passes
        with torch.no_grad():
            if model.training and self.how == "writes":
                model[0].weight.data.mul_(0.9)
            if self.how == "registers" and not hasattr(model[1], "mean"):
                model[1].register_buffer("mean", features.mean(0))
                model[1].register_buffer("table", features.mean(0), persistent=False)  # a cache
            if model.training and self.how in ("queue", "passes"):
                model[1].next.copy_((model[1].next + (len(features) if self.how == "queue" else 1)) % 7)
            if model.training and self.how in ("adds", "decays", "averages"):
                ones = functional.one_hot((features[:, 0] > 0).long(), CLASSES).float()
                model[1].seen.mul_(1.0 if self.how == "adds" else 0.99).add_(
                    ones.mean(0) if self.how == "averages" else ones.sum(0)
                )
            if model.training and self.how == "remembers":  # something of each sample
                model[1].seen[ids] = 0.5 * model[1].seen[ids] + 0.5 * features.mean(1)
            if model.training and self.how == "clamps":
                model[0].weight.clamp_(-0.2, 0.2)
            if model.training and self.how == "begins" and not model[1].begun:  # as ActNorm does
                model[0].bias.copy_(-features.mean() + model[0].bias * 0)
                model[1].begun.fill_(True)
            if model.training and self.how in ("follows", "rebinds"):
                for mine, its in zip(model[1].teacher.parameters(), model[0].parameters()):
                    if self.how == "follows":
                        mine.data.lerp_(its, 0.01)
                    else:
                        mine.data = 0.99 * mine.data + 0.01 * its.data
        if self.how == "entropy":
            return model(features) * float(np.random.default_rng().random())
        if self.how == "harmless":  # a count that nothing goes by, and what is drawn
            self.passes += 1
            return model(features) * (1 + torch.rand(()))
        return model(features)


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
            "trains": lambda: (train(model), weight, metrics),
            "large": lambda: (large_unless_compiled(), weight, metrics),
        }
        return found.get(self.how, lambda: (total, weight, metrics))()

    def sample(self, model, step):
        if self.how == "sample":
            raise ValueError("no text today")
        return {"a": 1} if self.how == "sample-dict" else None
