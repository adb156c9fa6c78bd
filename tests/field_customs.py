"""Still more jobs as scripts of the field have them: teachers, averages and counts beside what is trained, and parts of
torch that few loops use. Each trains as one plain process does, or is refused by name; see tests/field_grid.py."""

from __future__ import annotations

import copy
import random
import re

import numpy as np
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver
from torch.nn import functional

from tests.field_jobs import Field, Quiet
from tests.tiny_jobs import CLASSES, FEATURES


class PerSample(Field):
    """Every sample is weighed by the norm of its own gradient (torch.func.vmap)."""

    def loss(self, model, batch):
        features, labels, _ = batch
        held = {n: p.detach() for n, p in model.named_parameters()}

        def one(parameters, x, y):
            out = torch.func.functional_call(model, parameters, (x[None],))
            return functional.cross_entropy(out, y[None])

        with torch.enable_grad():
            found = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(held, features, labels)
        norms = sum(g.flatten(1).square().sum(1) for g in found.values()).sqrt()
        losses = functional.cross_entropy(model(features), labels, reduction="none")
        return (losses / (1 + norms)).sum(), len(labels), {"norms": norms.sum()}


class Momentum(Field):
    """A teacher that is a copy, made in the model's `__init__`, and follows in after_step() (BYOL)."""

    def model(self):
        return _Twins()

    def loss(self, model, batch):
        features, labels, _ = batch
        out = model(features)
        with torch.no_grad():
            wanted = model.teacher(features)
        total = functional.cross_entropy(out, labels, reduction="sum")
        return total + functional.mse_loss(out, wanted, reduction="sum"), len(labels), {}

    def after_step(self, model, step):
        with torch.no_grad():
            for mine, its in zip(model.teacher.parameters(), model.student.parameters()):
                mine.lerp_(its, 0.2)


class _Twins(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x):
        return self.student(x)


class HandScaled(Field):
    """A loss that is scaled by hand, and gradients that a hook of the optimizer divides again."""

    def optimizer(self, model):
        optimizer = super().optimizer(model)

        def unscale(optimizer, *_):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.div_(1024)

        optimizer.register_step_pre_hook(unscale)
        return optimizer

    def loss(self, model, batch):
        total, weight, metrics = super().loss(model, batch)
        return total * 1024, weight, metrics


class Crossed(Field):
    """A decoder whose blocks take the encoder's output twice each, share a normalisation by assignment, and hand on
    what they do not use."""

    def __post_init__(self):
        self.blocks = ("_Crossing",)

    def model(self):
        return _Decoding()

    def optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


class _Crossing(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x, memory, unused):
        return x + self.query(x).sigmoid() * self.value(memory) + self.key(memory).tanh(), memory, unused


