"""Named sizes of `jobs.gpt`, apart from it so that a command line can list them without importing torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """What decides the number of parameters: about 12 * layers * width**2 + 256 * width."""

    layers: int
    width: int
    heads: int


#: A name is the number of parameters to within 10 %.
SIZES = {
    "0.5M": Shape(layers=4, width=96, heads=3),
    "2M": Shape(layers=6, width=160, heads=5),
    "5M": Shape(layers=6, width=256, heads=8),
    "10M": Shape(layers=6, width=384, heads=6),
    "25M": Shape(layers=8, width=512, heads=8),
    "50M": Shape(layers=10, width=640, heads=10),
    "124M": Shape(layers=10, width=1024, heads=16),
}
