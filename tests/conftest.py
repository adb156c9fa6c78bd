"""What every test gets: a check that it leaves nothing behind, and hypothesis settings that are the same everywhere."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from elastic.garbage import freeze_imported
from tests import botocore_models, fresh, leaks  # noqa: F401
from tests.budget import Budget
from tests.seaweed import _front, bucket, front, own_seaweed, seaweed  # noqa: F401
from tests.side_by_side import shares_cluster

if TYPE_CHECKING:
    from jobs.bench.nodes import LocalCluster
    from tests import forked

NODES = 3

# The same examples on every machine: what is red in CI is red at home.
settings.register_profile(
    "reproducible",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
# Others than ever, in `make test-long`; what fails is shown with the line that repeats it.
settings.register_profile("fresh", settings.get_profile("reproducible"), derandomize=False, print_blob=True)
settings.load_profile("reproducible")


def pytest_configure(config: pytest.Config) -> None:
    """Have a temporary folder of our own: what other processes put into the common one is no leak of ours."""
    # an assertion in these says what it compared
    pytest.register_assert_rewrite("tests.forked", "tests.ray_cluster", "tests.storage_contract")
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:  # as where tests are begun in the background, or with nohup
            signal.signal(number, usual)
    # Test processes have more threads than this machine has CPUs: who waits must not spin. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    root = os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())  # tmp_path stays where people look
    fresh.choose()
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Budget())
    folder = tempfile.mkdtemp(prefix="tests-", dir=root)  # not within it: paths of sockets are short
    os.environ["TMPDIR"], tempfile.tempdir = folder, None
    # Last of all, after multiprocessing (-100), which has its own folder in there.
    Finalize(None, shutil.rmtree, args=[folder], kwargs={"ignore_errors": True}, exitpriority=-200)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without the garbage collector: it would look at each imported module and test again and again, for a
    sixth of the time, and find nothing. Nor are they looked at while tests run."""
    gc.disable()
    try:
        return (yield)
    finally:
        freeze_imported()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that share a cluster are known by their file: see `tests.side_by_side`. Those of hypothesis are marked."""
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.random)
        if "ray_nodes" in getattr(item, "fixturenames", ()) and not shares_cluster(item.nodeid):
            raise pytest.UsageError(f"{item.nodeid} shares a Ray cluster; put it into a file tests/test_ray_*.py")


def pytest_sessionfinish() -> None:
    """Pytest ends with five collections, for what tests left that warns when it is freed: that would be seconds."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Who runs what, of the processes that run tests side by side."""
    from tests.side_by_side import Scheduler

    return Scheduler(config, log)


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


@pytest.fixture
def gate(tmp_path: Path) -> Callable[[str], Path]:
    """Makes files that hold processes while they exist, by name."""

    def make(name: str) -> Path:
        path = tmp_path / name
        path.touch()
        return path

    return make


@pytest.fixture(scope="session")
def fork_server(request: pytest.FixtureRequest) -> Iterator[None]:
    """The process that workers of `tests.forked` are forked from, and drivers on Ray where tests share a cluster: of
    processes that run tests side by side, in the one that begins with these."""
    from tests import forked

    side_by_side = "PYTEST_XDIST_WORKER" in os.environ
    tests = [os.environ["PYTEST_CURRENT_TEST"]] if side_by_side else [item.nodeid for item in request.session.items]
    ray = any(map(shares_cluster, tests))
    with pytest.MonkeyPatch.context() as patch:
        if ray:
            patch.setenv("RAY_AUTH_MODE", "disabled")  # read when Ray is imported
        forked.start_fork_server(ray=ray)
    yield
    forked.stop_fork_server()


@pytest.fixture(scope="session")
def ray_nodes(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """The one Ray cluster of the session: three nodes of two workers."""
    from tests.ray_cluster import ForkingCluster

    os.environ["RAY_AUTH_MODE"] = "disabled"
    shared = ForkingCluster(NODES, tmp_path_factory.mktemp("workers"))
    yield shared
    shared.close()


@pytest.fixture
def cluster(ray_nodes: LocalCluster) -> Iterator[LocalCluster]:
    """That cluster, with as many nodes as ever, whatever the last test did to it; no command outlives a test."""
    from jobs.bench.nodes import Command

    while len(ray_nodes.nodes) < NODES:
        ray_nodes.add_node()
    yield ray_nodes
    while Command.started:
        Command.started.pop().end()


@pytest.fixture(scope="session")
def undisturbed(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> forked.Ran:
    """The run that others are compared with: one worker, bitwise, nothing happens."""
    from tests import forked
    from tests.tiny_jobs import Everything

    config = forked.configure(tmp_path_factory.mktemp("undisturbed"), "undisturbed", eval__every="3st")
    ran = forked.train(Everything(), config, workers=1)
    assert ran.failure is None
    return ran


@pytest.fixture(scope="session")
def undisturbed_epoch(fork_server: None, tmp_path_factory: pytest.TempPathFactory) -> forked.Ran:
    """An undisturbed run that sees no sample twice, for those in which something happens at one sample."""
    from tests import forked
    from tests.tiny_jobs import Everything

    config = forked.configure(tmp_path_factory.mktemp("epoch"), "run")
    return forked.train(Everything(samples=forked.LONG), config, workers=1)
