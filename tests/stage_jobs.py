"""A small job whose model is cut into the stages of a pipeline, with all that could make a bit depend on the cut."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.tiny_jobs import CLASSES, Plain

TOKENS = 16


@dataclass
class InStages(Plain):
    """Dropout, BatchNorm, a frozen layer, a parameter that is never used, two tensors between some layers, and an
    average of a parameter."""

    width: int = field(default=12, metadata={"help": "hidden units"})
    dropout: float = field(default=0.2, metadata={"help": "dropout"})
    wrong: str = field(default="", metadata={"help": "what is wrong with stages()"})

    def model(self):
        import torch
        from torch import nn
        from torch.nn import functional

        wrong = self.wrong

        class Block(nn.Module):
            def __init__(self, w: int, p: float):
                super().__init__()
                self.norm, self.up, self.down = nn.LayerNorm(w), nn.Linear(w, 4 * w), nn.Linear(4 * w, w)
                self.dropout, self.unused = nn.Dropout(p), nn.Parameter(torch.ones(3))

            def forward(self, x, start):
                return x + self.dropout(self.down(functional.gelu(self.up(self.norm(x)))) + 0.1 * start), start

        class First(nn.Module):
            def __init__(self, w: int):
                super().__init__()
                self.embed = nn.Embedding(TOKENS, w)

            def forward(self, tokens):
                x = self.embed(tokens)
                return x, x if wrong == "same" else x * 0.5

        class Pool(nn.Module):
            def __init__(self, w: int):
                super().__init__()
                self.batch_norm, self.fixed = nn.BatchNorm1d(w), nn.Linear(w, w).requires_grad_(False)

            def forward(self, x, start):
                return self.fixed(self.batch_norm((x + start).mean(1)))

        class Network(nn.Module):
            def __init__(self, w: int, p: float):
                super().__init__()
                self.first, self.blocks = First(w), nn.ModuleList(Block(w, p) for _ in range(4))
                self.pool, self.head = Pool(w), nn.Linear(w, CLASSES)
                if wrong == "tied":
                    self.blocks[1].up.weight = self.blocks[0].up.weight

            def forward(self, tokens):
                x, start = self.first(tokens)
                for block in self.blocks:
                    x, start = block(x, start)
                return self.head(self.pool(x, start)) * (2 if wrong == "more" else 1)

        return Network(self.width, self.dropout)

    def stages(self, model):
        found = [model.first, *model.blocks, model.pool, model.head]
        if self.wrong == "none":
            return None
        if self.wrong == "left out":
            return found[:-1]
        return [*found, model.head] if self.wrong == "twice" else found

    def tensor_plan(self):
        plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
        return {**plan, "blocks.*.norm": "sequence"} if self.wrong == "sequence" else plan

    def logits(self, model, features, ids):
        if self.wrong == "shapes" and model.training:
            features = features[:, : 5 + int(ids.min()) % 2]
        return model(((features + 1) * (TOKENS / 2)).long().clamp(0, TOKENS - 1))

    def optimizer(self, model):
        self.ema = model.blocks[2].up.weight.detach().clone()
        return super().optimizer(model)

    def after_step(self, model, step):
        self.ema.lerp_(model.blocks[2].up.weight.detach(), 0.25)
        super().after_step(model, step)

    def extra_state(self):
        return {"ema": self.ema}
