"""What a run is to compute, by plain PyTorch in one process: no wrappers, no trees, no worlds.

Only the documented semantics are shared with what is tested, and pure functions that have tests of their own: the order
of samples and the derivation of seeds. A step goes through its passes one after another:

* each pass starts from the buffers of the step's beginning, under a seed of its own; floating buffers then move by the
  mean of what the passes did to them, weighted by microbatches; passes that moved another buffer did it alike;
* gradients of summed losses add up, and are divided by the weight of the whole batch, then clipped;
* a parameter that no pass used has no gradient.

Floats are added in another order than in a run, so figures agree to some digits only. How many, the oracle finds
itself: it trains a second time, with initial values and gradients changed in their last digits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn
from torch.utils.data import Subset

from elastic.config import TrainConfig
from elastic.data.order import sample_ids
from elastic.job import Job
from elastic.job_data import eval_sets
from elastic.run.plan import RunPlan
from elastic.seeds import derive, seed_all
from elastic.worker.belongings import Attributes, leaves
from elastic.worker.placing import Placing

Pass = tuple[int, int]  # (first microbatch, how many)
#: By how much the oracle changes initial values and gradients: eight times the rounding of a float32.
NUDGE = 8 * 2.0**-23


@dataclass
class Trained:
    """What came of a training: a number for each step, evaluations by step, and tensors by name at the end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def train(
    make: Callable[[], Job],
    config: TrainConfig,
    plan: RunPlan,
    passes_of: Callable[[int], Sequence[Pass]],
    *,
    nudge: float = 0.0,
    noise: int = 1,
) -> Trained:
    """Train a job from its first step to its last.

    Args:
        make: a new job each time.
        passes_of: the forward passes of a step (from 0), in any order.
        nudge: the largest relative change of initial values, and of gradients before an update.
        noise: decides which changes those are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.scaling.cpus_per_worker)
    torch.use_deterministic_algorithms(config.run.exactness == "bitwise")
    try:
        return _Training(make, config, plan, nudge, noise).run(passes_of)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


class _Training:
    def __init__(self, make: Callable[[], Job], config: TrainConfig, plan: RunPlan, nudge: float, noise: int):
        self.config, self.plan, self.seed = config, plan, config.run.seed
        self.job, self.model = make(), None
        self.model = self.job.model()
        self.nudge, self.noise = nudge, torch.Generator().manual_seed(noise)
        _take_values(self.job, self.model, *_first(make(), config))
        for p in self.model.parameters():
            self.change(p.detach())
        for module in self.model.modules():
            if type(module).train is not nn.Module.train:
                module.train(module.training)  # as `model.train()` asks those with one of their own
        self.modes = {module: module.training for module in self.model.modules()}
        self.optimizer = self.job.optimizer(self.model)
        self.first_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        #: A scheduler of torch's sets the rates.
        self.followed = any("initial_lr" in group for group in self.optimizer.param_groups)
        self.data, self.held_out = self.job.train_data(), eval_sets(self.job)
        self.found = Trained()

    def run(self, passes_of: Callable[[int], Sequence[Pass]]) -> Trained:
        every = self.plan.eval_every
        for step in range(self.plan.total_steps):
            self.step(step, passes_of(step))
            if (every and (step + 1) % every == 0) or step + 1 == self.plan.total_steps:
                self.found.evaluations[step + 1] = self.evaluate()
        self.found.tensors = {
            f"model/{name}": t.detach().clone()
            for name, t in self.model.state_dict(keep_vars=True).items()
            if isinstance(t, torch.Tensor)
        } | {f"extra/{name}": t.clone() for name, t in self.job.extra_state().items() if isinstance(t, torch.Tensor)}
        return self.found

    # ---- steps -------------------------------------------------------------------------------------------------

    def step(self, step: int, passes: Sequence[Pass]) -> None:
        for module, training in self.modes.items():
            module.training = training
        for p in self.model.parameters():
            p.grad = None
        before = _Buffers(self.model)
        loss_sum, weight_sum, sums, moves = 0.0, 0.0, {}, _Moves()
        for first, count in passes:
            batch = self.batch(step, first, count)
            seed_all(derive("step", self.seed, step, first))
            loss, weight, metrics = self.loss(self.job.loss, batch)
            loss.backward()
            loss_sum, weight_sum = loss_sum + loss.item(), weight_sum + float(weight)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            moves.add(before, count)
            before.put_back()
        moves.apply(before)
        self.update(step, weight_sum)
        self.found.losses.append(loss_sum / weight_sum)
        self.found.metrics.append({name: value / weight_sum for name, value in sums.items()})

    def update(self, step: int, weight: float) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        for g in gradients:
            g.copy_(g.to_dense() / weight) if not g.is_sparse else g.mul_(1 / weight)
            self.change(g)
        squares = sum(float(_dense(g).abs().double().square().sum()) for g in gradients)
        norm, most = math.sqrt(squares), self.config.optim.clip_norm
        if most is not None and norm > most:
            for g in gradients:
                g.mul_(most / (norm + 1e-6))
        self.found.norms.append(norm)
        share = self.rate(step)
        groups = self.optimizer.param_groups
        for group, first in zip(groups, self.first_rates):
            if not self.followed:
                group["lr"] = first * share
        before = [float(group["lr"]) for group in groups]
        self.found.rates.append(before[0])
        seed_all(derive("update", self.seed, step))
        self.optimizer.step()
        self.job.after_step(self.model, step + 1)
        if not self.followed:  # a rate that the job changes is the new one, and so is that of a new group
            changed = [float(group["lr"]) for group in groups]
            self.first_rates = [
                first if now == was else now for first, was, now in zip(self.first_rates, before, changed)
            ] + changed[len(before) :]

    def change(self, tensor: torch.Tensor) -> None:
        if self.nudge and not tensor.is_sparse and (tensor.is_floating_point() or tensor.is_complex()):
            nudge = self.nudge
            if tensor.is_floating_point():  # in 16 bits by their rounding, as less would change nothing
                nudge = max(nudge, torch.finfo(tensor.dtype).eps / 2)
            tensor.mul_(1 + nudge * (2 * torch.rand(tensor.shape, generator=self.noise) - 1))

    def rate(self, step: int) -> float:
        """The share of the full learning rate."""
        own = self.job.schedule(step, self.plan.total_steps)
        if own is not None:
            return own
        optim, warm = self.config.optim, self.plan.warmup_steps
        if step < warm:
            return (step + 1) / warm
        if optim.schedule == "constant":
            return 1.0
        at = (step - warm) / max(1, self.plan.total_steps - 1 - warm)
        return optim.final_lr + (1 - optim.final_lr) * (1 + math.cos(math.pi * at)) / 2

    def batch(self, step: int, first: int, count: int) -> Any:
        size = self.plan.global_size // self.plan.microbatches
        begin = step * self.plan.global_size + first * size
        positions = torch.arange(begin, begin + count * size).numpy()
        ids = sample_ids(self.seed, len(self.data), positions)
        samples = []
        if hasattr(self.data, "__getitems__") and not isinstance(self.data, Subset):
            for at in range(0, count * size, size):  # the dataset's own way to fetch several: a microbatch at a time
                seed_all(derive("items", self.seed, (begin + at) // len(self.data), _digest(ids[at : at + size])))
                samples += self.data.__getitems__(ids[at : at + size].tolist())
        else:
            for position, sample in zip(positions, ids.tolist()):
                seed_all(derive("item", self.seed, int(position) // len(self.data), sample))
                samples.append(self.data[sample])
        seed_all(derive("collate", self.seed, begin // len(self.data), _digest(ids[:size])))
        return self.job.collate_fn(samples)

    def loss(self, function: Callable[..., Any], batch: Any) -> tuple[torch.Tensor, Any, dict[str, Any]]:
        autocast = self.config.precision.autocast
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast == "bf16"):
            return function(self.model, batch)

    # ---- evaluation --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        modes = {module: module.training for module in self.model.modules()}
        size = min(4 * (self.plan.global_size // self.plan.microbatches), self.plan.global_size)
        found, before = {}, _Buffers(self.model)
        self.model.eval()
        for name, data in self.held_out.items():
            sums, weights = {}, 0.0
            for index, begin in enumerate(range(0, len(data), size)):
                batch = self.batch_of(name, data, index, range(begin, min(begin + size, len(data))))
                seed_all(derive("eval", self.seed, name, index))
                loss, weight, metrics = self.loss(self.job.evaluate, batch)
                weights += float(weight)
                for key, value in {"loss": loss, **metrics}.items():
                    sums[key] = sums.get(key, 0.0) + float(value)
            found |= {f"eval/{name}/{key}" if name else f"eval/{key}": value / weights for key, value in sums.items()}
        before.put_back()
        for module, training in modes.items():
            module.training = training
        return found

    def batch_of(self, name: str, data: Any, index: int, ids: range) -> Any:
        samples = []
        for sample in ids:
            seed_all(derive("eval-item", self.seed, name, sample))
            samples.append(data[sample])
        seed_all(derive("eval-collate", self.seed, name, index))
        return self.job.collate_fn(samples)


def _first(job: Job, config: TrainConfig) -> tuple[Job, nn.Module]:
    """Job and model with the values that everything begins with, which the run's seed decides."""
    placing = Placing(job, config, torch.device("cpu"))
    placing.warm_up()
    return job, placing.whole().model


