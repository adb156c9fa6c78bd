"""How the members of one world communicate, and how who waits for them is freed: what a `Group` asks of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar

import torch

from elastic.errors import WorldBroken


class Backend(ABC):
    """The connections of one world's members.

    Args:
        world: its name, for people.
        size: its members.
        device: where the tensors lie.
        on_failure: told what the backend finds wrong by itself, from any thread; a thread that waits may never hear.
    """

    #: Under which torch knows it.
    name: ClassVar[str]
    #: Whether operations of a freed world seem to succeed, and anything may come of what they left.
    leaves_garbage: ClassVar[bool] = False

    def __init__(self, world: str, size: int, device: torch.device, on_failure: Callable[[str], None]):
        self.world, self.size, self.device, self.on_failure = world, size, device, on_failure
        self.freed = False

    @staticmethod
    @abstractmethod
    def prepare(address: str) -> None:
        """Settings of a process whose node has this address, before its first world."""

    @abstractmethod
    def connecting(self) -> AbstractContextManager[None]:
        """`free` holds for whatever connects in here, and for what was connected in here later.

        Raises:
            WorldBroken: it was freed.
        """

    @abstractmethod
    def open(self) -> None:
        """Connect the groups that torch has made since this was last called, where making them has not. Inside of
        `connecting`.

        Raises:
            WorldBroken: it was freed.
        """

    @abstractmethod
    def free(self) -> None:
        """Let go whoever waits in a group of this world, now or later. From any thread; returns at once."""

    @abstractmethod
    def has_failed(self) -> bool:
        """Whether an operation has failed."""

    def report(self) -> str:
        """What the backend itself knows of where all members are, for people. May take seconds."""
        return ""

    @abstractmethod
    def close(self) -> None:
        """Drop all groups that torch knows."""

    def broken(self) -> WorldBroken:
        """What is raised where a freed world connects."""
        return WorldBroken(f"world {self.world} broke while its members connected")
