"""Small jobs on data made of integers. `Everything` has all that could make a bit depend on the world size."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import elastic
from elastic import BatchOptions, CheckpointOptions, OptimOptions, RunOptions, ScalingOptions, TrainConfig

FEATURES, CLASSES = 6, 3

CONFIG = TrainConfig(
    run=RunOptions(duration="12st"),
    batch=BatchOptions(global_size=30, microbatches=10),
    optim=OptimOptions(schedule="cosine", warmup="3st", clip_norm=0.5),
    checkpoint=CheckpointOptions(when_busy="wait"),  # steps take milliseconds: checkpoints are at the steps asked for
    scaling=ScalingOptions(max_workers=4, accelerator="cpu"),
)


class Samples:
    """Samples `start` to `start + count - 1`: features, class and number. The noise is drawn when one is fetched."""

    def __init__(self, count: int, start: int = 0, noise: float = 0.05):
        self.count, self.start, self.noise = count, start, noise

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        import torch

        if not 0 <= index < self.count:
            raise IndexError(index)
        i = index + self.start
        features = torch.tensor([((i * 7919 + k * 104_729) % 997) / 498.5 - 1 for k in range(FEATURES)])
        label = int(features[0] > 0) + int(features[1] + features[2] > 0)
        return features + self.noise * torch.randn(FEATURES), label, i


def _raise(text: str) -> None:
    raise RuntimeError(text or "this sample is broken")


def _die_once(file: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(file)
        os.kill(os.getpid(), signal.SIGKILL)


def _die_if_named(file: str) -> None:
    """Wait for the file and die if it holds the number of this process."""
    while not os.path.exists(file):
        time.sleep(0.01)
    if int(Path(file).read_text()) == os.getpid():
        os.kill(os.getpid(), signal.SIGKILL)


def _hold(file: str) -> None:
    while os.path.exists(file):
        time.sleep(0.01)


def _run_out(kind: str) -> None:
    import torch

    if kind == "host":
        torch.empty(1 << 60)
    raise {"device": torch.OutOfMemoryError, "python": MemoryError}[kind]("no memory left")


FAULTS = {"raise": _raise, "die": _die_once, "hold": _hold, "out-of-memory": _run_out}


@dataclass
class Plain(elastic.Job):
    """A small network, the same in every mode."""

    lr: float = field(default=0.01, metadata={"help": "learning rate"})
    samples: int = field(default=100, metadata={"help": "training samples"})
    width: int = field(default=16, metadata={"help": "hidden units"})
    fault: str = field(default="", metadata={"help": "raise, nan-loss, nan-gradient, die, hold or die-after-step"})
    fault_at: int = field(default=-1, metadata={"help": "sample at which loss() does that, or the step"})
    fault_file: str = field(default="", metadata={"help": "die once and remove this file; hold while it is there"})

    def model(self):
        from torch import nn

        w = self.width
        return nn.Sequential(nn.Linear(FEATURES, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, CLASSES))

    def optimizer(self, model):
        import torch

        return torch.optim.AdamW(model.parameters(), lr=self.lr)

    def train_data(self):
        return Samples(self.samples)

    def eval_data(self):
        return {"near": Samples(40, 1000, noise=0.5), "far": Samples(7, 5000)}

    def after_step(self, model, step):
        if self.fault == "die-after-step" and step == self.fault_at:
            _die_if_named(self.fault_file)

    def logits(self, model, features, ids):
        return model(features)

    def loss(self, model, batch):
        from torch.nn import functional

        features, labels, ids = batch
        fault = self.fault if model.training and (ids == self.fault_at).any() else ""
        if fault in FAULTS:
            FAULTS[fault](self.fault_file)
        logits = self.logits(model, features, ids).float()
        total = functional.cross_entropy(logits, labels, reduction="sum")
        if fault == "nan-loss":
            total = total * float("nan")
        elif fault == "nan-gradient":  # the root of 0 is 0, but its slope is infinite, and infinity times 0 is NaN
            total = total + (logits * 0).sum().sqrt()
        return total, len(labels), {"accuracy": (logits.argmax(1) == labels).sum()}


@dataclass
class Everything(Plain):
    """Dropout, BatchNorm, buffers, tied, frozen, unused and sometimes used parameters, two groups, an EMA."""

    rule: str = field(default="adamw", metadata={"help": "adamw or sgd"})

    def model(self):
        import torch
        from torch import nn

        class Network(nn.Module):
            def __init__(self, w: int):
                super().__init__()
                self.first = nn.Linear(FEATURES, w)
                self.norm = nn.BatchNorm1d(w)
                self.dropout = nn.Dropout(0.2)
                self.tied = nn.Linear(w, w)
                self.tied_again = nn.Linear(w, w)
                self.tied_again.weight = self.tied.weight
                self.sometimes = nn.Linear(w, w)
                self.frozen = nn.Linear(w, w).requires_grad_(False)
                self.unused = nn.Linear(w, 5)
                self.last = nn.Linear(w, CLASSES)
                self.register_buffer("mean_input", torch.zeros(FEATURES))

            def forward(self, features, sometimes: bool):
                if self.training:
                    self.mean_input.lerp_(features.detach().mean(0), 0.1)
                h = torch.relu(self.norm(self.first(features - self.mean_input)))
                h = self.dropout(h + self.tied_again(torch.tanh(self.tied(h))) + self.frozen(h))
                return self.last(h + self.sometimes(h) if sometimes else h)

        return Network(self.width)

    def optimizer(self, model):
        import torch

        self.ema, self.updates = model.last.weight.detach().clone(), 0
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0, "lr": 2 * self.lr},
        ]
        if self.rule == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=0.9, nesterov=True)
        return torch.optim.AdamW(groups, lr=self.lr)

    def logits(self, model, features, ids):
        return model(features, sometimes=int(ids[0]) % 3 == 0)

    def after_step(self, model, step):
        self.ema.lerp_(model.last.weight.detach(), 0.25)
        self.updates += 1
        super().after_step(model, step)

    def extra_state(self):
        return {"ema": self.ema, "updates": self.updates}

    def load_extra_state(self, values):
        self.updates = values["updates"]

    def sample(self, model, step):
        import torch

        with torch.no_grad():
            return f"class {int(model(torch.ones(1, FEATURES), sometimes=True).argmax())}"


@dataclass
class ComputedAgain(Plain):
    """A layer is used twice and computed again by nested backward passes, so that its gradient comes in two parts."""

    def model(self):
        import torch
        from torch import nn
        from torch.utils.checkpoint import checkpoint

        class Network(nn.Module):
            def __init__(self, w: int):
                super().__init__()
                self.first, self.shared, self.last = nn.Linear(FEATURES, w), nn.Linear(w, w), nn.Linear(w, CLASSES)

            def forward(self, features):
                h = self.first(features)
                for _ in range(2):
                    h = torch.tanh(checkpoint(self.shared, h, use_reentrant=True))
                return self.last(h)

        return Network(self.width)


class TalkingSamples(Samples):
    """They say which of them is asked for."""

    def __getitem__(self, index: int):
        print("sample", index, flush=True)
        return super().__getitem__(index)


@dataclass
class Talking(Everything):
    """Prints in the worker and in its loader processes."""

    def train_data(self):
        return TalkingSamples(self.samples)

    def after_step(self, model, step):
        print("step", step, flush=True)
        super().after_step(model, step)


@dataclass
class Deep(Plain):
    """Blocks that are gathered one by one: normalisation and dropout in each, embeddings tied around them, a frozen
    half, a parameter with fewer rows than workers, and sizes that no number of workers divides."""

    width: int = field(default=10, metadata={"help": "hidden units"})
    depth: int = field(default=2, metadata={"help": "blocks"})
    blocks_named: str = field(default="", metadata={"help": "class of the blocks"})

    def __post_init__(self):
        self.blocks = (self.blocks_named,) if self.blocks_named else ()

    def model(self):
        import torch
        from torch import nn
        from torch.nn import functional

        class Block(nn.Module):
            def __init__(self, w: int):
                super().__init__()
                self.norm = nn.BatchNorm1d(w)
                self.up, self.down = nn.Linear(w, 2 * w + 1), nn.Linear(2 * w + 1, w)
                self.fixed = nn.Linear(w, w).requires_grad_(False)
                self.gain = nn.Parameter(torch.ones(1))
                self.dropout = nn.Dropout(0.1)

            def forward(self, x):
                h = self.norm(x)
                return x + self.gain * self.dropout(self.down(functional.gelu(self.up(h)))) + 0.1 * self.fixed(h)

        class Network(nn.Module):
            def __init__(self, w: int, depth: int):
                super().__init__()
                self.embed = nn.Linear(FEATURES, w, bias=False)
                self.layers = nn.ModuleList(Block(w) for _ in range(depth))
                self.last = nn.Linear(w, CLASSES)
                nn.init.orthogonal_(self.embed.weight)
                nn.init.trunc_normal_(self.last.weight, std=0.2)

            def forward(self, x):
                h = functional.linear(x, self.embed.weight)
                for layer in self.layers:
                    h = layer(h)
                return self.last(h + functional.linear(functional.linear(h, self.embed.weight.t()), self.embed.weight))

        return Network(self.width, self.depth)


class BrokenModel(Plain):
    """A job whose model cannot be built."""

    def model(self):
        raise ValueError("no such layer")


@dataclass
class Odd(Plain):
    """What is rare in models: an embedding tied with the head, a module that runs twice under two names, blocks of a
    normalisation alone, a block that never runs, frozen parameters in another number format, marks on parameters, a
    buffer that two modules share, buffers of several dtypes, of which one is empty and one is replaced instead of
    written to; and plain SGD with four groups, of which one is frozen."""

    lr: float = field(default=0.2, metadata={"help": "learning rate"})
    named: bool = field(default=True, metadata={"help": "name the blocks, or have them found"})

    def __post_init__(self):
        self.blocks = ("Layer", "Norms", "Twice") if self.named else ()

    def model(self):
        import torch
        from torch import nn

        class Norms(nn.Module):
            def __init__(self, w: int):
                super().__init__()
                self.norm = nn.LayerNorm(w)

            def forward(self, x):
                return self.norm(x)

        class Twice(nn.Module):
            def __init__(self, w: int):
                super().__init__()
                self.linear = nn.Linear(w, w)

            def forward(self, x):
                return x + torch.tanh(self.linear(x))

        class Layer(nn.Module):
            def __init__(self, w: int, scale):
                super().__init__()
                self.linear = nn.Linear(w, w)
                self.base = nn.Parameter(torch.randn(w, w, dtype=torch.bfloat16), requires_grad=False)
                self.register_buffer("scale", scale)

            def forward(self, x):
                return x + self.scale * torch.relu(self.linear(x) + 0.1 * x @ self.base.to(x.dtype))

        class Network(nn.Module):
            def __init__(self, w: int):
                super().__init__()
                self.embed, self.head = nn.Embedding(2 * FEATURES, w), nn.Linear(w, 2 * FEATURES, bias=False)
                self.head.weight = self.embed.weight
                self.first = self.again = Twice(w)
                self.norms = nn.ModuleList(Norms(w) for _ in range(2))
                scale = torch.full((1,), 0.5)
                self.layers = nn.ModuleList(Layer(w, scale) for _ in range(3))
                self.bias = nn.Parameter(torch.zeros(2 * FEATURES))
                self.bias.no_decay = True
                self.register_buffer("empty", torch.empty(0, 3))
                self.register_buffer("mask", torch.arange(2 * FEATURES) != 3)
                self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
                self.register_buffer("total", torch.zeros(w, dtype=torch.float64))
                self.register_buffer("rough", torch.zeros(w, dtype=torch.bfloat16))
                self.register_buffer("offsets", torch.arange(FEATURES) * 2, persistent=False)

            def forward(self, features):
                h = self.embed((features > 0).long() + self.offsets).sum(1)
                h = self.norms[1](self.again(self.norms[0](self.first(h))))
                h = self.layers[1](self.layers[0](h))
                if self.training:
                    self.passes += 1
                    self.total = self.total * 0.5 + h.detach().double().mean(0)
                    self.rough.lerp_(h.detach().mean(0).bfloat16(), 0.25)
                return (self.head(h) + self.bias) * self.mask

        return Network(self.width)

    def optimizer(self, model):
        import torch

        trained = [p for p in model.parameters() if p.requires_grad]
        marked = [p for p in trained if getattr(p, "no_decay", False)]
        matrices = [p for p in trained if p.dim() > 1]
        rest = [p for p in trained if p.dim() <= 1 and not any(p is m for m in marked)]
        groups = [
            {"params": matrices, "weight_decay": 0.1},
            {"params": rest, "lr": 2 * self.lr},
            {"params": marked, "lr": 3 * self.lr},
            {"params": [layer.base for layer in model.layers]},
        ]
        return torch.optim.SGD(groups, lr=self.lr)

    def logits(self, model, features, ids):
        return model(features)[:, :CLASSES]


class Leisurely(Everything):
    """Everything, in steps that leave the processors to others."""

    def loss(self, model, batch):
        time.sleep(0.05)
        return super().loss(model, batch)
