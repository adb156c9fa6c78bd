"""How the members of one world communicate, and how blocked members are freed: the interface of a `Group`'s backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
import torch.distributed as dist

from elastic.errors import WorldBroken


class Backend(ABC):
    """The connections of one world's members.

    Args:
        world: name of the world, for texts.
        size: number of its members.
        device: device of the tensors.
        on_failure: called, from any thread, with an error that the backend finds by itself: a thread that waits in an
            operation may never see it.
    """

    #: Its name in torch.
    name: ClassVar[str]
    #: Whether operations of a freed world appear to succeed, with arbitrary results.
    leaves_garbage: ClassVar[bool] = False

    def __init__(self, world: str, size: int, device: torch.device, on_failure: Callable[[str], None]):
        self.world, self.size, self.device, self.on_failure = world, size, device, on_failure
        self.freed = False

    @staticmethod
    @abstractmethod
    def prepare(address: str) -> None:
        """Make the settings of a process whose node has this address, before its first world."""

    @abstractmethod
    def connecting(self) -> AbstractContextManager[None]:
        """Inside, groups are connected. `free` frees what connects here, and later what was connected here.

        Raises:
            WorldBroken: the world was freed.
        """

    @abstractmethod
    def open(self, store: dist.Store, timeout_s: float) -> None:
        """Connect the groups that torch has made since the last call, if making them has not done so. Called inside
        `connecting`, equally often by all members.

        Args:
            store: where the members of this world find each other.
            timeout_s: how long members wait for each other there.

        Raises:
            WorldBroken: the world was freed, or members did not come in time.
        """

    @abstractmethod
    def free(self) -> None:
        """Free every thread that waits in a group of this world, now or later. From any thread; returns at once."""

    @abstractmethod
    def has_failed(self) -> bool:
        """Whether an operation has failed."""

    def report(self) -> str:
        """What the backend knows of where all members are, as a text for people. May take seconds."""
        return ""

    @abstractmethod
    def close(self) -> None:
        """Drop all groups in torch's tables."""

    def broken(self) -> WorldBroken:
        """The error to raise when a freed world connects."""
        return WorldBroken(f"world {self.world} broke while its members connected")
