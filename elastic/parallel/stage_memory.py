"""How much memory a worker needs with so many stages of a pipeline, estimated, and the fewest stages that fit. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.parallel.stages import cut
from elastic.placement import pipelines


@dataclass(frozen=True)
class LayerSize:
    """What a layer takes; bytes.

    Args:
        cost: for `cut`.
        kept: what it keeps of a microbatch for its backward pass.
        parameters: those of this layer.
        trained: those of them that get a gradient.
    """

    cost: int
    kept: int
    parameters: int
    trained: int


@dataclass(frozen=True)
class ModelSize:
    """What a model takes; bytes.

    Args:
        state: parameters, and what the optimizer keeps.
        layers: in order.
    """

    state: int
    layers: Sequence[LayerSize]

    @property
    def trained(self) -> int:
        return sum(one.trained for one in self.layers)


def need(size: ModelSize, cells: int, least: int, strategy: str, microbatches: int) -> int:
    """Bytes that a worker needs at the fullest moment of a step, with cells of one worker: the most of `needs`."""
    return max(needs(size, cells, least, strategy, microbatches))


def needs(size: ModelSize, cells: int, least: int, strategy: str, microbatches: int) -> list[int]:
    """Bytes that a worker of each stage needs at the fullest moment of a step; one number without pipelines.

    Counted is its part of the state, with the parameters of its stage, and the most of

    * the passes: the gradients of a microbatch and the partial sums of them (one for each level of the tree), and what
      the layers keep of all microbatches under way;
    * a world's first passes: the partial sums before the last microbatch's gradients, these, and a copy of them;
    * the comparison with the whole model: the sums of the stage's gradients and a copy of those of one microbatch, what
      all layers keep of one microbatch, and the largest layer and its gradients gathered;
    * the sums over pipelines: the stage's gradients, and its rows of all.

    Args:
        least: the fewest stages of a pipeline; 1 without pipelines.
        strategy: ddp or fsdp.
        microbatches: V.
    """
    count, each = pipelines(cells, least, len(size.layers))
    runs = -(-microbatches // count)  # microbatches of a pipeline, or of a worker
    sums, parts = runs.bit_length(), runs.bit_count()  # of gradients: before the last microbatch's is added, and then
    kept, largest = sum(one.kept for one in size.layers), max(one.parameters + one.trained for one in size.layers)
    if least == 1:
        shards = cells if strategy == "fsdp" else 1
        held = (size.state + (2 + sums) * size.trained) // shards
        return [held + kept + (largest if strategy == "fsdp" else 0)]
    shards = each * count if strategy == "fsdp" else each
    found = []
    for stage, run in enumerate(cut([one.cost for one in size.layers], each)):
        mine = [size.layers[i] for i in run]
        under_way = min(runs, each - stage) if runs >= each else runs  # of 1F1B, or of GPipe
        gradients = sum(one.trained for one in mine)
        passes = sums * gradients + under_way * sum(one.kept for one in mine)
        first = ((runs - 1).bit_count() + 2) * gradients
        comparison = (parts + 1) * gradients + kept + largest
        exchange = parts * gradients + size.trained // shards
        held = size.state // shards + sum(one.parameters for one in mine)
        found.append(held + max(passes, first, comparison, exchange))
    return found


def fewest_stages(size: ModelSize, cells: int, strategy: str, microbatches: int, memory: int) -> int | None:
    """The fewest stages with which each worker of the largest world has enough memory; None if it has never. Fewer
    stages let workers wait less while pipelines fill and empty.

    Args:
        cells: of the largest world.
        memory: bytes of a worker.
    """
    for least in range(1, min(cells, len(size.layers)) + 1):
        enough = pipelines(cells, least)[0] <= microbatches
        if enough and need(size, cells, least, strategy, microbatches) <= memory:
            return least
    return None


def fewest_workers(size: ModelSize, cells: int, least: int, strategy: str, microbatches: int, memory: int) -> int:
    """The size of the smallest world from which on all worlds have enough memory, in cells."""
    fits = [need(size, n, least, strategy, microbatches) <= memory for n in range(1, cells + 1)]
    return cells - next((i for i, one in enumerate(reversed(fits)) if not one), cells) + 1
