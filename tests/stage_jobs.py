"""A small job whose model is cut into the stages of a pipeline, with all that could make a bit depend on the cut."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.tiny_jobs import CLASSES, FEATURES, Plain

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


#: What a step takes that shows each kind of `Beside` to be another model than its layers.
BESIDE = {
    "no_grad": "gradient of embed.weight",
    "detach": "gradient of embed.weight",
    "detached inside": "gradient of embed.weight",
    "unused output": "gradient of embed.side.weight",
    "left behind": "loss",
    "hooked": "loss",
    "forward's buffer": "buffer centre",
    "loss's buffer": "buffer centre",
    "grows": "loss",
}


@dataclass
class Beside(Plain):
    """A chain of layers, and something that `forward()`, `loss()` or a layer does beside it."""

    kind: str = field(
        default="", metadata={"help": "one of BESIDE, or a penalty, metric, 1-tuple, written to, frozen or writes late"}
    )

    def model(self):
        import torch
        from torch import nn

        kind = self.kind

        class Embed(nn.Linear):
            def __init__(self, w: int):
                super().__init__(FEATURES, w)
                self.side = nn.Linear(FEATURES, w) if kind == "unused output" else None

            def forward(self, x):
                return super().forward(x) if self.side is None else (super().forward(x), self.side(x))

        class Block(nn.Linear):
            step = 0

            def forward(self, x, *side):
                if kind == "writes late" and self.step == 15:
                    self.weight.data.mul_(1.5)
                found = x + torch.tanh(super().forward(torch.relu_(x) if kind == "written to" else x))
                self.left = found.square().mean()
                return (found, *side) if side else found

        class Head(nn.Linear):
            def forward(self, x, *_):
                found = super().forward(x.detach() if kind == "detached inside" else x)
                return (found,) if kind == "1-tuple" else found

        class Chain(nn.Module):
            def __init__(self, w: int):
                super().__init__()
                self.embed, self.head, self.step = Embed(w), Head(w, CLASSES), 0
                self.blocks = nn.ModuleList(Block(w, w) for _ in range(3))
                self.register_buffer("centre", torch.zeros(CLASSES))
                if kind == "frozen":
                    self.head.requires_grad_(False)
                    self.blocks[1:].requires_grad_(False)

            def forward(self, x):
                with torch.set_grad_enabled(torch.is_grad_enabled() and kind != "no_grad"):
                    x = self.embed(x)
                for block in self.blocks[: 2 if kind == "grows" and self.step > 1 else None]:
                    x = block(*(x if isinstance(x, tuple) else (x,)))
                    x = x.detach() if kind == "detach" and block is self.blocks[0] else x
                x = self.head(*(x if isinstance(x, tuple) else (x,)))
                if kind == "forward's buffer" and self.training:
                    self.centre.lerp_(x.detach().mean(0), 0.1)
                return x

        return Chain(self.width)

    def stages(self, model):
        return [model.embed, *model.blocks, model.head]

    def after_step(self, model, step):
        model.step = model.blocks[0].step = step

    def logits(self, model, features, ids):
        found = model(features)
        return found[0] if self.kind == "1-tuple" else found

    def loss(self, model, batch):
        got = []
        handle = model.blocks[0].register_forward_hook(lambda *found: got.append(found[-1]))
        try:
            total, weight, metrics = super().loss(model, batch)
        finally:
            handle.remove()
        if self.kind == "left behind":
            total = total + sum(block.left for block in model.blocks)
        elif self.kind == "hooked":
            total = total + sum(one.square().sum() for one in got)
        elif self.kind == "penalty":
            total = total + sum(m.weight.square().sum() for m in model.modules() if hasattr(m, "weight"))
        elif self.kind == "metric":
            metrics["norm"] = float(model.embed.weight.detach().norm()) * weight
        elif self.kind == "loss's buffer" and model.training:
            model.centre.add_(1)
        return total, weight, metrics
