"""What is used of torch's Muon beyond its public interface: the product over a whole matrix in its update.

Read in torch 2.13; torch has Muon since 2.9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import _muon as _of_torch

_muon: Any = _of_torch

Product = Callable[[torch.Tensor, tuple[float, float, float], int, float], torch.Tensor]

product: Product = _muon._zeropower_via_newtonschulz
"""Orthogonalise a matrix: bfloat16, of its shape. From the matrix, coefficients, number of iterations, and epsilon."""


@contextmanager
def replaced(by: Product) -> Iterator[None]:
    """Inside, Muon's updates use this in place of `product`."""
    _muon._zeropower_via_newtonschulz = by
    try:
        yield
    finally:
        _muon._zeropower_via_newtonschulz = product
