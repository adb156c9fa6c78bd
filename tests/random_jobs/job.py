"""A job made of parts by name: `RandomJob(recipe=Recipe(...).text())`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import elastic
from tests.random_jobs.data import BATCHES, DATA, Fields, fields
from tests.random_jobs.idioms import CHANGE_AT, IDIOMS, fill
from tests.random_jobs.layers import CLASSES, FEATURES, LAYERS, Inputs
from tests.random_jobs.optimizers import GROUPS, OPTIMIZERS

PARTS = LAYERS | IDIOMS


@dataclass(frozen=True)
class Recipe:
    """What a random job is made of, all by name.

    Args:
        parts: layers and idioms, in the order in which they run.
        habits: what the job does besides, of `HABITS`.
        blocks: whether the job names the class of its blocks.
    """

    parts: tuple[str, ...] = ()
    width: int = 8
    optimizer: str = "sgd"
    groups: str = "all"
    loss: str = "classes"
    data: str = "plain"
    batch: str = "default"
    samples: int = 60
    habits: tuple[str, ...] = ()
    blocks: bool = False

    def text(self) -> str:
        """For the job's option: the fields that are not the defaults."""
        standard = Recipe()
        return json.dumps({k: v for k, v in asdict(self).items() if v != getattr(standard, k)})

    @staticmethod
    def of(text: str) -> Recipe:
        return Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()})


class Block(nn.Module):
    """A part, and a way around it."""

    def __init__(self, name: str, w: int):
        super().__init__()
        self.part = PARTS[name](w)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return h + 0.5 * self.part(h, inputs)


class Network(nn.Module):
    def __init__(self, recipe: Recipe):
        super().__init__()
        w = recipe.width
        self.config = {"width": w, "temperature": 1.5}
        self.leaves_out = "left_out_block" in recipe.habits
        self.stem = nn.Linear(FEATURES, w)
        self.blocks = nn.ModuleList(Block(name, w) for name in recipe.parts)
        self.head = nn.Linear(w, CLASSES)
        if "adds_group" in recipe.habits:
            self.late = nn.Linear(w, w)

    def hidden(self, inputs: Inputs, noise: float = 0.0) -> torch.Tensor:
        h = torch.tanh(self.stem(inputs.x + noise))
        for i, block in enumerate(self.blocks):
            if not (self.leaves_out and i == 0 and inputs.x[0, 0] > 0.3):
                h = block(h, inputs)
        return self.late(h) if hasattr(self, "late") else h

    def forward(self, inputs: Inputs, noise: float = 0.0, *, headless: bool = False) -> torch.Tensor:
        h = self.hidden(inputs, noise)
        self.norm_of_hidden = h.square().mean(1)
        return h if headless else self.head(h)

    def cooled(self, logits: torch.Tensor) -> torch.Tensor:
        """A method that needs no parameters."""
        return logits / self.config["temperature"]


# ---- losses ----------------------------------------------------------------------------------------------------

Loss = Callable[["RandomJob", nn.Module, Inputs, Fields], tuple[torch.Tensor, Any, dict[str, Any]]]
LOSSES: dict[str, Loss] = {}


def _loss(function: Loss) -> Loss:
    LOSSES[function.__name__.strip("_")] = function
    return function


def _crossed(logits: torch.Tensor, f: Fields) -> torch.Tensor:
    return functional.cross_entropy(logits, f.label, reduction="sum")


@_loss
def classes(job: RandomJob, model: nn.Module, inputs: Inputs, f: Fields) -> Any:
    return _crossed(model(inputs), f), len(f.label), {}


@_loss
def smooth(job: RandomJob, model: nn.Module, inputs: Inputs, f: Fields) -> Any:
    logits = model(inputs)
    loss = functional.cross_entropy(logits, f.label, reduction="sum", label_smoothing=0.1)
    return loss, len(f.label), {"confidence": logits.softmax(1).max(1).values.sum(), "rows": len(f.label)}


