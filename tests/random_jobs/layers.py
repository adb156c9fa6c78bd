"""Layers that random models are made of. Each maps (N, w) to (N, w), `w` a multiple of four, and may look at the batch.

Named in `LAYERS`; how models use layers, rather than what they are, is in `tests.random_jobs.idioms`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

FEATURES, TOKENS, VOCABULARY, CLASSES = 6, 5, 11, 3

LAYERS: dict[str, Callable[[int], nn.Module]] = {}


class Inputs(NamedTuple):
    """What models are given of a batch: (N, FEATURES) floats, (N, T) tokens of which 0 is padding, (N,) lengths."""

    x: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor


def named(registry: dict[str, Callable[[int], nn.Module]], name: str) -> Callable[[Any], Any]:
    """Enter a class or function that makes a layer of a width."""

    def enter(make: Any) -> Any:
        assert name not in registry
        registry[name] = make
        return make

    return enter


class OfHidden(nn.Module):
    """Calls a module of torch's on the hidden values alone, as (N, *shape), and averages what is more than `w` wide."""

    def __init__(self, module: nn.Module, w: int, *shape: int):
        super().__init__()
        self.inner, self.w, self.shape = module, w, shape or (w,)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        out = self.inner(h.view(len(h), *self.shape))
        return (out[0] if isinstance(out, tuple) else out).reshape(len(h), -1, self.w).mean(1)


def _of_hidden(name: str, make: Callable[[int], nn.Module], shape: Callable[[int], tuple[int, ...]]) -> None:
    LAYERS[name] = lambda w: OfHidden(make(w), w, *shape(w))


def _flat(w: int) -> tuple[int, ...]:
    return (w,)


