"""Sends the rows of a step's record inside DDP's own sum of gradients, so that they cost no message of their own.

The rows of all ranks are the gradient of one more parameter. Each rank gives its own rows and zeros for the others', so
the sum has the rows of all. A whole number of 64 bits travels as four of 16 bits, each as a float32.

The result is exact. DDP multiplies by the reciprocal of the number of ranks; adding zeros changes nothing; multiplying
by the number of ranks again is wrong by at most 2^15 * 2^-22, which rounding to a whole number takes away.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

_PIECES = 4  # of 16 bits, in a number of 64
_COLUMNS = 24  # for which there is room in a row besides the mask of buffers
_MOST_BYTES = 1 << 18  # of larger records the rows of all ranks are gathered: that sends a quarter of the bytes


class Carrier(nn.Module):
    """A parameter for the rows of all ranks. Put it after the model under DDP: gradients come in reverse order.

    Args:
        ranks, rank: the number of ranks, and which one this process is.
        height: the most rows of a rank.
        mask_words: columns for the mask of buffers.
        rounds: gradients are sent in a shorter format, so rows cannot travel with them.
    """

    def __init__(self, ranks: int, rank: int, height: int, mask_words: int, device: torch.device, *, rounds: bool):
        super().__init__()
        columns = _PIECES * (_COLUMNS + mask_words)
        small = 4 * ranks * height * columns <= _MOST_BYTES
        self._ranks, self._columns = ranks, columns if small and not rounds else 0
        shape = (ranks, height, self._columns) if self._columns else (1, 1, 1)  # DDP needs a gradient all the same
        self.rows = nn.Parameter(torch.zeros(shape, device=device))
        self._given = torch.zeros(shape, device=device)  # the gradient: other ranks' rows stay zero
        self._own = self._given[rank if self._columns else 0]

    def has_room(self, mine: torch.Tensor) -> bool:
        """Whether rows of this shape can be loaded: the same on all ranks."""
        return mine.shape[1] * _PIECES <= self._columns

    def load(self, mine: torch.Tensor) -> Callable[[], np.ndarray]:
        """Send these rows with the gradients of the pass whose forward pass ran last.

        Args:
            mine: of this rank, int64 [rows, columns], as many on every rank; `has_room` holds.

        Returns:
            a function that returns the rows of all ranks after the backward pass, int64 [ranks, rows, columns].
        """
        pieces = mine.view(torch.int16)
        self._own[:, : pieces.shape[1]].copy_(pieces)
        return partial(self._unload, pieces.shape[1])

    def forward(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the same loss. In its backward pass the rows that were loaded get their sum.

        A loss that depends on no parameter has a backward pass then, too, in which DDP's hooks run.
        """
        self.rows.grad = None
        found: torch.Tensor = _Carry.apply(loss, self.rows, self._given)
        return found

    def _unload(self, count: int) -> np.ndarray:
        total = self.rows.grad
        assert total is not None, "DDP has not summed the gradients"
        with np.errstate(all="ignore"):  # of an aborted group anything may come, which the caller drops
            pieces = np.rint(total.cpu().numpy()[:, :, :count] * self._ranks)
            return pieces.astype(np.int16).view(np.int64)


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, rows: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        ctx.given = given
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return gradients[0], ctx.given, None
