"""What of a run travels to Ray's actors."""

from __future__ import annotations

import pickletools

import cloudpickle

from elastic.cluster.actors import training_function
from elastic.run.prepare import prepare
from elastic.worker.run import WorkerRun
from tests.forked import configure
from tests.tiny_jobs import Plain


def test_the_module_of_a_job_is_not_imported_before_the_worker_sees_its_devices(tmp_path):
    run = prepare(Plain(), configure(tmp_path, "run"))
    of_worker = WorkerRun(run.job, run.config, run.plan, run.digest, run.folder.storage.url, "http://host", "token")

    sent = cloudpickle.dumps(training_function(of_worker, "gpu", None))

    read_at_once = {text for _, text, _ in pickletools.genops(sent) if isinstance(text, str)}
    assert not [text for text in read_at_once if text.startswith(("tests", "jobs"))]
    assert Plain.__module__.encode() in sent  # it is within the bytes that are read later
