"""Small jobs that use what a job may ask of the trainer; see tests/test_callbacks.py and tests/test_surface.py."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import elastic
from tests.tiny_jobs import Deep, Plain

HEARD: list[tuple[int, str, Any]] = []  # process, method, what it was given
RELEASED = threading.Event()  # lets go of the slow callback


class Recorder(elastic.Callback):
    """Keeps all that it hears."""

    def on_start(self, run):
        HEARD.append((os.getpid(), "start", run))

    def on_row(self, row):
        HEARD.append((os.getpid(), "row", row))
        row.clear()  # it has one of its own

    def on_eval(self, row):
        HEARD.append((os.getpid(), "eval", row))

    def on_checkpoint(self, event):
        HEARD.append((os.getpid(), "checkpoint", event))

    def on_event(self, event):
        HEARD.append((os.getpid(), "event", event))

    def on_sample(self, step, sample):
        HEARD.append((os.getpid(), "sample", {"step": step, **sample}))

    def on_end(self, end):
        HEARD.append((os.getpid(), "end", end))
        RELEASED.set()


class Rows(elastic.Callback):
    """Keeps the steps of the rows that it hears; step 6 opens a gate."""

    steps: list[int] = []

    def __init__(self, gate: str = ""):
        self.gate = gate

    def on_row(self, row):
        self.steps.append(row["step"])
        if self.gate and row["step"] >= 6:
            Path(self.gate).touch()


class Broken(elastic.Callback):
    """Fails at every row."""

    def on_row(self, row):
        raise SystemExit("no route to the tracker")


class Slow(elastic.Callback):
    """Hangs at the first row until the run has ended."""

    def on_row(self, row):
        RELEASED.wait(60)


@dataclass
class Told(Plain):
    """Has callbacks, and samples of text and picture."""

    gate: str = field(default="", metadata={"help": "after step 7 workers wait until this file is there"})

    def callbacks(self):
        return [Recorder(), Rows(self.gate), Broken(), Slow()]

    def after_step(self, model, step):
        deadline = time.monotonic() + 30
        while self.gate and step == 7 and not Path(self.gate).exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    def sample(self, model, step):
        first = next(model.parameters())
        return {"text": f"step {step} {model.training}", "weights": (first.detach() * 0 + 0.5).clamp(0, 1)}


class Two(Deep):
    """Muon for the matrices of blocks, AdamW for the rest."""

    def optimizer(self, model):
        import torch

        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for name, p in trained.items() if name.startswith("layers") and p.dim() == 2]
        rest = [p for p in trained.values() if not any(p is m for m in matrices)]
        return {
            "muon": torch.optim.Muon(matrices, lr=2 * self.lr, weight_decay=0.1),
            "adamw": torch.optim.AdamW(rest, lr=self.lr, weight_decay=0.0),
        }


class Cycled(Plain):
    """OneCycleLR over the whole run, by the plan that the job is told."""

    def optimizer(self, model):
        import torch

        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def scheduler(self, optimizer):
        import torch

        assert self.plan.steps_per_epoch == 100 / 30
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=self.plan.total_steps + 1)


class Flat(Plain):
    """Its held-out figure is given: better until step 4, then never again."""

    def scheduler(self, optimizer):
        import torch

        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)

    def after_step(self, model, step):
        self.step = step

    def optimizer(self, model):
        self.step = 0
        return super().optimizer(model)

    def extra_state(self):
        return {"step": self.step}

    def load_extra_state(self, values):
        self.step = values["step"]

    def evaluate(self, model, batch):
        import torch

        return torch.tensor(float(max(10 - self.step, 6)) * len(batch[1])), len(batch[1]), {}


@dataclass
class Adapted(Deep):
    """A frozen base from a source, of which a part is trained; and a teacher that is frozen."""

    base: int = field(default=0, metadata={"help": "what the source of the base holds"})
    teacher_of: str = field(default="", metadata={"help": "the teacher is another one in each process"})
    thaws: bool = field(default=False, metadata={"help": "a part of the base is trained after all"})

    def frozen(self):
        import torch

        self.teacher = torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Dropout())
        if self.teacher_of:
            torch.nn.init.constant_(self.teacher[0].bias, float(os.getpid()))
        return {"teacher": self.teacher}

    def model(self):
        import torch

        model = super().model()
        for name, p in model.named_parameters():
            if not name.startswith("last"):
                p.requires_grad_(False)
        torch.nn.init.constant_(model.embed.weight, self.base / 8)
        return model

    def has_source(self, name):
        return True

    def optimizer(self, model):
        import torch

        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.lr)

    def logits(self, model, features, ids):
        assert not any(p.requires_grad for p in self.teacher.parameters())
        assert not self.teacher.training
        return model(features) + self.teacher(features)

    def after_step(self, model, step):
        if self.thaws and step == 2:
            model.layers[0].up.weight.requires_grad_(True)


class Counted(Plain):
    """Figures of their own weights, one made of sums, and one that goes by the name of the set."""

    def loss(self, model, batch):
        loss, weight, metrics = super().loss(model, batch)
        ones = (batch[1] == 1).sum()
        return loss, weight, {**metrics, "ones": (ones * 2, ones)}

    def evaluate(self, model, batch, name):
        features, labels, ids = batch
        loss, weight, _ = self.loss(model, batch)
        right = (model(features).argmax(1) == labels) & (labels == 1)
        sums = {"hits": right.sum(), "called": (model(features).argmax(1) == 1).sum(), "ones": (labels == 1).sum()}
        far = float(name == "far") * weight
        return loss, weight, {**sums, "far": far, "largest": (float(len(ids)), 1)}

    def evaluated(self, sums, name):
        assert name in ("near", "far")
        f1 = 2 * sums["hits"] / (sums["called"] + sums["ones"])
        return {"f1": f1, "perplexity": 2 ** (sums["loss"] / sums["weight"])}


@dataclass
class Drawn(Plain):
    """Draws by weight, so that an epoch has samples several times; samples are drawn with noise."""

    scale: float = field(default=1.0, metadata={"help": "how much heavier late samples are"})

    def sampler(self, data):
        return elastic.Weighted([1.0 + self.scale * i for i in range(len(data))])


@dataclass
class Ordered(Plain):
    """Gives each position a sample by a function of its own, or does not."""

    order: str = field(default="once", metadata={"help": "how it is wrong"})
    driver: int = field(default=0, metadata={"help": "the process in which it is right"})

    def sampler(self, data):

        count, asked = len(data), []

        def function(positions, plan):
            asked.append(positions)
            if self.order == "late" and positions[0] > 2 * plan.batch_size:
                raise KeyError("no more")
            if self.order == "in-workers" and positions[0] == 6 * plan.batch_size and os.getpid() != self.driver:
                return positions
            return {
                "in-workers": positions % count,
                "once": positions % count,
                "late": positions % count,
                "outside": positions % (count + 1),
                "short": positions[:1] % count,
                "halves": positions / 2,
                "by-call": (positions + len(asked)) % count,
                "by-process": (positions + os.getpid()) % count,
            }[self.order]

        return None if self.order == "none" else list(range(count)) if self.order == "list" else function


@dataclass
class Prepared(Plain):
    """Has data only after it was prepared."""

    folder: str = field(default="", metadata={"help": "where that is noted"})
    fails: bool = field(default=False, metadata={"help": "the disk is full"})

    def prepare(self):
        if self.fails:
            raise OSError("the disk is full")
        with open(f"{self.folder}/calls", "a") as calls:
            calls.write(f"{os.getpid()}\n")

    def train_data(self):
        assert Path(self.folder, "calls").exists()
        return super().train_data()


@dataclass
class FromFiles(Adapted):
    """The base comes from safetensors, what is trained is made here."""

    file: str = field(default="", metadata={"help": "the base"})

    def initial_weights(self):
        return self.file

    def weight_name(self, name):
        made_here = name.startswith("last") or name.endswith(("running_mean", "running_var", "num_batches_tracked"))
        return None if made_here else f"base.{name}"


class Warmed(Plain):
    """A scheduler of transformers over the whole run."""

    def scheduler(self, optimizer):
        from transformers.optimization import get_cosine_schedule_with_warmup

        return get_cosine_schedule_with_warmup(optimizer, 3, self.plan.total_steps)
