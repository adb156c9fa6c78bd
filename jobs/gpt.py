"""A small GPT over bytes: pre-norm, rotary positions, causal attention, tied embeddings unless told otherwise.

Radford et al., "Language models are unsupervised multitask learners" (2019), with rotary positions (Su et al.,
"RoFormer", 2021) in place of learned ones and without biases.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from jobs.gpt_sizes import Shape

VOCABULARY = 256  # every byte is a token


class Block(nn.Module):
    """Attention and a feed-forward layer, each normalised before and added after."""

    def __init__(self, shape: Shape, dropout: float):
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """(batch, length, width) to the same; `rotation` is what `rotations` returns for this length, if somebody has
        called it."""
        if rotation is None:
            rotation = rotations(x.shape[1], x.shape[2] // self.heads, x.device)
        x = x + self.dropout(self.attend(self.norm_attention(x), rotation))
        return x + self.dropout(self.mlp_out(functional.gelu(self.mlp_in(self.norm_mlp(x)))))

    def attend(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        batch, length, width = x.shape
        # head after head, so that any whole heads, as tensor parallelism leaves them here, are neighbours
        qkv = self.attention_in(x).view(batch, length, -1, 3, width // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        q, k = rotate(q, rotation), rotate(k, rotation)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attention_out(out.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """Predicts the next byte.

    Args:
        context: most bytes that a prediction looks back on; what the model is trained on, and a limit of `generate`.
        dropout: share dropped of the embeddings and of what each half of a block adds.
        tied: the weights of the embedding predict bytes too; otherwise a head of its own does.
    """

    def __init__(self, shape: Shape, *, context: int, dropout: float = 0.0, tied: bool = True):
        super().__init__()
        if shape.width % (2 * shape.heads):
            raise ValueError(f"width {shape.width} does not give {shape.heads} heads an even number of channels each")
        self.context = context
        self.head_width = shape.width // shape.heads
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width, bias=False)
        self.head = None if tied else nn.Linear(shape.width, VOCABULARY, bias=False)
        self.apply(_initialise)
        for name, parameter in self.named_parameters():
            # 2 * layers branches add to the residual stream: scaled so that its variance does not grow with depth.
            if name.endswith(("attention_out.weight", "mlp_out.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.layers))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (batch, length, 256) of the byte after each of `tokens`, int64 (batch, length)."""
        rotation = rotations(tokens.shape[1], self.head_width, tokens.device)
        x = self.dropout(self.embedding(tokens))
        for block in self.blocks:
            x = block(x, rotation)
        x = self.norm(x)
        return functional.linear(x, self.embedding.weight) if self.head is None else self.head(x)


def rotations(length: int, head_width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary positions 0 to length - 1, float32 (length, head_width / 2) each.

    Computed in each forward pass, once for all layers: a buffer would have to be left out of state_dict and made
    again after a move from the meta device, and these are a few thousand numbers.
    """
    channels = torch.arange(0, head_width, 2, device=device, dtype=torch.float32)
    frequencies = torch.exp(channels * (-math.log(10_000.0) / head_width))
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn channel i of each head against channel i + head_width / 2. Same shape and dtype as `x`."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)


@torch.no_grad()
def generate(model: GPT, prompt: bytes, n: int, *, temperature: float = 0.0, seed: int = 0) -> bytes:
    """The `n` bytes that the model puts after a prompt of at least one byte.

    Args:
        temperature: 0 takes the likeliest byte each time; above 0 draws, by `seed` alone.
    """
    if not prompt:
        raise ValueError("generate() needs a prompt of at least one byte to predict from")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)  # on the CPU: draws do not depend on the device's generator
    tokens = list(prompt)
    was_training = model.training
    model.eval()
    try:
        for _ in range(n):
            seen = torch.tensor([tokens[-model.context :]], device=device)
            logits = model(seen)[0, -1].float().cpu()
            if temperature > 0:
                tokens.append(int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator)))
            else:
                tokens.append(int(logits.argmax()))
    finally:
        model.train(was_training)
    return bytes(tokens[len(prompt) :])
