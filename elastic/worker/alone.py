"""The job's code sees no other workers.

The microbatches of a worker, and the number of workers, may change at any step. A job that multiplies by the world
size, or selects data by its rank, gets the answers of a single process, with which it is right.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

from elastic.child import show_stack_at_death
from elastic.compat.torch_world import hide_loader_process, hide_world
from elastic.errors import ConfigError
from elastic.observe.streams import keep_output_sturdy

#: Environment variables that launchers such as torchrun set for their processes.
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


#: What torch says to whom has none; of `init_process_group()` that torch calls itself, the second.
_NO_GROUP = ("Default process group has not been initialized", "torch.distributed using env:// rendezvous")


def be_alone(job: object = None) -> Callable[[], None]:
    """From now on the job's code in this process sees that it is the only process.

    Args:
        job: the job, if it exists already.

    Returns:
        a function that undoes it.
    """
    kept = {name: os.environ.pop(name) for name in OF_LAUNCHERS if name in os.environ}
    show = hide_world(_refusal, job)

    def back() -> None:
        os.environ.update(kept)
        show()

    return back


def begin_loader() -> None:
    """Called first in each loader process."""
    show_stack_at_death()
    keep_output_sturdy()
    be_alone()
    hide_loader_process()


def wants_process_group(error: BaseException) -> str | None:
    """Say so in a sentence if the job's code raised since it sees no process group."""
    if not any(words in str(error) for words in _NO_GROUP):
        return None
    frame = next(f for f in reversed(traceback.extract_tb(error.__traceback__)) if not _is_of_torch(f.filename))
    return (
        f"the job makes something that needs a process group ({frame.filename}, line {frame.lineno}: {frame.line}), "
        "such as DistributedDataParallel, FSDP or a DistributedSampler; leave it out: Elastic deals the samples, and "
        "sums or cuts over the workers by --parallel.strategy"
    )


def _is_of_torch(file: str) -> bool:
    return f"{os.sep}torch{os.sep}" in file


def _refusal(what: str) -> ConfigError:
    return ConfigError(
        f"the job calls {what}, but workers run its code for different parts of a step, and their number changes: "
        "leave it out; gradients, losses and metrics are summed over the workers without it"
    )