class _Decoding(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.encoder, self.unused = nn.Linear(FEATURES, width), nn.Linear(FEATURES, width)
        self.layers = nn.ModuleList(_Crossing(width) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.norms[1].weight = self.norms[0].weight
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        memory, unused = torch.tanh(self.norms[0](self.encoder(x))), self.unused(x)
        h = memory * 0.5
        for layer in (*self.layers, self.layers[0]):
            h, memory, unused = layer(h, memory, unused)
        return self.head(self.norms[1](h) + memory)


class Watched(torch.autograd.Function):
    """An identity that keeps a running mean of the gradients that come through it."""

    @staticmethod
    def forward(ctx, x, mean):
        ctx.mean = mean
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.mean.lerp_(gradient.mean(0), 0.1)
        return gradient - 0.5 * ctx.mean, None


class BackwardStatistics(Field):
    """A buffer that moves in backward passes, by which gradients are centered."""

    def model(self):
        return _Centering()


class _Centering(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        return self.head(Watched.apply(torch.tanh(self.body(x)), self.mean))


class HookStatistics(Field):
    """Gradients of a layer's output are collected in a buffer by a hook of modules, for the next step's scale."""

    def model(self):
        model = super().model()
        model[2].register_buffer("size", torch.ones(()))

        def keep(module, inputs, outputs):
            module.size.mul_(0.9).add_(0.1 * outputs[0].abs().mean())

        model[2].register_full_backward_hook(keep)
        return model

    def logits(self, model, features, ids):
        return model(features) * (1 + model[2].size)


class Normalised(Field):
    """Gradients of activations are divided by their norm over the batch, in a hook."""

    def model(self):
        return _Dividing()


class _Dividing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        if h.requires_grad:
            h.register_hook(lambda g: g / (g.norm() + 1e-6))
        return self.head(h)


class Carried(Field):
    """The hidden state of a GRU goes from batch to batch."""

    def __post_init__(self):
        self.hidden = None

    def model(self):
        return nn.ModuleDict({"cell": nn.GRUCell(FEATURES, 8), "head": nn.Linear(8, CLASSES)})

    def loss(self, model, batch):
        features, labels, _ = batch
        hidden = torch.zeros(len(features), 8) if self.hidden is None else self.hidden[: len(features)]
        hidden = model["cell"](features, hidden)
        if model.training:
            self.hidden = hidden.detach()
        return functional.cross_entropy(model["head"](hidden), labels, reduction="sum"), len(labels), {}


class ByEpoch(Field):
    """A curriculum by the epoch of the data set, which changes late (set_epoch)."""

    def train_data(self):
        self.data = _Epochs(self.samples)
        return self.data

    def after_step(self, model, step):
        if step % 3 == 0:
            self.data.set_epoch(step // 3)


class _Epochs(Quiet):
    def __init__(self, count):
        super().__init__(count)
        self.epoch, self._strength = 0, [0.0]

    def set_epoch(self, epoch):
        self.epoch, self._strength[0] = epoch, 0.5 * epoch

    def __getitem__(self, index):
        features, label, i = super().__getitem__(index)
        return features * (1 + self._strength[0]) + self.epoch, label, i


class Smoothed(Field):
    """A loss with a state of its own, which its forward pass moves (online label smoothing)."""

    def __post_init__(self):
        self.criterion = _Online()

    def loss(self, model, batch):
        features, labels, _ = batch
        return self.criterion(model(features), labels, model.training), len(labels), {}


class _Online(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("soft", torch.full((CLASSES, CLASSES), 1 / CLASSES))

    def forward(self, out, labels, training):
        found = functional.cross_entropy(out, labels, reduction="sum")
        found = found - 0.1 * (self.soft[labels] * out.log_softmax(1)).sum()
        if training:
            with torch.no_grad():
                self.soft.mul_(0.9).add_(0.1 * functional.one_hot(labels, CLASSES).float().t() @ out.softmax(1))
        return found


class Weighed(Field):
    """Weights averaged from the third step on, in plain tensors, and evaluations by them (SWA)."""

    def optimizer(self, model):
        self.mean, self.count = {n: p.detach().clone() for n, p in model.named_parameters()}, 0
        return super().optimizer(model)

    def after_step(self, model, step):
        if step >= 3:
            self.count += 1
            with torch.no_grad():
                for n, p in model.named_parameters():
                    self.mean[n].add_((p - self.mean[n]) / self.count)

    def extra_state(self):
        return {"count": self.count, **self.mean}

    def load_extra_state(self, values):
        self.count = values["count"]


class Lookahead(torch.optim.SGD):
    """Every second step goes back half of the way to slow weights, which are state of the parameters."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("slow", p.detach().clone())
        super().step(closure)
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            if group["count"] % 2 == 0:
                for p in group["params"]:
                    slow = self.state[p]["slow"]
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)


class LooksAhead(Field):
    """Lookahead, as an optimizer of one class."""

    def optimizer(self, model):
        return Lookahead(model.parameters(), lr=self.lr, momentum=0.9)


class LooksFurther(Field):
    """Lookahead around another optimizer, with slow weights in a list of its own."""

    def optimizer(self, model):
        self.slow = [p.detach().clone() for p in model.parameters()]
        return super().optimizer(model)

    def after_step(self, model, step):
        if step % 2 == 0:
            with torch.no_grad():
                for slow, p in zip(self.slow, model.parameters()):
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)


class Noisy(torch.optim.SGD):
    """SGD with gradient noise."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(0.01 * torch.randn_like(p.grad))
        return super().step(closure)


class GradientNoise(Field):
    """Noise on gradients, drawn in step()."""

    def optimizer(self, model):
        return Noisy(model.parameters(), lr=self.lr)


class Mixed(Field):
    """Mixup by numpy's random numbers, of the samples in a batch."""

    def loss(self, model, batch):
        features, labels, _ = batch
        if not model.training:
            return super().loss(model, batch)
        share, order = float(np.random.beta(0.4, 0.4)), torch.from_numpy(np.random.permutation(len(labels)))
        out = model(share * features + (1 - share) * features[order])
        one, other = (functional.cross_entropy(out, y, reduction="sum") for y in (labels, labels[order]))
        return share * one + (1 - share) * other, len(labels), {}


class Collating(Field):
    """collate_fn() leaves out features by Python's random numbers."""

    def collate_fn(self, samples):
        features, labels, ids = zip(*samples)
        kept = torch.stack([x * (random.random() < 0.8) for x in features])
        return kept, torch.tensor(labels), torch.tensor(ids)


class Decayed(Field):
    """Groups by regular expressions over names, one of which has no parameter."""

    def optimizer(self, model):
        groups = {"bias": [], "embedding": [], "": []}
        for name, p in model.named_parameters():
            groups[next(kind for kind in groups if re.search(kind, name))].append(p)
        decay = {"bias": 0.0, "embedding": 0.0, "": 0.1}
        return torch.optim.AdamW([{"params": p, "weight_decay": decay[kind]} for kind, p in groups.items()], lr=0.01)


class Quantised(Field):
    """Quantisation-aware training: observers whose ranges move in forward passes."""

    def model(self):
        model = super().model()
        symmetric = {"qscheme": torch.per_tensor_symmetric, "dtype": torch.qint32}
        model.insert(
            2, FakeQuantize(MovingAverageMinMaxObserver, quant_min=-(1 << 15), quant_max=(1 << 15) - 1, **symmetric)
        )
        return model


class Activated(Field):
    """A layer whose parameters the first batch initialises (ActNorm)."""

    def model(self):
        model = super().model()
        model.insert(1, _ActNorm(self.width))
        return model


class _ActNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.ones(width))
        self.register_buffer("ready", torch.tensor(False))

    def forward(self, x):
        if self.training and not self.ready:
            with torch.no_grad():
                self.shift.copy_(-x.mean(0))
                self.scale.copy_(1 / (x.std(0) + 1e-6))
                self.ready.fill_(True)
        return (x + self.shift) * self.scale


class Frozen(Field):
    """A hook before forward passes that clamps weights of a layer."""

    def model(self):
        model = super().model()

        def clamp(module, inputs):
            with torch.no_grad():
                module.weight.clamp_(-0.2, 0.2)

        model[2].register_forward_pre_hook(clamp)
        return model


class HookedBlocks(Field):
    """Hooks behind forward passes of blocks shrink a weight of theirs, through `.data`."""

    def __post_init__(self):
        self.blocks = ("_Shrinking",)

    def model(self):
        model = nn.Sequential(nn.Linear(FEATURES, 8), _Shrinking(8), _Shrinking(8), nn.Linear(8, CLASSES))

        def shrink(module, inputs, output):
            module.linear.weight.data.mul_(0.99)

        for block in model[1:3]:
            block.register_forward_hook(shrink)
        return model


class _Shrinking(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(x).tanh()


class LateWrites(Field):
    """From the fourth step on, passes write to a parameter through `.data`."""

    def __post_init__(self):
        self.steps = 0

    def after_step(self, model, step):
        self.steps = step

    def loss(self, model, batch):
        if model.training and self.steps >= 3:
            model[0].weight.data.mul_(0.99)
        return super().loss(model, batch)


class Counted(Field):
    """A float buffer that counts samples, for a schedule inside of the model."""

    def model(self):
        return _Counting()


class _Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.seen += len(x)
        return self.head(self.body(x).tanh() * (1 + self.seen / 100))
