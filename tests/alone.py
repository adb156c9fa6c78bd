"""A world of one that needs no process group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from elastic.checkpoint.format import Manifest
from elastic.config import CheckpointOptions
from elastic.parallel.layout import Layout
from elastic.storage import Storage
from elastic.worker import ladder
from elastic.worker.state import TrainState


class NoSnapshots:
    on = False

    def find(self, group: Any) -> tuple[list[Any], str]:
        return [], ""


@dataclass
class Restore:
    step: int | None = None


@dataclass
class Assignment:
    restore: Restore = field(default_factory=Restore)


@dataclass
class AloneGroup:
    rank: int = 0
    place: int = 0
    leads: bool = True
    layout: Layout = field(default_factory=lambda: Layout(1, 1, (0,)))
    assignment: Assignment = field(default_factory=Assignment)

    def gather_json(self, value: Any) -> list[Any]:
        return [value]

    def send_json(self, value: Any, source: int) -> Any:
        return value


def restore_newest(state: TrainState, storage: Storage, link: Any, *, convert: bool) -> Manifest | None:
    """The newest checkpoint that can be loaded, put into the state; None: a fresh start."""
    options, group, none = CheckpointOptions(convert=convert), AloneGroup(), NoSnapshots()
    return ladder.descend(group, lambda fill: state, options, storage, link, none, None).manifest  # type: ignore[arg-type]
