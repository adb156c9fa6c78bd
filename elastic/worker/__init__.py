"""One worker of a run: its loop, its state, and how it comes back after a loss."""

import os

# torch reads this once, before the first tensor is made. Large tensors on the host then lie on huge pages where the
# kernel gives them on request (its default): new memory takes half the time to fill, which a step does with gradients
# and a newcomer with the state.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
