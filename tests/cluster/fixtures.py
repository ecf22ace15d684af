"""Fixtures for tests that need the real cluster (markers `cluster` and `e2e`)."""

import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.cluster import gpus, kwok
from tests.cluster.client import Cluster
from tests.cluster.lifecycle import ensure_up


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    """The machine's cluster; it is left running, so that the next run finds it."""
    return ensure_up()


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A fresh namespace that enforces the restricted Pod Security Standard."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.create_namespace(name)
    yield name
    cluster.delete("namespace", name, wait=False)


@pytest.fixture
def fake_gpus(cluster: Cluster) -> Iterator[gpus.Product]:
    """Two fake L4s on the real node."""
    gpus.give(cluster, gpus.L4, 2)
    yield gpus.L4
    gpus.take(cluster)


@pytest.fixture
def fake_nodes(cluster: Cluster) -> Iterator[Callable[..., list[str]]]:
    """Makes fake nodes (arguments as of `kwok.create_nodes`) and removes them afterwards."""
    made: list[str] = []

    def make(prefix: str, count: int, **arguments) -> list[str]:
        made.extend(f"{prefix}-{number}" for number in range(count))
        return kwok.create_nodes(cluster, prefix, count, **arguments)

    yield make
    kwok.delete_nodes(cluster, made)
