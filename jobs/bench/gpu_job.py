"""The job of `jobs.bench.gpu`: a small GPT on numbers that are drawn; it needs no file and no further library."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import elastic
from elastic import BatchOptions, EvalOptions, ObserveOptions, TrainConfig
from jobs.codegpt import CodeGPT
from jobs.gpt_sizes import SIZES

CONTEXT = 64
CONFIG = TrainConfig(
    batch=BatchOptions(global_size=12, microbatches=6),
    eval=EvalOptions(every="4st"),
    observe=ObserveOptions(tensorboard=False),
)


def admit_older_fsdp() -> None:
    """With torch before 2.13 have FSDP2 taken as it is. It lacks what models need of which some parameters get no
    gradient on some workers; this model has none."""
    import torch
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard import _fsdp_state

    if torch.__version__ >= "2.13":
        return
    older: Any = _fsdp_state
    move = older._to_kwargs

    def move_if_any(args: Any, kwargs: Any, *options: Any) -> Any:  # without arguments it fails there
        return move(args, kwargs, *options) if args or kwargs else ((args,), (kwargs,))

    older._to_kwargs = move_if_any
    older.FSDPState._fsdp_param_groups = property(
        lambda state: [group for group in [state._fsdp_param_group] if group],
        lambda state, groups: setattr(state, "_fsdp_param_group", next(iter(groups), None)),
    )
    setattr(FSDPModule, "set_reduce_scatter_unused_params", lambda *_, **__: None)  # noqa: B010 - it lacks it


admit_older_fsdp()


class _Tokens:
    def __init__(self, first: int, count: int):
        self._first, self._count = first, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int):
        import torch

        generator = torch.Generator().manual_seed(self._first + index)
        start, stride = (int(n) for n in torch.randint(1, 256, (2,), generator=generator))
        return (start + stride * torch.arange(CONTEXT + 1)) % 256


@dataclass
class Numbers(elastic.Job):
    """Next-token prediction of arithmetic progressions modulo 256."""

    size: str = field(default="0.5M", metadata={"help": f"of the model: {', '.join(SIZES)}"})
    tied: bool = field(default=True, metadata={"help": "one tensor for the embedding and the head"})
    fails_once: str = field(default="", metadata={"help": "whoever removes this file raises an error in loss()"})

    def model(self):
        from jobs.gpt import GPT

        return GPT(SIZES[self.size], context=CONTEXT, dropout=0.1, tied=self.tied)

    tensor_plan = CodeGPT.tensor_plan
    stages = CodeGPT.stages

    def optimizer(self, model):
        import torch

        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train_data(self):
        return _Tokens(0, 4096)

    def eval_data(self):
        return _Tokens(10_000, 12)

    def loss(self, model, batch):
        from pathlib import Path

        from torch.nn import functional

        if self.fails_once and model.training:
            try:
                Path(self.fails_once).unlink()
            except FileNotFoundError:
                pass
            else:
                raise ValueError("planned")
        logits = model(batch[:, :-1])
        targets = batch[:, 1:].reshape(-1)
        total = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets, reduction="sum")
        return total, targets.numel(), {}


@dataclass
class Alternating(Numbers):
    """The same, with every other block of steps bare."""

    times: str = field(default="", metadata={"help": "file for the time of each step"})

    def eval_data(self):
        return None

    def model(self):
        from jobs.bench.overhead import alternate

        alternate(self.times)
        return super().model()
