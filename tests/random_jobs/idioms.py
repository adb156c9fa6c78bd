"""What people do with layers: shared, frozen, conditional, recomputed, with buffers, hooks, lists and caches.

Each maps (N, w) to (N, w) as those of `tests.random_jobs.layers` do. What an idiom needs done after a step is its
`after_step`, which the job calls with the number of the step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.random_jobs.layers import FEATURES, VOCABULARY, Inputs, named

IDIOMS: dict[str, Callable[[int], nn.Module]] = {}
CHANGE_AT = 3  # the step after which layers are frozen and unfrozen


def fill(module: nn.Module) -> nn.Module:
    """Values that no seed decides, as those that were loaded from somewhere."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.linspace(-0.7, 0.9, p.numel()).view(p.shape))
    return module


class _Idiom(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.linear = nn.Linear(w, w)
        self.begin(w)

    def begin(self, w: int) -> None:
        """Further members."""

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return torch.tanh(self.linear(h))


# ---- buffers ---------------------------------------------------------------------------------------------------


@named(IDIOMS, "counter")
class Counter(_Idiom):
    def begin(self, w: int) -> None:
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        if self.training:
            self.steps += 1
        return self.linear(h) * torch.cos(self.steps / 10)


@named(IDIOMS, "running_mean")
class RunningMean(_Idiom):
    def begin(self, w: int) -> None:
        self.register_buffer("mean", torch.zeros(w))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        if self.training:
            self.mean.lerp_(h.detach().float().mean(0), 0.2)
        return self.linear(h - self.mean)


@named(IDIOMS, "replaced_mean")
class ReplacedMean(RunningMean):
    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        if self.training:
            self.mean = 0.8 * self.mean + 0.2 * h.detach().mean(0)
        return self.linear(h - self.mean)


@named(IDIOMS, "data_mean")
class DataMean(RunningMean):
    """Written where no version counter sees it."""

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        if self.training:
            self.mean.data.mul_(0.8).add_(h.detach().mean(0), alpha=0.2)
        return self.linear(h - self.mean)


@named(IDIOMS, "unsaved_mean")
class UnsavedMean(RunningMean):
    """In no state_dict."""

    def begin(self, w: int) -> None:
        self.register_buffer("mean", torch.zeros(w), persistent=False)


@named(IDIOMS, "double_mean")
class DoubleMean(RunningMean):
    def begin(self, w: int) -> None:
        self.register_buffer("mean", torch.zeros(w, dtype=torch.float64))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        if self.training:
            self.mean.mul_(0.8).add_(h.detach().double().mean(0), alpha=0.2)
        return self.linear(h - self.mean.float())


@named(IDIOMS, "rotary")
class Rotary(_Idiom):
    """A table of floats that nothing writes to, in every checkpoint."""

    persistent = True

    def begin(self, w: int) -> None:
        angles = torch.arange(w // 2) / 3.0
        self.register_buffer("table", torch.stack([angles.cos(), angles.sin()]), persistent=self.persistent)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        a, b = self.linear(h).chunk(2, 1)
        cos, sin = self.table
        return torch.cat([a * cos - b * sin, a * sin + b * cos], 1)


@named(IDIOMS, "rotary_unsaved")
class RotaryUnsaved(Rotary):
    persistent = False


@named(IDIOMS, "cached_table")
class CachedTable(_Idiom):
    """A buffer that is not saved, made anew for the length of each batch."""

    def begin(self, w: int) -> None:
        self.register_buffer("positions", torch.zeros(0), persistent=False)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        length = inputs.tokens.shape[1]
        if len(self.positions) != length:
            self.positions = torch.arange(length, device=h.device) / 10.0
        return self.linear(h) * self.positions.mean()


@named(IDIOMS, "cached_mask")
class CachedMask(_Idiom):
    """A cache that is a plain attribute."""

    def begin(self, w: int) -> None:
        self.mask: torch.Tensor | None = None

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        if self.mask is None:
            self.mask = torch.ones(h.shape[1], h.shape[1], device=h.device).tril()
        return functional.linear(h, self.linear.weight * self.mask)


@named(IDIOMS, "tensor_attribute")
class TensorAttribute(_Idiom):
    """A constant that is neither parameter nor buffer."""

    def begin(self, w: int) -> None:
        self.signs = torch.ones(w) - 2 * (torch.arange(w) % 2)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.linear(h) * self.signs


@named(IDIOMS, "prototypes")
class Prototypes(_Idiom):
    """A queue of what was seen, as in contrastive learning, and where its next place is."""

    def begin(self, w: int) -> None:
        self.register_buffer("queue", torch.linspace(-1, 1, 4 * w).view(4, w).clone())
        self.register_buffer("next", torch.zeros(1, dtype=torch.int64))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        near = (self.linear(h) @ self.queue.clone().t()).softmax(1) @ self.queue.clone()
        if self.training:
            with torch.no_grad():
                self.queue[int(self.next)] = h.mean(0)
                self.next[0] = (self.next[0] + 1) % 4
        return near


@named(IDIOMS, "growing")
class Growing(_Idiom):
    """A buffer that is longer after each step."""

    def begin(self, w: int) -> None:
        self.register_buffer("history", torch.ones(1))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.linear(h) * self.history.mean()

    def after_step(self, step: int) -> None:
        self.history = torch.cat([self.history, torch.full((1,), 1 / step)])


@named(IDIOMS, "extra_state")
class ExtraState(_Idiom):
    """A module that saves a number by itself."""

    def begin(self, w: int) -> None:
        self.strength = 1.0

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.linear(h) * self.strength

    def after_step(self, step: int) -> None:
        self.strength *= 0.9

    def get_extra_state(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.strength = state["strength"]


# ---- frozen, unused, now and then ------------------------------------------------------------------------------


@named(IDIOMS, "frozen")
class Frozen(_Idiom):
    def begin(self, w: int) -> None:
        self.fixed = nn.Linear(w, w).requires_grad_(False)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.linear(h) + self.fixed(h)


@named(IDIOMS, "unfrozen_later")
class UnfrozenLater(Frozen):
    def after_step(self, step: int) -> None:
        if step >= CHANGE_AT:
            self.fixed.requires_grad_(True)


@named(IDIOMS, "frozen_later")
class FrozenLater(_Idiom):
    def begin(self, w: int) -> None:
        self.second = nn.Linear(w, w)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.linear(h) + self.second(h)

    def after_step(self, step: int) -> None:
        if step == CHANGE_AT:
            for p in self.second.parameters():
                p.requires_grad = False


@named(IDIOMS, "frozen_batchnorm")
class FrozenBatchNorm(_Idiom):
    """Left in eval mode, as in fine-tuning."""

    def begin(self, w: int) -> None:
        self.norm = nn.BatchNorm1d(w).eval().requires_grad_(False)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.norm(self.linear(h))


@named(IDIOMS, "never_training")
class NeverTraining(_Idiom):
    """Its own train() keeps a part in eval mode."""

    def begin(self, w: int) -> None:
        self.part = nn.Sequential(nn.BatchNorm1d(w), nn.Dropout(0.5))

    def train(self, mode: bool = True) -> NeverTraining:
        super().train(mode)
        self.part.eval()
        return self

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.part(self.linear(h))


@named(IDIOMS, "teacher_in_a_list")
class TeacherInAList(_Idiom):
    """A list hides a frozen model from the parameters."""

    def begin(self, w: int) -> None:
        self.teacher = [fill(nn.Linear(w, w)).requires_grad_(False)]

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.linear(h) * torch.sigmoid(self.teacher[0](h))


@named(IDIOMS, "target_network")
class TargetNetwork(_Idiom):
    """A frozen copy that follows."""

    def begin(self, w: int) -> None:
        self.target = copy.deepcopy(self.linear).requires_grad_(False)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.linear(h) - 0.5 * self.target(h)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for mine, its in zip(self.linear.parameters(), self.target.parameters()):
            its.lerp_(mine, 0.3)


@named(IDIOMS, "unused")
class Unused(_Idiom):
    def begin(self, w: int) -> None:
        self.other = nn.Linear(w, 5)


@named(IDIOMS, "sometimes")
class Sometimes(_Idiom):
    """A branch by what the batch holds."""

    def begin(self, w: int) -> None:
        self.branch = nn.Linear(w, w)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.linear(h) + (self.branch(h) if inputs.x[0, 0] > 0.3 else 0)


@named(IDIOMS, "sometimes_normed")
class SometimesNormed(Sometimes):
    """BatchNorm in such a branch: only some microbatches count in it."""

    def begin(self, w: int) -> None:
        self.branch = nn.Sequential(nn.BatchNorm1d(w), nn.Linear(w, w))


@named(IDIOMS, "by_chance")
class ByChance(Sometimes):
    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        chosen = self.training and torch.rand(()) < 0.5
        return self.linear(h) + (self.branch(h) if chosen else 0)


@named(IDIOMS, "from_a_step_on")
class FromAStepOn(Sometimes):
    """A branch that is switched on while training."""

    def begin(self, w: int) -> None:
        super().begin(w)
        self.register_buffer("on", torch.zeros((), dtype=torch.bool))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.linear(h) + (self.branch(h) if self.on else 0)

    def after_step(self, step: int) -> None:
        if step == CHANGE_AT:
            self.on.fill_(True)


@named(IDIOMS, "top_expert")
class TopExpert(_Idiom):
    """One of three experts for each sample, by its first token."""

    def begin(self, w: int) -> None:
        self.experts = nn.ModuleList(nn.Linear(w, w) for _ in range(3))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        out, chosen = self.linear(h), inputs.tokens[:, 0] % 3
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out = out.index_add(0, (chosen == i).nonzero()[:, 0], expert(h[chosen == i]))
        return out


# ---- shared ----------------------------------------------------------------------------------------------------


@named(IDIOMS, "tied")
class Tied(_Idiom):
    def begin(self, w: int) -> None:
        self.again = nn.Linear(w, w)
        self.again.weight = self.linear.weight

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.again(torch.tanh(self.linear(h)))


@named(IDIOMS, "tied_embedding")
class TiedEmbedding(_Idiom):
    def begin(self, w: int) -> None:
        self.embed, self.out = nn.Embedding(VOCABULARY, w), nn.Linear(w, VOCABULARY, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.out(self.linear(h)).softmax(1) @ self.embed.weight + self.embed(inputs.tokens).mean(1)


@named(IDIOMS, "run_twice")
class RunTwice(_Idiom):
    def begin(self, w: int) -> None:
        self.norm = nn.LayerNorm(w)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        for _ in range(2):
            h = torch.tanh(self.linear(self.norm(h)))
        return h


@named(IDIOMS, "two_names")
class TwoNames(_Idiom):
    def begin(self, w: int) -> None:
        self.first = self.second = nn.Sequential(nn.Linear(w, w), nn.Tanh())

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.second(self.linear(self.first(h)))


@named(IDIOMS, "listed_parameters")
class ListedParameters(_Idiom):
    """The same parameters in a plain list, which is what runs."""

    def begin(self, w: int) -> None:
        self.gain, self.shift = nn.Parameter(torch.ones(w)), nn.Parameter(torch.zeros(w))
        self.both = [self.gain, self.shift]

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.linear(h) * self.both[0] + self.both[1]


@named(IDIOMS, "closure")
class Closure(_Idiom):
    """A function that was made with the parameters."""

    def begin(self, w: int) -> None:
        gain = nn.Parameter(torch.ones(w))
        self.register_parameter("gain", gain)
        self.scale = lambda h: h * gain

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.scale(self.linear(h))


class Special(nn.Parameter):
    """A parameter of a class of its own."""


@named(IDIOMS, "own_parameter_class")
class OwnParameterClass(_Idiom):
    def begin(self, w: int) -> None:
        self.gain = Special(torch.ones(w))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.linear(h) * self.gain * (2.0 if isinstance(self.gain, Special) else 1.0)


@named(IDIOMS, "parameter_list")
class ParameterList(_Idiom):
    def begin(self, w: int) -> None:
        self.steps = nn.ParameterList(nn.Parameter(torch.randn(w, w) * 0.2) for _ in range(2))
        self.biases = nn.ParameterDict({"a": nn.Parameter(torch.zeros(w)), "b": nn.Parameter(torch.ones(w))})

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return torch.tanh(h @ self.steps[0] + self.biases["a"]) @ self.steps[1] + self.biases["b"]


@named(IDIOMS, "names_with_module")
class NamesWithModule(_Idiom):
    """Names in which what wrappers put in front occurs."""

    def begin(self, w: int) -> None:
        self.module = nn.Linear(w, w)
        self.submodule = nn.ModuleDict({"module": nn.Linear(w, w), "_orig_mod": nn.Linear(w, w)})

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.module(h) + self.submodule["module"](self.submodule["_orig_mod"](h))


# ---- recomputed, hooked, own gradients -------------------------------------------------------------------------


@named(IDIOMS, "checkpointed")
class Checkpointed(_Idiom):
    reentrant = False

    def begin(self, w: int) -> None:
        self.inner = nn.Sequential(nn.Linear(w, w), nn.GELU(), nn.Dropout(0.1), nn.Linear(w, w))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return checkpoint(self.inner, self.linear(h), use_reentrant=self.reentrant)


@named(IDIOMS, "checkpointed_reentrant")
class CheckpointedReentrant(Checkpointed):
    reentrant = True


@named(IDIOMS, "gradient_hook")
class GradientHook(_Idiom):
    def begin(self, w: int) -> None:
        self.linear.weight.register_hook(lambda gradient: 0.5 * gradient)


@named(IDIOMS, "clipping_hook")
class ClippingHook(_Idiom):
    def begin(self, w: int) -> None:
        for p in self.linear.parameters():
            p.register_hook(lambda gradient: gradient.clamp(-0.05, 0.05))


@named(IDIOMS, "module_hooks")
class ModuleHooks(_Idiom):
    def begin(self, w: int) -> None:
        self.linear.register_forward_hook(lambda module, args, out: out + 0.1)
        self.linear.register_full_backward_hook(lambda module, into, out: tuple(0.5 * g for g in into))


@named(IDIOMS, "marked")
class Marked(_Idiom):
    """Marks on parameters, by which the job's groups are made."""

    def begin(self, w: int) -> None:
        self.linear.bias.no_decay = True
        self.gain = nn.Parameter(torch.ones(w))
        self.gain.no_decay = True

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.linear(h) * self.gain


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-0.5, 0.5)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient


@named(IDIOMS, "straight_through")
class StraightThrough(_Idiom):
    """A function with a gradient of its own. It clamps: what rounds would turn last bits into first ones."""

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return _Clamp.apply(self.linear(h))


@named(IDIOMS, "standardised")
class Standardised(_Idiom):
    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        weight = self.linear.weight
        return functional.linear(h, (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 0.1))


@named(IDIOMS, "clamped")
class Clamped(_Idiom):
    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for p in self.linear.parameters():
            p.clamp_(-0.3, 0.3)


@named(IDIOMS, "functional_call")
class FunctionalCall(_Idiom):
    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        scaled = {name: 0.5 * p for name, p in self.linear.named_parameters()}
        return torch.func.functional_call(self.linear, scaled, (h,))


@named(IDIOMS, "double_backward")
class DoubleBackward(_Idiom):
    """Its output is a gradient: backward passes go through backward passes."""

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        with torch.enable_grad():
            x = inputs.x.detach().clone().requires_grad_()
            energy = torch.tanh(self.linear(functional.pad(x, (0, h.shape[1] - FEATURES)) + h)).sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        return h * slope.mean(1, keepdim=True)


@named(IDIOMS, "detached")
class Detached(_Idiom):
    """Two parts that do not train each other."""

    def begin(self, w: int) -> None:
        self.other = nn.Linear(w, w)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.other(self.linear(h).detach()) + self.linear(h)