@_loss
def weighted(job: RandomJob, model: nn.Module, inputs: Inputs, f: Fields) -> Any:
    """Weights that are fractions: a batch counts by their sum."""
    each = functional.cross_entropy(model(inputs), f.label, reduction="none")
    return (each * f.weight).sum(), f.weight.sum(), {"unweighted": each.sum()}


@_loss
def tokens(job: RandomJob, model: nn.Module, inputs: Inputs, f: Fields) -> Any:
    """A value for each token that is no padding, of which samples have some more than others."""
    there = (f.tokens > 0).float()
    wanted, found = f.tokens.float() / 10, model(inputs)[:, :1]
    return ((found - wanted).square() * there).sum(), int(there.sum()), {"counted": there.sum()}


@_loss
def squared(job: RandomJob, model: nn.Module, inputs: Inputs, f: Fields) -> Any:
    wanted = functional.one_hot(f.label, CLASSES).float()
    return functional.mse_loss(model(inputs), wanted, reduction="sum"), float(len(f.label)), {}


@_loss
def ignored(job: RandomJob, model: nn.Module, inputs: Inputs, f: Fields) -> Any:
    """Some labels do not count; a microbatch may have none that do."""
    label = f.label.where(f.weight > 0.5, -100)
    counted = (label >= 0).sum()
    return functional.cross_entropy(model(inputs), label, reduction="sum", ignore_index=-100), counted, {}


@_loss
def attributes(job: RandomJob, model: nn.Module, inputs: Inputs, f: Fields) -> Any:
    """Asks the model for an attribute, a method and what its last pass kept."""
    logits = model.cooled(model(inputs))  # type: ignore[operator]
    kept = model.norm_of_hidden
    return _crossed(logits, f) + 0.01 * kept.sum() / model.config["width"], len(f.label), {"kept": kept.sum().detach()}  # type: ignore[union-attr,operator,index]


@_loss
def head_outside(job: RandomJob, model: nn.Module, inputs: Inputs, f: Fields) -> Any:
    """A layer of the model's is called beside its forward()."""
    return _crossed(model.head(model(inputs, headless=True)), f), len(f.label), {}  # type: ignore[operator]


@_loss
def penalty(job: RandomJob, model: nn.Module, inputs: Inputs, f: Fields) -> Any:
    """A parameter of the model's is part of the loss."""
    loss = _crossed(model(inputs), f)
    return loss + 0.01 * len(f.label) * model.head.weight.square().sum(), len(f.label), {}  # type: ignore[union-attr,operator]


@_loss
def two_passes(job: RandomJob, model: nn.Module, inputs: Inputs, f: Fields) -> Any:
    clean, noisy = model(inputs), model(inputs, 0.1)
    return _crossed(clean, f) + (clean - noisy).square().sum(), len(f.label), {}


@_loss
def around_forward(job: RandomJob, model: nn.Module, inputs: Inputs, f: Fields) -> Any:
    """A method of the model's is called instead of its forward()."""
    return _crossed(model.head(model.hidden(inputs)), f), len(f.label), {}  # type: ignore[operator]


@_loss
def criterion(job: RandomJob, model: nn.Module, inputs: Inputs, f: Fields) -> Any:
    """A module of the job's, with a tensor in it."""
    return job.criterion(model(inputs), f.label), len(f.label), {}


@_loss
def distilled(job: RandomJob, model: nn.Module, inputs: Inputs, f: Fields) -> Any:
    """A frozen model of the job's."""
    logits = model(inputs)
    with torch.no_grad():
        wanted = job.teacher(inputs.x).softmax(1)
    return functional.kl_div(logits.log_softmax(1), wanted, reduction="sum"), len(f.label), {}


# ---- the job ---------------------------------------------------------------------------------------------------

#: What a job does besides.
HABITS = (
    "ema",
    "ema_of_all",
    "decay_changes",
    "betas_change",
    "rate_changes",
    "scheduler",
    "own_schedule",
    "counts",
    "keeps_model",
    "left_out_block",
    "adds_group",
)


