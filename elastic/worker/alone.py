"""What the job's code sees of the workers: that it is alone.

Which microbatches a worker has, and how many workers there are, may change at any step. So a job that multiplies by the
world size, or takes a part of its data by the rank, is told what one process would be told, and is right.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from elastic.compat.torch_world import hide_world
from elastic.errors import ConfigError
from elastic.observe.streams import keep_output_sturdy

#: What launchers such as torchrun tell processes of theirs.
OF_LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def be_alone(job: object = None) -> Callable[[], None]:
    """From now on the job's code in this process is told that it is the only process.

    Args:
        job: if there is one already.

    Returns:
        what undoes it.
    """
    kept = {name: os.environ.pop(name) for name in OF_LAUNCHERS if name in os.environ}
    show = hide_world(_refusal, job)

    def back() -> None:
        os.environ.update(kept)
        show()

    return back


def begin_loader() -> None:
    """What each loader process does first."""
    keep_output_sturdy()
    be_alone()


def _refusal(what: str) -> ConfigError:
    return ConfigError(
        f"the job calls {what}, but workers run its code for different parts of a step, and their number changes: "
        "leave it out; gradients, losses and metrics are summed over the workers without it"
    )
