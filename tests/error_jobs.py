"""Jobs whose data, forward or backward passes go wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass, field

from tests.tiny_jobs import Plain, Samples


def _raise(text: str) -> None:
    raise RuntimeError(text)


def _corrupt(text: str) -> None:
    raise ValueError(text)


def _hold(file: str) -> None:
    while os.path.exists(file):
        time.sleep(0.01)


def _die_once(file: str) -> None:
    if os.path.exists(file):
        os.unlink(file)
        os.kill(os.getpid(), signal.SIGKILL)


def _die(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ITEM_FAULTS = {"raise": _raise, "corrupt": _corrupt, "hold": _hold, "die-once": _die_once, "die": _die}


class FaultySamples(Samples):
    """`Samples` of which one does not come as it should."""

    def __init__(self, count: int, fault: str, at: int, text: str):
        super().__init__(count)
        self.fault, self.at, self.text = fault, at, text

    def __getitem__(self, index: int):
        if index == self.at:
            ITEM_FAULTS[self.fault](self.text)
        return super().__getitem__(index)


@dataclass
class Items(Plain):
    """One item raises, waits, or ends its process."""

    fault: str = field(default="corrupt", metadata={"help": "what the item at fault_at does"})
    only_in: str = field(default="", metadata={"help": "a process whose environment has this variable does it"})

    def train_data(self):
        if self.only_in and self.only_in not in os.environ:
            return Samples(self.samples)
        return FaultySamples(self.samples, self.fault, self.fault_at, self.fault_file)

    def loss(self, model, batch):
        features, labels, _ = batch
        return super().loss(model, (features, labels, labels * 0 - 2))


@dataclass
class Backward(Plain):
    """The backward pass of one sample's microbatch raises, in words that sound like the network."""

    text: str = field(default="connection reset by peer: nccl, gloo, store", metadata={"help": "what it says"})

    def logits(self, model, features, ids):
        import torch

        text, logits = self.text, model(features)

        class Broken(torch.autograd.Function):
            @staticmethod
            def forward(context, values):
                return values.clone()

            @staticmethod
            def backward(context, gradient):
                raise RuntimeError(text)

        return Broken.apply(logits) if model.training and (ids == self.fault_at).any() else logits


@dataclass
class OnOneNode(Plain):
    """What goes wrong only in processes whose environment names it, or in the first that comes to it."""

    marker: str = field(default="", metadata={"help": "who removes this file has no data"})

    def train_data(self):
        if self.marker:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.marker)
                raise OSError("/data/train is not mounted here")
        return Samples(self.samples + ("MORE_DATA" in os.environ))

    def loss(self, model, batch):
        if "SICK" in os.environ and model.training:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        return super().loss(model, batch)