def _beside(job: Job, model: nn.Module) -> dict[str, torch.Tensor]:
    """What else model() made, such as teachers, by its place."""
    own = [id(t) for t in (*model.parameters(), *model.buffers())]
    found = leaves({"job": Attributes(job), "model": model}, own, None)
    return {name: one for name, one in found.items() if isinstance(one, torch.Tensor)}


@torch.no_grad()
def _take_values(job: Job, model: nn.Module, first_job: Job, first_model: nn.Module) -> None:
    for named in (nn.Module.named_parameters, nn.Module.named_buffers):
        first = dict(named(first_model))
        for name, tensor in named(model):
            tensor.copy_(first[name])
    beside = _beside(first_job, first_model)
    for name, tensor in _beside(job, model).items():
        if name in beside:
            tensor.detach().copy_(beside[name])


def _digest(ids: np.ndarray) -> int:
    """By which the draws for a whole microbatch are seeded."""
    found = xxhash.xxh3_64_intdigest(ids.astype("<i8").tobytes())
    return found - (1 << 64) if found >= 1 << 63 else found


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient


class _Buffers:
    """All buffers as they are now: places, tensors and copies."""

    def __init__(self, model: nn.Module):
        self.saved = model.state_dict(keep_vars=True).keys()
        self.places = {
            name: (model.get_submodule(path), key)
            for name, _ in model.named_buffers()
            for path, _, key in [name.rpartition(".")]
        }
        self.tensors = {name: getattr(module, key) for name, (module, key) in self.places.items()}
        self.values = {name: t.detach().clone() for name, t in self.tensors.items()}

    def now(self) -> dict[str, torch.Tensor]:
        """What they are now. One that is not saved and has another tensor in its place is a cache, and no part."""
        for name, (module, key) in list(self.places.items()):
            if name not in self.saved and getattr(module, key) is not self.tensors[name]:
                for values in (self.places, self.tensors, self.values):
                    del values[name]
        return {name: getattr(module, key).detach() for name, (module, key) in self.places.items()}

    @torch.no_grad()
    def put_back(self) -> None:
        self.now()
        for name, (module, key) in self.places.items():
            module._buffers[key] = self.tensors[name]
            self.tensors[name].copy_(self.values[name])


class _Moves:
    """What passes did to buffers."""

    def __init__(self) -> None:
        self.moved: list[tuple[int, dict[str, torch.Tensor]]] = []

    def add(self, before: _Buffers, count: int) -> None:
        self.moved.append((count, copy.deepcopy(before.now())))

    @torch.no_grad()
    def apply(self, before: _Buffers) -> None:
        total = sum(count for count, _ in self.moved)
        for name, start in before.values.items():
            after = [(count, values.get(name, start)) for count, values in self.moved]
            if start.is_floating_point():
                begin = start.double().where(start.isfinite(), torch.zeros(()).double())
                move = sum(count * (value.double() - begin) for count, value in after) / total
                before.tensors[name].copy_(begin + move)
            else:
                moved = [value for _, value in after if not torch.equal(value, start)]
                assert all(torch.equal(value, moved[0]) for value in moved), f"buffer {name} moved in several ways"
                before.tensors[name].copy_(moved[0] if moved else start)
