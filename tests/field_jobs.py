"""Jobs as scripts of the field have them: what a loop keeps beside model and optimizer, odd layers, batches and
optimizers. Each trains as one plain process does, or is refused by name; see tests/field_grid.py."""

from __future__ import annotations

import copy
import math
import random
import tempfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import IterableDataset

from tests.tiny_jobs import CLASSES, FEATURES, Plain, Samples


class Quiet(Samples):
    """Without noise."""

    def __init__(self, count: int, start: int = 0):
        super().__init__(count, start, 0.0)


@dataclass
class Field(Plain):
    """Plain SGD, and samples without noise."""

    lr: float = field(default=0.05, metadata={"help": "learning rate"})

    def __post_init__(self):
        """For those derived from it."""

    def train_data(self):
        return Quiet(self.samples)

    def eval_data(self):
        return {"near": Quiet(20, 1000)}

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9)


class Averaged(Field):
    """torch's AveragedModel of the weights, by which it evaluates."""

    def model(self):
        model = super().model()
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        return model

    def after_step(self, model, step):
        self.average.update_parameters(model)

    def evaluate(self, model, batch):
        return super().loss(self.average, batch)

    def extra_state(self):
        return {"average": dict(self.average.state_dict())}

    def load_extra_state(self, values):
        self.average.load_state_dict(values["average"])


class Target(Field):
    """A target network that is copied every second step (DQN), kept by name."""

    def optimizer(self, model):
        self.target = {n: p.detach().clone() for n, p in model.named_parameters()}
        return super().optimizer(model)

    def after_step(self, model, step):
        if step % 2 == 0:
            with torch.no_grad():
                for n, p in model.named_parameters():
                    self.target[n].copy_(p)

    def extra_state(self):
        return dict(self.target)


class Scaled(Field):
    """A GradScaler of which `scale()` is in the loss, as a loop has it, and `update()` after the step."""

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler("cpu")

    def loss(self, model, batch):
        total, weight, metrics = super().loss(model, batch)
        return self.scaler.scale(total), weight, metrics

    def after_step(self, model, step):
        self.scaler.update()


class Unscaled(Scaled):
    """One that is switched off, as without a GPU."""

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 1)


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.strength * gradient, None


class Straight(Field):
    """Own autograd functions: signs with a straight-through gradient, and a reversed gradient whose strength grows
    with the step (DANN)."""

    def model(self):
        model = nn.ModuleDict({"body": nn.Linear(FEATURES, 8), "head": nn.Linear(8, CLASSES), "side": nn.Linear(8, 2)})
        return _Calling(model)

    def __post_init__(self):
        self.strength = 0.0

    def after_step(self, model, step):
        self.strength = 2 / (1 + math.exp(-step)) - 1

    def loss(self, model, batch):
        features, labels, ids = batch
        h = Sign.apply(model.parts["body"](features))
        total = functional.cross_entropy(model.parts["head"](h), labels, reduction="sum")
        side = functional.cross_entropy(model.parts["side"](Reversal.apply(h, self.strength)), ids % 2, reduction="sum")
        return total + side, len(labels), {}


class _Calling(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, x):
        return self.parts["head"](Sign.apply(self.parts["body"](x)))


class Annealed(Field):
    """Label smoothing, the depth of a stochastic network and noise of the data that go by the step: plain numbers on
    job, model and data set."""

    def __post_init__(self):
        self.smoothing, self.phase = 0.0, "warm"

    def train_data(self):
        self.data = _Harder(self.samples)
        return self.data

    def model(self):
        return _Deep()

    def after_step(self, model, step):
        self.smoothing = min(0.2, 0.04 * step)
        if step == 3:
            self.phase, model.dropped = "late", 0.5
        self.data.transform.strength = 0.1 * step

    def loss(self, model, batch):
        features, labels, _ = batch
        total = functional.cross_entropy(model(features), labels, reduction="sum", label_smoothing=self.smoothing)
        return total * (2 if self.phase == "late" else 1), len(labels), {}


class _Strength:
    strength = 0.0

    def __init__(self):
        self.strength = 0.0

    def __call__(self, x):
        return x * (1 + self.strength)


class _Harder(Quiet):
    def __init__(self, count):
        super().__init__(count)
        self.transform = _Strength()

    def __getitem__(self, index):
        features, label, i = super().__getitem__(index)
        return self.transform(features), label, i


