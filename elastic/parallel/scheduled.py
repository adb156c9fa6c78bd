"""A stage of `torch.distributed.pipelining` whose layers are not in it, and which tells what its schedule runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage

from elastic.errors import ConfigError

_OTHER_SHAPES = (
    "all microbatches must make activations of one shape between the stages, but {} returns {} for one and {} for "
    "another; pad samples to one length in collate_fn(), or leave --parallel.pipeline out"
)
_NO_TENSORS = (
    "{} of stages() is called with, or returns, something that is no tensor, so it cannot be sent to the next stage; "
    "let it take and return tensors"
)


class Body(nn.Module):
    """What torch's stage calls in a forward pass. The layers are no modules of it, so torch leaves them alone."""

    def __init__(self, call: Callable[..., Any]):
        super().__init__()
        self._call = call

    def forward(self, *inputs: Any) -> Any:
        return self._call(*inputs)


class Stage(PipelineStage):
    """Tells which microbatch is run, and when its backward pass is over.

    Attributes:
        lacks_gradients: whether any backward pass made no gradient of an input, for which torch sends zeros.
    """

    before: Callable[[int], None]
    behind: Callable[[int], None]
    lacks_gradients = False

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **named: Any) -> Any:
        self.before(fwd_chunk_id)
        return super().forward_one_chunk(fwd_chunk_id, *arguments, **named)

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **named: Any) -> None:
        needed = [one.requires_grad for one in self.fwd_cache[bwd_chunk_id][1]]  # torch detaches them afterwards
        super().backward_one_chunk(bwd_chunk_id, *arguments, **named)
        if not self.is_first:
            pairs = zip(needed, self.bwd_cache[bwd_chunk_id], strict=True)
            self.lacks_gradients |= any(needs and gradient is None for needs, gradient in pairs)
        self.behind(bwd_chunk_id)


def to_send(found: tuple[Any, ...], name: str, shapes: list[tuple[int, ...]] | None) -> tuple[torch.Tensor, ...]:
    """What the layer of this name returned, as it is sent to the next stage.

    Args:
        shapes: those of the first microbatch; None for that one itself.

    Raises:
        ConfigError: it is no tensor, or has another shape than that of the first microbatch.
    """
    if not all(isinstance(one, torch.Tensor) for one in found):
        raise ConfigError(_NO_TENSORS.format(name))
    if shapes is not None and (now := shapes_of(found)) != shapes:
        raise ConfigError(_OTHER_SHAPES.format(name, shapes, now))
    return tuple(one.contiguous() for one in found)


def shapes_of(tensors: tuple[torch.Tensor, ...]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors]
