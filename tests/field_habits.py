"""More jobs as scripts of the field have them: what a loop does with its optimizer, its model and itself. Each trains
as one plain process does, or is refused by name; see tests/field_grid.py."""

from __future__ import annotations

import copy
import functools
from collections import Counter

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, prune

from tests.field_jobs import Field
from tests.tiny_jobs import CLASSES, FEATURES


class Uncertainty(Field):
    """Weights of two losses that are learned, and are parameters of the job, not of its model."""

    def optimizer(self, model):
        self.weights = nn.Parameter(torch.zeros(2))
        return torch.optim.SGD([*model.parameters(), self.weights], lr=self.lr)

    def loss(self, model, batch):
        total, weight, metrics = super().loss(model, batch)
        return total * (-self.weights[0]).exp() + weight * self.weights.sum(), weight, metrics


class Centers(Field):
    """Centers of classes (center loss) with an optimizer of their own, which after_step() steps."""

    def optimizer(self, model):
        self.centers = nn.Parameter(torch.linspace(-1, 1, CLASSES * CLASSES).view(CLASSES, CLASSES))
        self.own = torch.optim.SGD([self.centers], lr=0.5)
        return super().optimizer(model)

    def loss(self, model, batch):
        features, labels, _ = batch
        out = model(features)
        total = functional.cross_entropy(out, labels, reduction="sum")
        return total + 0.01 * (out - self.centers[labels]).square().sum(), len(labels), {}

    def after_step(self, model, step):
        self.own.step()
        self.own.zero_grad()

    def extra_state(self):
        return {"centers": self.centers.detach()}

    def load_extra_state(self, values):
        self.centers.data.copy_(values["centers"])


class SignsAfter(Field):
    """after_step() reads the gradients that the update used."""

    def after_step(self, model, step):
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-0.003)


class PreClipped(Field):
    """Gradients are clipped by a hook of the optimizer."""

    def optimizer(self, model):
        optimizer = super().optimizer(model)
        optimizer.register_step_pre_hook(lambda o, *_: clip_grad_norm_(list(model.parameters()), 0.2) and None)
        return optimizer


class StepClipped(Field):
    """Gradients are clipped in step()."""

    def optimizer(self, model):
        class Clipping(torch.optim.SGD):
            def step(self, closure=None):
                for group in self.param_groups:
                    clip_grad_norm_(group["params"], 0.2)
                return super().step(closure)

        return Clipping(model.parameters(), lr=self.lr, momentum=0.9)


