"""Random seeds as pure functions of what they are used for, never of time or place."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(*key: int | str) -> int:
    """A 63-bit seed from a key such as ("dropout", seed, step, microbatch)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch (on every device)."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 160 us to ask every kind of device
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def seed_job() -> None:
    """Seed before a job is created: a model made in its `__init__` is then the same in every process and session."""
    seed_all(derive("job"))


@contextmanager
def unseeded() -> Iterator[None]:
    """Inside, generators may be seeded; afterwards those of Python, numpy and torch have the state from before."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
