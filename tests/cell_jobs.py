"""A small job whose model is cut over the workers of a cell, with all that could make a bit depend on their number."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.tiny_jobs import CLASSES, FEATURES, Plain

TOKENS = 16


@dataclass
class InCells(Plain):
    """An embedding tied with the head, dropout where activations are whole and where they are cut, a parameter that
    is never used, a frozen one, BatchNorm, and an average of a parameter that is cut."""

    width: int = field(default=12, metadata={"help": "hidden units"})
    plan: str = field(default="tensor", metadata={"help": "tensor, or sequence, or what is wrong with it"})
    dropout: float = field(default=0.2, metadata={"help": "dropout"})

    blocks = ("Block",)

    def model(self):
        import torch
        from torch import nn
        from torch.nn import functional

        sequence, heads = self.plan == "loose", 3 if self.plan == "heads" else None

        class Block(nn.Module):
            def __init__(self, w: int, p: float):
                super().__init__()
                self.norm = nn.LayerNorm(w)
                self.up, self.down = nn.Linear(w, 4 * w), nn.Linear(4 * w, w)
                self.inside, self.after = nn.Dropout(p), nn.Dropout(p)
                if sequence:
                    self.gain = nn.Parameter(torch.ones(w))

            def forward(self, x):
                h = functional.gelu(self.up(self.norm(x)))
                if heads is not None:  # as attention would have it
                    h = h.view(*h.shape[:-1], -1, 4 * x.shape[-1] // heads).flatten(-2)
                h = self.after(self.down(self.inside(h)))
                return x + (h * self.gain if sequence else h)

        class Network(nn.Module):
            def __init__(self, w: int, p: float):
                super().__init__()
                self.embed, self.head = nn.Embedding(TOKENS, w), nn.Linear(w, TOKENS, bias=False)
                self.head.weight = self.embed.weight
                self.dropout = nn.Dropout(p)
                self.layers = nn.ModuleList(Block(w, p) for _ in range(2))
                self.norm = nn.LayerNorm(w)
                self.batch_norm = nn.BatchNorm1d(TOKENS)
                self.fixed = nn.Linear(TOKENS, TOKENS).requires_grad_(False)
                self.unused = nn.Linear(w, 5)
                self.last = nn.Linear(TOKENS, CLASSES)

            def forward(self, features):
                x = self.dropout(self.embed(((features + 1) * (TOKENS / 2)).long().clamp(0, TOKENS - 1)))
                for layer in self.layers:
                    x = layer(x)
                return self.last(self.fixed(self.batch_norm(self.head(self.norm(x)).mean(1))))

        return Network(self.width, self.dropout)

    def tensor_plan(self):
        plan = {
            "embed": "rowwise",
            "layers.*.up": "colwise",
            "layers.*.down": "rowwise",
            "head": "colwise_gather_output",
        }
        if self.plan in ("sequence", "loose"):
            plan |= {"layers.*.norm": "sequence", "norm": "sequence"}
        if self.plan == "late":
            plan |= {"layers.*.norm": "sequence"}
            del plan["embed"], plan["head"]
        if self.plan == "misnamed":
            plan |= {"layers.*.out": "rowwise"}
        if self.plan == "untied":
            del plan["head"]
        return {} if self.plan == "none" else plan

    def optimizer(self, model):
        self.ema, self.updates = model.layers[0].up.weight.detach().clone(), 0
        return super().optimizer(model)

    def after_step(self, model, step):
        self.ema.lerp_(model.layers[0].up.weight.detach(), 0.25)
        self.updates += 1
        super().after_step(model, step)

    def extra_state(self):
        return {"ema": self.ema, "updates": self.updates}

    def load_extra_state(self, values):
        self.updates = values["updates"]


assert FEATURES % 2 == 0, "the sequence is cut in halves"