class _Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head, self.dropped = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES), 0.0
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        h = self.stem(x)
        for layer in self.layers:
            keep = 1.0 if not self.training else float(torch.rand(()) >= self.dropped)
            h = h + keep * layer(h).tanh()
        return self.head(h)


class Queue(Field):
    """Keys of earlier batches in a queue with a pointer (MoCo)."""

    def model(self):
        model = super().model()
        model[0].register_buffer("queue", torch.zeros(60, CLASSES))
        model[0].register_buffer("pointer", torch.zeros(1, dtype=torch.long))
        return model

    def logits(self, model, features, ids):
        out, own = model(features), model[0]
        if model.training:
            at = int(own.pointer)
            with torch.no_grad():
                own.queue[at : at + len(out)] = out.detach()
                own.pointer[0] = (at + len(out)) % 60
        return out - 0.1 * own.queue.mean(0)


class Listed(Field):
    """The same in a deque on the job."""

    def __post_init__(self):
        self.queue = deque(maxlen=4)

    def logits(self, model, features, ids):
        out = model(features)
        negative = torch.stack(list(self.queue)).mean(0) if self.queue else 0
        if model.training:
            self.queue.append(out.detach().mean(0))
        return out - 0.1 * negative


class Bank(Field):
    """A memory bank with a row for each sample, in a buffer."""

    def model(self):
        model = super().model()
        model[0].register_buffer("bank", torch.zeros(self.samples, CLASSES))
        return model

    def logits(self, model, features, ids):
        out, bank = model(features), model[0].bank
        if model.training:
            with torch.no_grad():
                bank[ids] = 0.5 * bank[ids] + 0.5 * out
        return out - 0.1 * bank.mean(0)


class Normaliser(Field):
    """A running mean of what it was given, by counts (as of rewards)."""

    def model(self):
        model = super().model()
        model[0].register_buffer("count", torch.tensor(1e-4))
        model[0].register_buffer("mean", torch.zeros(FEATURES))
        return model

    def logits(self, model, features, ids):
        own = model[0]
        if model.training:
            with torch.no_grad():
                total = own.count + len(features)
                own.mean += (features.mean(0) - own.mean) * len(features) / total
                own.count.copy_(total)
        return model(features - own.mean)


class Codebook(Field):
    """Codes that follow what was mapped to them (VQ-VAE), by sums that decay."""

    def model(self):
        return _Codes()


class _Codes(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 4), nn.Linear(4, CLASSES)
        codes = torch.linspace(-1, 1, 20).view(5, 4)
        self.register_buffer("codes", codes.clone())
        self.register_buffer("sizes", torch.ones(5))
        self.register_buffer("sums", codes.clone())

    def forward(self, x):
        h = self.body(x)
        which = (h.detach()[:, None] - self.codes).square().sum(2).argmin(1)
        if self.training:
            with torch.no_grad():
                ones = functional.one_hot(which, 5).float()
                self.sizes.mul_(0.9).add_(ones.sum(0), alpha=0.1)
                self.sums.mul_(0.9).add_(ones.t() @ h, alpha=0.1)
                self.codes.copy_(self.sums / self.sizes[:, None].clamp(min=1e-3))
        found = self.codes[which]
        return self.head(h + (found - h).detach())


