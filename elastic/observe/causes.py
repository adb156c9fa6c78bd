"""What a worker-second can be spent on. Each second of each worker of a run has exactly one of these causes."""

from __future__ import annotations

PRODUCTIVE = "productive"
#: Cause and what it means, in the order in which people read them.
CAUSES: dict[str, str] = {
    "startup/import": "starting: importing torch, Elastic and the job",
    "startup/data": "starting: train_data() and eval_data()",
    "startup/model": "starting: building the model",
    "startup/rehearsal": "starting: trying the job on a batch",
    "startup/other": "starting: device, connection, what no phase names",
    PRODUCTIVE: "forward, backward and update of steps that count",
    "evaluation": "evaluations",
    "data": "waiting for the batch",
    "sync": "waiting for gradients and for the step's agreement",
    "imbalance": "waiting for workers with one microbatch more, or for a pipeline to fill and empty",
    "checkpoint": "training stood still to save",
    "snapshot": "training stood still for a snapshot",
    "other": "the step loop beside all that: records, comparisons, the job's own hooks",
    "detect": "from the last recorded step until a loss was known, with the step that was under way",
    "form": "waiting for a world: for others, for its connections",
    "restore": "getting the state: from a peer, a snapshot or a checkpoint; wrapping the model",
    "redone": "steps that were done again later",
    "held": "held after an evaluation, until a sweep decided",
    "parked": "parked with too few workers",
    "draining": "asked to go, and not in a world any more",
    "spare": "ready, but not needed: a spare, or left out",
    "silent": "not answering, while the others went on",
    "ending": "the end: the last evaluation's rest, the last save, the hash of the weights",
    "left_over": "after the last record of a driver that was killed",
    "under_way": "since the newest record of a live run: not known yet",
    "unknown": "not recorded by the version that wrote this",
}
