"""What all tests share: the real cluster's fixtures, and who may run beside whom."""

import pytest

pytest_plugins = ["tests.cluster.fixtures"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """There is one cluster: under xdist's `--dist loadgroup` one process has all that needs it, in order."""
    for item in items:
        if item.get_closest_marker("cluster") or item.get_closest_marker("e2e"):
            item.add_marker(pytest.mark.xdist_group("cluster"))
