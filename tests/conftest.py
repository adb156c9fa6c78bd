"""What every test gets: a check that it leaves nothing behind, and hypothesis settings that are the same everywhere."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests import leaks

# The same examples on every machine: what is red in CI is red at home.
settings.register_profile(
    "reproducible", deadline=None, derandomize=True, database=None, max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("reproducible")


def pytest_configure(config: pytest.Config) -> None:
    """A temporary folder of our own: what other processes put into the common one is no leak of ours."""
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # tmp_path stays where people look for it
    folder = tempfile.mkdtemp(prefix="tests-")
    os.environ["TMPDIR"], tempfile.tempdir = folder, None
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves processes, threads, environment variables, temporary files or a process group.

    Tests marked `ray` share a cluster for the whole session, so Ray's own processes, threads and variables are theirs
    to keep; everything of this project is checked there too.
    """
    ray = request.node.get_closest_marker("ray") is not None
    before = leaks.take()
    yield
    found = leaks.wait_until_clean(before, ray=ray)
    if "process group" in " ".join(found):
        import torch.distributed as dist

        dist.destroy_process_group()  # the next tests are innocent
    if found:
        pytest.fail("the test leaves behind:\n  " + "\n  ".join(found), pytrace=False)
