"""A worker's link to its run. Imports nothing heavy, so that a worker whose other imports fail can report that."""

from __future__ import annotations

import os

from elastic.membership.client import WorkerLink
from elastic.membership.world import Member
from elastic.units import parse_amount
from elastic.worker.run import Identity, WorkerRun


def link_of(run: WorkerRun, identity: Identity) -> WorkerLink:
    """The link of a worker that has not reported its device, data and model yet."""
    member = Member(identity.id, identity.node, identity.local_index, os.getpid(), identity.host)
    lease_s = parse_amount("lease", run.config.recovery.lease, clock=True).seconds
    return WorkerLink(run.server_url, run.token, member, lease_s=lease_s)
