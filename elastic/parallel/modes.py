"""Which modules of a model are in training mode and which in evaluation mode, as the job has set them."""

from __future__ import annotations

from torch import nn


def begin(model: nn.Module) -> None:
    """Call train() once on modules whose classes override it, with their present mode, as `model.train()` in a training
    loop does: many classes use it to keep normalisation layers in evaluation mode."""
    for module in model.modules():  # parents come first
        if type(module).train is not nn.Module.train:
            module.train(module.training)


def of(model: nn.Module) -> dict[str, bool]:
    """The mode of each module by name ("" is the model itself): True for training mode."""
    return {name: module.training for name, module in model.named_modules()}


def restore(model: nn.Module, wanted: dict[str, bool]) -> None:
    """Put every module back into its mode. Modules that `wanted` does not name keep their mode, or follow their
    parents.

    The mode is changed by calling train(), since modules may do more than change a flag: adapters are merged into
    weights in evaluation mode.
    """
    for name, module in model.named_modules():  # parents come first
        if wanted.get(name, module.training) != module.training:
            module.train(wanted[name])