@dataclass
class RandomJob(elastic.Job):
    """A job that a recipe describes."""

    recipe: str = field(default="{}", metadata={"help": "a Recipe, as JSON"})

    def __post_init__(self) -> None:
        self.r = Recipe.of(self.recipe)
        self.blocks = ("Block",) if self.r.blocks and self.r.parts else ()

    def model(self) -> nn.Module:
        if self.r.loss == "criterion":
            self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.5, 2.0]), reduction="sum")
        if self.r.loss == "distilled":
            self.teacher = fill(nn.Linear(FEATURES, CLASSES)).eval().requires_grad_(False)
        model = Network(self.r)
        if "keeps_model" in self.r.habits:
            self.kept = {"model": model, "bias": [model.stem.bias]}
        return model

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = GROUPS[self.r.groups](model)
        if "adds_group" in self.r.habits:
            late = {id(p) for p in model.late.parameters()}  # type: ignore[union-attr]
            groups = [{**g, "params": [p for p in g["params"] if id(p) not in late]} for g in groups]
        optimizer = OPTIMIZERS[self.r.optimizer](groups)
        self.updates, self.average, self.seen = 0, {}, {}
        self.built = optimizer
        if "ema" in self.r.habits:
            self.average = {"head": model.head.weight.detach().clone()}  # type: ignore[union-attr,operator]
        if "ema_of_all" in self.r.habits:
            self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        if "scheduler" in self.r.habits:
            self.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return optimizer

    def train_data(self) -> Any:
        return DATA[self.r.data](self.r.samples, 0)

    def eval_data(self) -> Any:
        return {"near": DATA["plain"](14, 1), "far": DATA["plain"](4, 2)}

    def collate_fn(self, samples: Sequence[Any]) -> Any:
        own = BATCHES[self.r.batch]
        return own(samples) if own is not None else super().collate_fn(samples)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        f = fields(batch)
        total, weight, metrics = LOSSES[self.r.loss](self, model, Inputs(f.x, f.tokens, f.length), f)
        if "keeps_model" in self.r.habits:
            total = total + 0.01 * weight * self.kept["bias"][0].square().sum()
        return total, weight, metrics

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        for module in model.modules():
            act = getattr(module, "after_step", None)
            if act is not None:
                act(step)
        habits, groups = self.r.habits, self.built.param_groups
        self.updates += 1
        named = dict(model.named_parameters())
        for name, average in self.average.items():
            average.lerp_(named["head.weight" if name == "head" else name], 0.25)
        if "decay_changes" in habits:
            for group in groups:
                group["weight_decay"] = 0.01 * step
        if "betas_change" in habits and step == CHANGE_AT:
            for group in groups:
                if "betas" in group:
                    group["betas"] = (0.5, 0.8)
        if "rate_changes" in habits and step == CHANGE_AT:
            for group in groups:
                group["lr"] *= 0.5
        if "scheduler" in habits:
            self.scheduler.step()
        if "adds_group" in habits and step == CHANGE_AT:
            self.built.add_param_group({"params": list(model.late.parameters()), "lr": 0.01})  # type: ignore[union-attr]
        if "counts" in habits:
            self.seen[step] = (step, float(step) / 3)

    def extra_state(self) -> Mapping[str, Any]:
        return {**{f"ema.{k}": v for k, v in self.average.items()}, "updates": self.updates, "seen": self.seen}

    def load_extra_state(self, values: Mapping[str, Any]) -> None:
        self.updates, self.seen = values["updates"], values["seen"]

    def sample(self, model: nn.Module, step: int) -> str:
        parameters = sum(p.numel() for p in model.parameters())
        return f"{parameters} parameters, {self.updates} updates, {len(self.seen)} seen"


@dataclass
class ScheduledJob(RandomJob):
    """One with a schedule of its own."""

    def schedule(self, step: int, total_steps: int) -> float | None:
        return 1.0 / (1 + step) if step else None


def job_of(recipe: Recipe) -> RandomJob:
    return (ScheduledJob if "own_schedule" in recipe.habits else RandomJob)(recipe.text())
