"""What all tests share: the real cluster's fixtures."""

from hypothesis import settings

pytest_plugins = ["tests.cluster.fixtures"]

# How long an example takes says something of the machine, not of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