def _pairs(w: int) -> tuple[int, ...]:
    return (2, w // 2)


def _image(w: int) -> tuple[int, ...]:
    return (2, 2, w // 4)


def _narrow(w: int) -> tuple[int, ...]:
    return (4, w // 4)


for _name, _make, _shape in (
    ("linear", lambda w: nn.Sequential(nn.Linear(w, w), nn.GELU()), _flat),
    ("linear_no_bias", lambda w: nn.Sequential(nn.Linear(w, 2 * w, bias=False), nn.SiLU(), nn.Linear(2 * w, w)), _flat),
    ("inplace_relu", lambda w: nn.Sequential(nn.Linear(w, w), nn.ReLU(inplace=True), nn.Linear(w, w)), _flat),
    ("conv1d", lambda w: nn.Conv1d(1, 2, 3, padding=1), lambda w: (1, w)),
    ("conv1d_groups", lambda w: nn.Conv1d(2, 4, 3, padding=1, groups=2), _pairs),
    ("conv1d_circular", lambda w: nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), _pairs),
    ("conv2d", lambda w: nn.Conv2d(1, 3, 3, padding=1), lambda w: (1, 2, w // 2)),
    ("conv2d_depthwise", lambda w: nn.Conv2d(2, 2, 3, padding=1, groups=2, bias=False), _image),
    ("conv3d", lambda w: nn.Conv3d(1, 2, 3, padding=1), lambda w: (1, 2, 2, w // 4)),
    ("conv_transpose1d", lambda w: nn.ConvTranspose1d(2, 2, 2, stride=2), _pairs),
    ("conv_transpose2d", lambda w: nn.ConvTranspose2d(2, 2, (1, 2), stride=(1, 2)), _image),
    ("batchnorm", lambda w: nn.Sequential(nn.Linear(w, w), nn.BatchNorm1d(w), nn.ReLU()), _flat),
    ("batchnorm_first", lambda w: nn.BatchNorm1d(w), _flat),
    ("batchnorm_cumulative", lambda w: nn.BatchNorm1d(w, momentum=None), _flat),
    ("batchnorm_plain", lambda w: nn.Sequential(nn.BatchNorm1d(w, affine=False), nn.Linear(w, w)), _flat),
    ("batchnorm_untracked", lambda w: nn.BatchNorm1d(w, track_running_stats=False), _flat),
    ("batchnorm2d", lambda w: nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, momentum=0.3)), _image),
    ("layernorm", lambda w: nn.LayerNorm(w), _flat),
    ("layernorm_plain", lambda w: nn.Sequential(nn.LayerNorm(w, elementwise_affine=False), nn.Linear(w, w)), _flat),
    ("groupnorm", lambda w: nn.GroupNorm(2, w), _flat),
    ("instancenorm", lambda w: nn.InstanceNorm1d(2, affine=True), _pairs),
    ("instancenorm_tracked", lambda w: nn.InstanceNorm1d(2, affine=True, track_running_stats=True), _pairs),
    ("rmsnorm", lambda w: nn.RMSNorm(w), _flat),
    ("prelu", lambda w: nn.Sequential(nn.Linear(w, w), nn.PReLU(w)), _flat),
    ("rrelu", lambda w: nn.Sequential(nn.Linear(w, w), nn.RReLU()), _flat),
    ("pooled", lambda w: nn.Sequential(nn.Conv1d(2, 4, 1), nn.MaxPool1d(2)), _pairs),
    ("upsampled", lambda w: nn.Sequential(nn.Conv1d(2, 1, 1), nn.Upsample(scale_factor=2)), _pairs),
    ("pixel_shuffle", lambda w: nn.Sequential(nn.Conv2d(2, 4, 1), nn.PixelShuffle(2)), _image),
    ("dropout", lambda w: nn.Sequential(nn.Linear(w, w), nn.Dropout(0.2)), _flat),
    ("dropout1d", lambda w: nn.Sequential(nn.Linear(w // 2, w // 2), nn.Dropout1d(0.2)), _pairs),
    ("alpha_dropout", lambda w: nn.Sequential(nn.Linear(w, w), nn.SELU(), nn.AlphaDropout(0.1)), _flat),
    ("lstm", lambda w: nn.LSTM(w // 4, w, batch_first=True), _narrow),
    ("lstm_both_ways", lambda w: nn.LSTM(w // 4, w // 2, batch_first=True, bidirectional=True), _narrow),
    ("lstm_projected", lambda w: nn.LSTM(w // 4, w, proj_size=w // 2, batch_first=True), lambda w: (4, w // 4)),
    ("gru", lambda w: nn.GRU(w // 4, w, num_layers=2, dropout=0.1, batch_first=True), _narrow),
    ("rnn", lambda w: nn.RNN(w // 4, w, nonlinearity="relu", batch_first=True), _narrow),
    ("gru_cell", lambda w: nn.GRUCell(w, w), _flat),
    ("transformer", lambda w: nn.TransformerEncoderLayer(w // 2, 2, w, dropout=0.1, batch_first=True), _pairs),
    (
        "transformer_pre",
        lambda w: nn.TransformerEncoderLayer(w // 2, 2, w, 0.0, "gelu", batch_first=True, norm_first=True),
        _pairs,
    ),
    ("weight_norm", lambda w: parametrizations.weight_norm(nn.Linear(w, w)), _flat),
    ("spectral_norm", lambda w: parametrizations.spectral_norm(nn.Linear(w, w)), _flat),
    ("orthogonal", lambda w: parametrizations.orthogonal(nn.Linear(w, w, bias=False)), _flat),
    ("channels_last", lambda w: nn.Conv2d(2, 2, 3, padding=1).to(memory_format=torch.channels_last), _image),
):
    _of_hidden(_name, _make, _shape)


@named(LAYERS, "bilinear")
class Bilinear(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.product = nn.Bilinear(w, w, w)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.product(h.float(), torch.tanh(h).float())  # autocast leaves it alone


@named(LAYERS, "attention")
class Attention(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(w // 2, 2, batch_first=True)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        pairs = h.view(len(h), 2, -1)
        return self.attention(pairs, pairs, pairs, need_weights=False)[0].reshape(h.shape)


@named(LAYERS, "masked_attention")
class MaskedAttention(nn.Module):
    """Over the tokens, of which padding is masked out."""

    def __init__(self, w: int):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, w, padding_idx=0)
        self.attention = nn.MultiheadAttention(w, 2, dropout=0.1, batch_first=True)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        tokens = self.embed(inputs.tokens)
        return self.attention(h.unsqueeze(1), tokens, tokens, key_padding_mask=inputs.tokens == 0)[0].squeeze(1)


@named(LAYERS, "embedding")
class Embedding(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, w, padding_idx=0)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.table(inputs.tokens).sum(1) / inputs.lengths.unsqueeze(1)


@named(LAYERS, "sparse_embedding")
class SparseEmbedding(Embedding):
    def __init__(self, w: int):
        super().__init__(w)
        self.table = nn.Embedding(VOCABULARY, w, sparse=True)


@named(LAYERS, "by_frequency")
class ByFrequency(Embedding):
    """Gradients divided by how often a token occurs in the pass."""

    def __init__(self, w: int):
        super().__init__(w)
        self.table = nn.Embedding(VOCABULARY, w, scale_grad_by_freq=True)


@named(LAYERS, "embedding_bag")
class EmbeddingBag(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, w, mode="sum", padding_idx=0)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.bag(inputs.tokens)


@named(LAYERS, "packed_gru")
class PackedGRU(nn.Module):
    """Over the tokens, each sequence as long as it is."""

    def __init__(self, w: int):
        super().__init__()
        self.embed, self.gru = nn.Embedding(VOCABULARY, w // 2), nn.GRU(w // 2, w, batch_first=True)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            self.embed(inputs.tokens), inputs.lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        return self.gru(packed)[1][-1]


@named(LAYERS, "functional_dropout")
class FunctionalDropout(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.linear = nn.Linear(w, w)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return functional.dropout(self.linear(h), 0.2, self.training)


@named(LAYERS, "noise")
class Noise(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.scale = nn.Parameter(torch.full((w,), 0.1))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return h + self.scale * torch.randn_like(h) if self.training else h


@named(LAYERS, "gumbel")
class Gumbel(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.gate, self.values = nn.Linear(w, 4), nn.Parameter(torch.randn(4, w))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return functional.gumbel_softmax(self.gate(h), tau=2.0) @ self.values


@named(LAYERS, "low_rank")
class LowRank(nn.Module):
    """A parameter of three dimensions, of which the first is small."""

    def __init__(self, w: int):
        super().__init__()
        self.factors = nn.Parameter(torch.empty(2, w, 3))
        nn.init.xavier_uniform_(self.factors)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return torch.einsum("nw,wr,vr->nv", h, self.factors[0], self.factors[1])


@named(LAYERS, "cosine")
class Cosine(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(w, w)), nn.Parameter(torch.ones(1))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.scale * functional.linear(functional.normalize(h + 0.1), functional.normalize(self.weight))


@named(LAYERS, "swiglu")
class SwiGLU(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.both, self.down = nn.Linear(w, 2 * w + 2, bias=False), nn.Linear(w + 1, w, bias=False)
        nn.init.orthogonal_(self.down.weight)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        gate, value = self.both(h).chunk(2, 1)
        return self.down(functional.silu(gate) * value)


@named(LAYERS, "soft_experts")
class SoftExperts(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.gate, self.experts = nn.Linear(w, 3), nn.ModuleList(nn.Linear(w, w) for _ in range(3))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        shares = self.gate(h).softmax(1)
        return sum(shares[:, i : i + 1] * torch.tanh(expert(h)) for i, expert in enumerate(self.experts))  # type: ignore[return-value]


@named(LAYERS, "complex")
class Complex(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.turn = nn.Parameter(torch.randn(w // 2, dtype=torch.complex64))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        turned = torch.view_as_complex(h.reshape(len(h), -1, 2).contiguous()) * self.turn
        return torch.view_as_real(turned).reshape(h.shape)


@named(LAYERS, "double")
class Double(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(w, dtype=torch.float64))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return (h.double() * self.scale).sin().to(h.dtype)


@named(LAYERS, "scalar")
class Scalar(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.linear, self.temperature = nn.Linear(w, w), nn.Parameter(torch.tensor(0.7))

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.linear(h) * self.temperature


@named(LAYERS, "transposed")
class Transposed(nn.Module):
    def __init__(self, w: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(w // 2, w).t() * 0.3)

    def forward(self, h: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return torch.tanh(h @ self.weight) @ self.weight.t()


class _Symmetric(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


@named(LAYERS, "symmetric")
def symmetric(w: int) -> nn.Module:
    """A parametrization of the job's own."""
    linear = nn.Linear(w, w)
    parametrize.register_parametrization(linear, "weight", _Symmetric())
    return OfHidden(linear, w)


@named(LAYERS, "old_weight_norm")
def old_weight_norm(w: int) -> nn.Module:
    return OfHidden(nn.utils.weight_norm(nn.Linear(w, w)), w)


@named(LAYERS, "old_spectral_norm")
def old_spectral_norm(w: int) -> nn.Module:
    return OfHidden(nn.utils.spectral_norm(nn.Linear(w, w)), w)


@named(LAYERS, "lazy")
def lazy(w: int) -> nn.Module:
    return OfHidden(nn.LazyLinear(w), w)