class Mined(Field):
    """The hardest half of a batch only (OHEM)."""

    def loss(self, model, batch):
        features, labels, _ = batch
        losses = functional.cross_entropy(model(features), labels, reduction="none")
        most = max(1, len(losses) // 2)
        return losses.topk(most).values.sum(), most, {}


class Contrastive(Field):
    """Every sample against those beside it in the batch (SimCLR)."""

    def loss(self, model, batch):
        features = batch[0]
        one, other = (functional.normalize(model(features + d), dim=1) for d in (0.0, 0.1))
        return functional.cross_entropy(one @ other.t() / 0.5, torch.arange(len(one)), reduction="sum"), len(one), {}


class Nested(Field):
    """Batches of dicts in dicts, with lists and texts."""

    def collate_fn(self, samples):
        features, labels, ids = zip(*samples)
        inputs = {
            "x": torch.stack(features),
            "names": [str(i) for i in ids],
            "more": {"half": (torch.stack(features),)},
        }
        return {"inputs": inputs, "labels": torch.tensor(labels), "none": None, "count": len(ids)}

    def loss(self, model, batch):
        inputs = batch["inputs"]
        out = model(inputs["x"] + inputs["more"]["half"][0])
        total = functional.cross_entropy(out, batch["labels"], reduction="sum")
        return total, batch["count"], {"accuracy": (out.argmax(1) == batch["labels"]).sum()}


class Packed(Field):
    """Sequences of several lengths, packed for an LSTM."""

    def collate_fn(self, samples):
        return pack_sequence([x[: 3 + i % 4].view(-1, 1) for x, _, i in samples], enforce_sorted=False), torch.tensor(
            [label for _, label, _ in samples]
        )

    def model(self):
        return _Recurrent()

    def loss(self, model, batch):
        packed, labels = batch
        out = model(packed)
        total = functional.cross_entropy(out, labels, reduction="sum")
        return total, len(labels), {}


class _Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(1, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, packed):
        self.lstm.flatten_parameters()
        out, lengths = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(out[torch.arange(len(lengths)), lengths - 1])


class Stream(Field):
    """An IterableDataset."""

    def train_data(self):
        class Endless(IterableDataset):
            def __iter__(self):
                return iter([])

        return Endless()


class Cached(Field):
    """Augmented samples that are kept in files."""

    def train_data(self):
        return _Kept(self.samples)


class _Kept(Samples):
    def __init__(self, count):
        super().__init__(count, noise=0.05)
        self.folder = Path(tempfile.mkdtemp(dir=tempfile.gettempdir()))

    def __getitem__(self, index):
        file = self.folder / f"{index}.pt"
        if not file.exists():
            torch.save(super().__getitem__(index), file)
        return torch.load(file)


_CALLS = [0]


class Global(Field):
    """A count of calls in the module, by which its loss is weighed."""

    def loss(self, model, batch):
        if model.training:
            _CALLS[0] += 1
        total, weight, metrics = super().loss(model, batch)
        return total * min(1.0, _CALLS[0] / 50), weight, metrics


_GENERATOR = np.random.default_rng(0)


class OwnNumbers(Field):
    """Noise from a generator of the module's."""

    def loss(self, model, batch):
        features, labels, ids = batch
        noise = torch.from_numpy(_GENERATOR.normal(size=tuple(features.shape)).astype("float32"))
        return super().loss(model, (features + 0.1 * noise, labels, ids))


class Recomputed(Field):
    """Activation checkpointing of its own, with dropout inside."""

    def model(self):
        return _Recomputing()


class _Recomputing(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Linear(FEATURES, 8), nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(checkpoint(self.inner, self.stem(x), use_reentrant=False))


class Compiled(Field):
    """A part that is compiled in model()."""

    def model(self):
        return nn.Sequential(torch.compile(nn.Linear(FEATURES, 8), backend="eager"), nn.Tanh(), nn.Linear(8, CLASSES))


class Closure(Field):
    """An optimizer that calls the loss itself."""

    def optimizer(self, model):
        return torch.optim.LBFGS(model.parameters(), lr=0.1)


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimisation, whose step() needs a closure."""

    def __init__(self, parameters, base, rho=0.05):
        self.base = base(parameters)
        super().__init__(self.base.param_groups, {"rho": rho})

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "Sharpness aware minimization requires closure, but it was not provided"
        self.base.step()


class Sharp(Field):
    """SAM."""

    def optimizer(self, model):
        return Sharpness(list(model.parameters()), lambda p: torch.optim.SGD(p, lr=self.lr))


class Complexes(Field):
    """Complex parameters, in a layer of frequencies."""

    def model(self):
        return _Frequencies()


class _Frequencies(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.ones(FEATURES // 2 + 1, dtype=torch.complex64))
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=FEATURES))


class Bfloat(Field):
    """A model in bfloat16."""

    def model(self):
        return super().model().to(torch.bfloat16)

    def logits(self, model, features, ids):
        return model(features.to(torch.bfloat16))


class Channels(Field):
    """Convolutions in channels_last, and a parameter that is a transposed view."""

    def model(self):
        return _Pictures().to(memory_format=torch.channels_last)


class _Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4)
        self.head = nn.Linear(4 * 2, CLASSES)

    def forward(self, x):
        x = x.view(-1, 1, 2, 3).contiguous(memory_format=torch.channels_last)
        return self.head(self.norm(self.conv(x)).relu().flatten(1))


class Turned(Field):
    """A parameter whose memory is that of its transpose."""

    def model(self):
        model = super().model()
        model[2].weight = nn.Parameter(torch.randn(self.width, self.width).t())
        return model


class Tied(Field):
    """An autoencoder whose decoder is the transposed encoder, and a head tied to it."""

    def model(self):
        return _Tied()

    def loss(self, model, batch):
        features, labels, _ = batch
        _, again, out = model(features)
        total = functional.cross_entropy(out, labels, reduction="sum")
        return total + functional.mse_loss(again, features, reduction="sum"), len(labels), {}


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(FEATURES, 5)
        self.again = nn.Linear(FEATURES, 5, bias=False)
        self.again.weight = self.encoder.weight
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        h = torch.tanh(self.encoder(x))
        return h, functional.linear(h, self.encoder.weight.t()), self.head(self.again(x) + h)


class Clipped(Field):
    """Weights that are clipped after each step (WGAN), and rates that the job makes smaller."""

    def optimizer(self, model):
        self.held = super().optimizer(model)
        return self.held

    def after_step(self, model, step):
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.3, 0.3)
        for group in self.held.param_groups:
            group["lr"] = group["lr"] * 0.9
            group["momentum"] = 0.9 - 0.05 * step


class Backwards(Field):
    """Optimizer steps in backward passes, a parameter at a time."""

    def optimizer(self, model):
        own = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}
        for p in own:
            p.register_post_accumulate_grad_hook(lambda p: own[p].step())
        return super().optimizer(model)


class Accumulating(Field):
    """Gradients that it accumulates itself."""

    def loss(self, model, batch):
        total, weight, metrics = super().loss(model, batch)
        if model.training and total.requires_grad:
            (total / 4).backward(retain_graph=True)
        return total, weight, metrics


class Uncertain(Field):
    """Two tasks, weighed by their learned uncertainty: parameters without dimensions."""

    def model(self):
        return _Uncertain()

    def loss(self, model, batch):
        features, labels, _ = batch
        h = model(features)
        one = functional.cross_entropy(h, labels, reduction="sum")
        other = functional.mse_loss(h[:, 0], features[:, 0], reduction="sum")
        return (
            one * (-model.one).exp() + other * (-model.other).exp() + len(labels) * (model.one + model.other),
            len(labels),
            {},
        )


class _Uncertain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)
        self.one, self.other = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.linear(x)


class Warming(Field):
    """A learning rate that it looks for: multiplied in each step, until the loss grows."""

    def optimizer(self, model):
        self.found, self.best, self.held = [], float("inf"), torch.optim.SGD(model.parameters(), lr=1e-3)
        return self.held

    def after_step(self, model, step):
        self.found.append(self.held.param_groups[0]["lr"])
        for group in self.held.param_groups:
            group["lr"] *= 2


class Mutable(Field):
    """A cache in a default argument, from which samples come a second time."""

    def train_data(self):
        return _Mutable(self.samples)


def _cached(index: int, make: Any, cache: dict[int, Any] = {}) -> Any:  # noqa: B006 - that is the point
    if index not in cache:
        cache[index] = make()
    return cache[index]


class _Mutable(Samples):
    def __getitem__(self, index):
        features, label, i = _cached(index, lambda: Samples.__getitem__(self, index))
        return features + 0, label, i


class Chosen(Field):
    """One of two heads, chosen by Python's random numbers for each pass."""

    def model(self):
        model = super().model()
        model[4].other = nn.Linear(self.width, CLASSES)
        return model

    def logits(self, model, features, ids):
        if random.random() < 0.5 and model.training:
            return model[4].other(model[:4](features))
        return model(features)


class Copied(Field):
    """A copy of the model that its loss follows in steps of its own (self-distillation)."""

    def optimizer(self, model):
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        return super().optimizer(model)

    def loss(self, model, batch):
        total, weight, metrics = super().loss(model, batch)
        with torch.no_grad():
            wanted = self.teacher(batch[0])
        return total + functional.mse_loss(model(batch[0]), wanted, reduction="sum"), weight, metrics

    def after_step(self, model, step):
        with torch.no_grad():
            for mine, its in zip(self.teacher.parameters(), model.parameters()):
                mine.lerp_(its, 0.1)

    def extra_state(self):
        return {"teacher": {n: p.detach() for n, p in self.teacher.named_parameters()}}

    def load_extra_state(self, values):
        for n, p in self.teacher.named_parameters():
            p.data.copy_(values["teacher"][n])
