"""Which modules of a model are in training mode and which are in evaluation mode, as the job has set them."""

from __future__ import annotations

from torch import nn


def begin(model: nn.Module) -> None:
    """Ask modules whose classes have a train() of their own, once, for the mode that they are in: as a training loop's
    `model.train()` does, by which many keep normalisation layers in evaluation mode."""
    for module in model.modules():  # those above come first
        if type(module).train is not nn.Module.train:
            module.train(module.training)


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
