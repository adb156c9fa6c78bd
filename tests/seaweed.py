"""Fixtures of a real S3: SeaweedFS on loopback, once a session, and a proxy in front: faults and a record."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

from jobs.bench.s3front import S3Front
from jobs.bench.seaweed import SeaweedFS, SeaweedMissing, binary, credentials


@pytest.fixture(scope="session")
def seaweed() -> Iterator[SeaweedFS]:
    """The server. Tests that kill it take one of their own, `own_seaweed`."""
    try:
        binary()
    except SeaweedMissing as reason:
        pytest.skip(str(reason))
    with SeaweedFS() as server:
        yield server


@pytest.fixture(scope="session")
def _front(seaweed: SeaweedFS) -> Iterator[S3Front]:
    with S3Front(upstream=seaweed.port) as front:
        yield front


@pytest.fixture
def front(_front: S3Front, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Front]:
    """The proxy, to which the environment points, with an empty record and no faults."""
    from s3fs import S3FileSystem

    for name, value in {**credentials(), "AWS_ENDPOINT_URL": _front.url}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # nothing here asks anything that is not on loopback
    S3FileSystem.clear_instance_cache()  # those made under another environment
    _front.clear()
    _front.records()
    yield _front
    _front.clear()
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def own_seaweed(front: S3Front, seaweed: SeaweedFS) -> Iterator[SeaweedFS]:
    """A server for one test, behind `front` while that lasts; to be named before `bucket`."""
    with SeaweedFS() as server:
        front.move(server.port)
        yield server
        front.move(seaweed.port)


@pytest.fixture
def bucket(front: S3Front) -> Iterator[str]:
    """The URL of an empty bucket, removed afterwards."""
    from s3fs import S3FileSystem

    name = f"test-{uuid.uuid4().hex[:8]}"
    keys = {"key": os.environ["AWS_ACCESS_KEY_ID"], "secret": os.environ["AWS_SECRET_ACCESS_KEY"]}
    fs = S3FileSystem(**keys, endpoint_url=front.url, use_listings_cache=False)  # whatever a test does to the variables
    fs.mkdir(name)
    front.records()
    yield f"s3://{name}"
    front.clear()
    fs.rm(name, recursive=True)
