"""Which modules of a model are in training mode and which are in evaluation mode, as the job has set them."""

from __future__ import annotations

from torch import nn


def of(model: nn.Module) -> dict[str, bool]:
    """Of each module by name ("" is the model itself): is it in training mode?"""
    return {name: module.training for name, module in model.named_modules()}


def restore(model: nn.Module, wanted: dict[str, bool]) -> None:
    """Put every module back into its mode. Modules without one in `wanted` stay as they are, or follow those above.

    Modules may do more than change a flag (adapters are merged into weights in evaluation mode): so they are asked.
    """
    for name, module in model.named_modules():  # those above come first
        if wanted.get(name, module.training) != module.training:
            module.train(wanted[name])
