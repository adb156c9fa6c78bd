"""Whether samples and batches go by what was fetched before, which another worker has not fetched.

A cache of augmented samples, a generator of the dataset's own, an image that is mixed with the one before: in one
process such things repeat from run to run; with several, what a sample becomes depends on who fetched what. Tried on
one microbatch, fetched and collated again in another order under the same seeds.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from elastic.data.fetching import Fetcher, Span
from elastic.data.identity import BUDGET_S, fingerprint
from elastic.data.samples import random_state
from elastic.errors import ConfigError

AGAIN = 4  # samples that are fetched again
VALUES = (
    "what train_data() and collate_fn() make of samples goes by what was fetched before: fetched again, under the same "
    "seed, they are others, and other workers have others"
)
KEPT = (
    "train_data() keeps what it made of samples with random numbers, so that later epochs get what a worker drew in "
    "earlier ones, and what another worker has not kept is drawn anew; keep what was read, and draw after that"
)


@dataclass
class Remembered:
    """What was found. `broken`: what samples become depends on who fetches which; `counts`: perhaps."""

    broken: list[str] = field(default_factory=list)
    counts: list[str] = field(default_factory=list)


def look(fetcher: Fetcher, span: Span, held: Callable[[], Mapping[str, tuple[bool, str]]]) -> Remembered:
    """Try one microbatch.

    Args:
        held: generators and numbers that the dataset holds: by name, whether it is a generator, and what it is at.

    Raises:
        ConfigError: samples share their memory.
    """
    ids, found, until = span.ids.tolist(), Remembered(), time.monotonic() + BUDGET_S
    try:
        before = held()
        first = _fetched(fetcher, ids, held, until)
        if len(first) < len(set(ids)):
            return found  # samples take too long to have them twice
        between = held()
        others_now = [i for i in first if fingerprint(first[i].sample) != first[i].print]
        second = _fetched(fetcher, ids[-2::-1][:AGAIN] or ids, held, until)
        # fetched again it is as it was: memory that samples share; else it is a count or the like that they refer to
        overwritten = [i for i in others_now if i in second and second[i].print == first[i].print]
        fetched = held()
        batches = [] if others_now else _collated(fetcher, [first[i].sample for i in ids])
        after = held()
    except Exception:  # of the job's: the step that has it says so, with all there is to know
        return found
    for name, (is_generator, at) in after.items():
        moved = [before.get(name) != between.get(name), between.get(name) != (is_generator, at)]
        # one that is seeded anew for each sample is each time where it was after that sample
        others = any(one.held.get(name) != first[i].held.get(name) for i, one in second.items())
        if is_generator and (others or fetched.get(name) != (is_generator, at)):
            found.broken.append(
                f"{name} is a generator of its own that samples are drawn with, so that they go by which others a "
                "worker has fetched; draw from random, numpy or torch, which are seeded for each sample"
            )
        elif all(moved) and not is_generator:
            found.counts.append(name)
    if overwritten:
        raise ConfigError(
            f"sample {overwritten[0]} of train_data() is overwritten when another one is fetched, so that batches have "
            "the newest sample several times; return a copy"
        )
    if any(second[i].print != first[i].print for i in second) or any(b != batches[0] for b in batches):
        found.broken.append(VALUES)
    elif any(second[i].state != first[i].state for i in second):
        found.broken.append(KEPT)
    return found


@dataclass(frozen=True)
class _Fetched:
    sample: Any
    print: list[Any] | None
    state: int  # where fetching it has left the random numbers
    held: Mapping[str, tuple[bool, str]]  # and what the dataset holds


def _fetched(
    fetcher: Fetcher, ids: list[int], held: Callable[[], Mapping[str, tuple[bool, str]]], until: float
) -> dict[int, _Fetched]:
    """Those for which there is time."""
    found: dict[int, _Fetched] = {}
    for sample_id in ids:
        if time.monotonic() > until:
            break
        sample = fetcher.one(sample_id)
        found[sample_id] = _Fetched(sample, fingerprint(sample), hash(random_state()), held())
    return found


def _collated(fetcher: Fetcher, samples: list[Any]) -> list[Any]:
    """What batches are and where they have left the random numbers: the same twice, with another one between."""
    if fetcher.collates_plainly or fetcher.makes_batches:
        return []
    found = []
    for order in (1, -1, 1):
        batch = fetcher.collate(copy.deepcopy(samples)[::order])
        found.append((fingerprint(batch), hash(random_state())))
    return found[::2]