class Trust(torch.optim.Optimizer):
    """LARS: the rate of a tensor goes by the ratio of norms."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                weight, gradient = p.norm(), p.grad.norm()
                ratio = 0.1 * weight / gradient if weight > 0 and gradient > 0 else 1.0
                p.add_(p.grad * ratio, alpha=-group["lr"])


class Lars(Field):
    """An optimizer of whole tensors."""

    def optimizer(self, model):
        return Trust(model.parameters(), lr=self.lr)


class Penalised(Field):
    """A gradient penalty (WGAN-GP): gradients of inputs, of which gradients are taken."""

    def loss(self, model, batch):
        features, labels, _ = batch
        features = features.clone().requires_grad_()
        with torch.enable_grad():
            total = functional.cross_entropy(model(features), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(total, features, create_graph=True)
        return total + 0.1 * (gradient.norm(dim=1) - 1).square().sum(), len(labels), {}


class Inner(Field):
    """A step of an inner loop (MAML) by functional_call, through which the outer loss goes."""

    def loss(self, model, batch):
        features, labels, _ = batch
        with torch.enable_grad():
            found = dict(model.named_parameters())
            inner = functional.cross_entropy(model(features), labels)
            gradients = torch.autograd.grad(inner, list(found.values()), create_graph=True)
            moved = {n: p - 0.1 * g for (n, p), g in zip(found.items(), gradients)}
            out = torch.func.functional_call(model, moved, (features,))
        return functional.cross_entropy(out, labels, reduction="sum"), len(labels), {}


class InParallel(Field):
    """Wrapped by DataParallel in model()."""

    def model(self):
        return nn.DataParallel(super().model())


class Pseudo(Field):
    """Labels that the model itself gives, in evaluation mode, before it is put back into training mode (FixMatch)."""

    def loss(self, model, batch):
        features, labels, _ = batch
        was = model.training
        model.eval()
        with torch.no_grad():
            guessed = model(features).argmax(1)
        model.train(was)
        out = model(features)
        total = functional.cross_entropy(out, labels, reduction="sum")
        return total + 0.3 * functional.cross_entropy(out, guessed, reduction="sum"), len(labels), {}


class Renormed(Field):
    """An embedding whose rows are made shorter when they are looked up (max_norm)."""

    def model(self):
        return _Words()

    def logits(self, model, features, ids):
        return model((features.abs() * 10).long() % 20)


class _Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(20, 4, max_norm=1.0), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.words(x).mean(1))


class Named(Field):
    """An optimizer that is given names as well."""

    def optimizer(self, model):
        decayed = [(n, p) for n, p in model.named_parameters() if p.dim() > 1]
        others = [(n, p) for n, p in model.named_parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.01)


class Free(torch.optim.Optimizer):
    """Schedule-free SGD: trains at points between the average, which is to be evaluated, and the newest ones."""

    def __init__(self, params, lr=0.05, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "training": True})

    @torch.no_grad()
    def _move(self, training):
        for group in self.param_groups:
            if group["training"] != training:
                for p in (p for p in group["params"] if "z" in self.state[p]):
                    p.lerp_(self.state[p]["z"], 1 - group["beta"] if training else 1 - 1 / group["beta"])
                group["training"] = training

    def eval(self):
        self._move(False)

    def train(self):
        self._move(True)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, 1 / group["k"])
                p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - 1 / group["k"]) - 1))
                z.sub_(p.grad, alpha=group["lr"])


class ScheduleFree(Field):
    """Weights that are moved to their average for each evaluation, and back by copies."""

    def optimizer(self, model):
        self.held = Free(model.parameters(), lr=self.lr)
        return self.held

    def evaluate(self, model, batch):
        kept = [p.detach().clone() for g in self.held.param_groups for p in g["params"]]
        self.held.eval()
        try:
            return super().evaluate(model, batch)
        finally:
            self.held.train()
            with torch.no_grad():
                for p, was in zip((p for g in self.held.param_groups for p in g["params"]), kept):
                    p.copy_(was)


class Drifting(Field):
    """Weights that an evaluation leaves a little other than they were, from the second step on."""

    def __post_init__(self):
        self.steps = 0

    def after_step(self, model, step):
        self.steps = step

    def evaluate(self, model, batch):
        if self.steps:
            model[0].weight.mul_(3.1).div_(3.1)
        return super().evaluate(model, batch)


class Restarted(Field):
    """Moments that begin anew every second step, with other betas."""

    def optimizer(self, model):
        self.held = torch.optim.Adam(model.parameters(), lr=0.01)
        return self.held

    def after_step(self, model, step):
        if step % 2 == 0:
            self.held.state.clear()
            for group in self.held.param_groups:
                group["betas"] = (0.9 - 0.1 * step, group["betas"][1])


class Pruned(Field):
    """Pruned by torch's own masks, more of it later."""

    def model(self):
        model = super().model()
        prune.l1_unstructured(model[0], "weight", amount=0.2)
        return model

    def after_step(self, model, step):
        if step == 3:
            prune.l1_unstructured(model[0], "weight", amount=0.3)


class PrunedOnce(Field):
    """Pruned by torch's own masks in model()."""

    def model(self):
        model = super().model()
        prune.l1_unstructured(model[0], "weight", amount=0.4)
        return model


class Replaced(Field):
    """A parameter for which after_step() puts another one."""

    def after_step(self, model, step):
        if step == 3:
            model[0].weight = nn.Parameter(model[0].weight.detach() * 0.5)


