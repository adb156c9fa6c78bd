"""Random seeds as pure functions of what they are used for, never of time or place."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np


def derive(*key: int | str) -> int:
    """A 63-bit seed from a key such as ("dropout", seed, step, microbatch)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch (on every device); torch when it is imported, which a driver does only for some
    jobs."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch = sys.modules.get("torch")
    if hasattr(torch, "default_generator"):
        _seed_torch(torch, seed)
    else:
        _LATER.seed = seed
        if _LATER not in sys.meta_path:
            sys.meta_path.insert(0, _LATER)


def _seed_torch(torch: Any, seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 160 us to ask every kind of device
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class _WhenImported(MetaPathFinder):
    """Seeds torch at the end of its import."""

    seed = 0
    _asking = False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != "torch" or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader  # made for this spec
            execute = loader.exec_module

            def execute_and_seed(module: Any) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _seed_torch(module, self.seed)

            loader.exec_module = execute_and_seed
        return spec


_LATER = _WhenImported()


def seed_job() -> None:
    """Seed before a job is created: a model made in its `__init__` is then the same in every process and session."""
    seed_all(derive("job"))


@contextmanager
def unseeded() -> Iterator[None]:
    """Inside, generators may be seeded; afterwards those of Python, numpy and torch have the state from before."""
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
