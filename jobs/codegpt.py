"""A byte-level GPT on the Python standard library's own sources: needs no download, learns visibly in two minutes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import elastic
from elastic import BatchOptions, CheckpointOptions, EvalOptions, OptimOptions, RunOptions, TrainConfig
from elastic.errors import CheckpointError, ConfigError
from jobs.gpt_sizes import SIZES

CONFIG = TrainConfig(
    run=RunOptions(duration="1000st"),
    batch=BatchOptions(global_size=16, microbatches=8),
    optim=OptimOptions(schedule="cosine", warmup="75st", clip_norm=1.0),
    eval=EvalOptions(every="250st"),
    checkpoint=CheckpointOptions(every="250st"),
)


@dataclass
class CodeGPT(elastic.Job):
    """Train a byte-level GPT on the sources of Python's standard library."""

    size: str = field(default="0.5M", metadata={"help": f"parameters: {', '.join(SIZES)}"})
    block: int = field(default=128, metadata={"help": "bytes of context, and of one sample"})
    lr: float = field(default=4e-3, metadata={"help": "learning rate of AdamW; 6e-4 suits 25M and more"})
    weight_decay: float = field(default=0.1, metadata={"help": "weight decay of matrices"})
    dropout: float = field(default=0.0, metadata={"help": "dropout of embeddings and residual branches"})
    tied: bool = field(
        default=True, metadata={"help": "predict bytes with the embedding's weights; --parallel.pipeline needs no-tied"}
    )
    eval_blocks: int = field(default=512, metadata={"help": "most held-out blocks of one evaluation"})

    def __post_init__(self):
        if self.size not in SIZES:
            raise ConfigError(f"--job.size is {self.size!r}; choose one of {', '.join(SIZES)}")
        for name, value in (("block", self.block), ("eval-blocks", self.eval_blocks)):
            if value < 1:
                raise ConfigError(f"--job.{name} is {value}; give at least 1")
        self.tokens_per_sample = self.block

    def model(self):
        from jobs.gpt import GPT

        return GPT(SIZES[self.size], context=self.block, dropout=self.dropout, tied=self.tied)

    def tensor_plan(self):
        """Whole heads of attention, and parts of the feed-forward layer, on each worker of a cell."""
        return {
            "blocks.*.attention_in": "colwise",
            "blocks.*.attention_out": "rowwise",
            "blocks.*.mlp_in": "colwise",
            "blocks.*.mlp_out": "rowwise",
        }

    def stages(self, model):
        """What `forward` calls one after another; with tied weights the first and the last are one parameter."""
        return None if self.tied else [model.embedding, model.dropout, *model.blocks, model.norm, model.head]

    def optimizer(self, model):
        import torch

        matrices = [p for p in model.parameters() if p.dim() >= 2]
        gains = [p for p in model.parameters() if p.dim() < 2]  # decay would pull normalisation towards zero
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": gains, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))

    def train_data(self):
        from jobs.corpus import Blocks, standard_library

        return Blocks(standard_library().train, self.block)

    def eval_data(self):
        from jobs.corpus import Blocks, standard_library

        return Blocks(standard_library().held_out, self.block, limit=self.eval_blocks)

    def collate_fn(self, samples):
        """Contexts and the bytes to predict, int64 (samples, block) each."""
        import numpy as np
        import torch

        blocks = torch.from_numpy(np.asarray(samples).astype(np.int64))
        return blocks[:, :-1].contiguous(), blocks[:, 1:].contiguous()

    def loss(self, model, batch):
        """Cross entropy in nats summed over all bytes; the weight is their number."""
        from torch.nn import functional

        contexts, targets = batch
        nats = functional.cross_entropy(model(contexts).flatten(0, 1), targets.flatten(), reduction="sum")
        return nats, targets.numel(), {"bits_per_byte": nats.detach() / math.log(2)}

    def extra_state(self):
        from jobs.corpus import standard_library

        return {"corpus_sha256": standard_library().sha256}

    def load_extra_state(self, values):
        mine, saved = self.extra_state()["corpus_sha256"], values.get("corpus_sha256")
        if saved != mine:
            raise CheckpointError(
                f"the run was trained on a standard library with sha256 {saved}, but this Python's has {mine}; "
                "resume it with the Python it was started with, or start another run"
            )

    def sample(self, model, step):
        from jobs.gpt import generate

        prompt = b"def "
        return (prompt + generate(model, prompt, 240, temperature=0.7)).decode("utf-8", "replace")


if __name__ == "__main__":
    elastic.main(CodeGPT, CONFIG)