class Remembering(Field):
    """Caches and records that a loop keeps on itself: a cached property, a list of losses, a count of labels."""

    def __post_init__(self):
        self.losses, self.seen = [], Counter()

    @functools.cached_property
    def importance(self):
        return torch.linspace(0.5, 1.5, CLASSES)

    def loss(self, model, batch):
        features, labels, _ = batch
        total = functional.cross_entropy(model(features), labels, weight=self.importance, reduction="sum")
        self.losses.append(float(total.detach()))
        self.seen.update(labels.tolist())
        return total, len(labels), {"seen": float(len(labels))}


class Doubles(Field):
    """Everything in float64 by default, and a seed that the loss sets."""

    def model(self):
        torch.set_default_dtype(torch.float64)
        try:
            return nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(0.2), nn.Linear(8, CLASSES))
        finally:
            torch.set_default_dtype(torch.float32)

    def logits(self, model, features, ids):
        torch.manual_seed(7)
        return model(features.double())


class RollsBack(Field):
    """The weights of an earlier step, to which it goes back where the new ones are worse by some figure."""

    def optimizer(self, model):
        self.best, self.figure = {n: p.detach().clone() for n, p in model.state_dict().items()}, float("inf")
        return super().optimizer(model)

    def after_step(self, model, step):
        figure = float(sum(p.detach().abs().sum() for p in model.parameters())) if step % 2 else 1e9
        if figure < self.figure:
            self.best, self.figure = {n: p.detach().clone() for n, p in model.state_dict().items()}, figure
        elif step % 2 == 0:
            model.load_state_dict(self.best)

    def extra_state(self):
        return {"figure": self.figure, **self.best}

    def load_extra_state(self, values):
        self.figure = values.pop("figure")
        self.best = values


class PlainList(Field):
    """Layers in a plain list, which are no part of the model but are given to the optimizer."""

    def model(self):
        return _Listing()

    def optimizer(self, model):
        parameters = [p for layer in model.layers for p in layer.parameters()]
        return torch.optim.SGD([*model.parameters(), *parameters], lr=self.lr)


class _Listing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(FEATURES, FEATURES) for _ in range(2)]
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


class Cumulative(Field):
    """BatchNorm whose statistics are means over all batches (momentum=None)."""

    def model(self):
        norm = nn.BatchNorm1d(8, momentum=None)
        return nn.Sequential(nn.Linear(FEATURES, 8), norm, nn.ReLU(), nn.Linear(8, CLASSES))


class Looks(Field):
    """after_step() goes by what the weights are."""

    def after_step(self, model, step):
        with torch.no_grad():
            for p in model.parameters():
                if p.abs().max() > 0.3:
                    p.mul_(0.95)
                if p.dim() > 1 and p.norm(dim=1).max() > 0.8:
                    p.div_(p.norm(dim=1, keepdim=True).clamp(min=0.8) / 0.8)


class LateAverage(Field):
    """An average that after_step() makes when it is first needed, and that nobody saves."""

    def after_step(self, model, step):
        if step == 3:
            self.average = copy.deepcopy(model)
        elif step > 3:
            with torch.no_grad():
                for mine, its in zip(self.average.parameters(), model.parameters()):
                    mine.lerp_(its, 0.1)


class Swapped(Field):
    """A name in the state dict that is another one than that of the parameter, by hooks of state dicts."""

    def model(self):
        model = super().model()

        def rename(module, found, prefix, metadata):
            found["body.weight"] = found.pop("0.weight")

        def back(found, prefix, *_):
            found["0.weight"] = found.pop("body.weight")

        model._register_state_dict_hook(rename)
        model._register_load_state_dict_pre_hook(back)
        return model


class Distributes(Field):
    """Wrapped by DistributedDataParallel in model()."""

    def model(self):
        return nn.parallel.DistributedDataParallel(super().model())
